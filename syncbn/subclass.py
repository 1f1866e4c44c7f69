"""The synchronized class of any batch norm class: torch's own, lazy, a user's, parametrized.

Requirements
    - a layer changes its class and nothing else, and what the user's class does around the normalization stays: its forward
      runs as it is, and the one F.batch_norm in it, or the one call of super().forward, is ours;
    - a forward in which that is not reached exactly once is an error, never a silently local statistic;
    - a class made here pickles by the user's class.
"""

import contextlib
import copyreg
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .arguments import half_tracked, where
from .function import Site, in_backward, train
from .kernels import Affine, Running
from .module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, _Synchronized

OURS: dict[type[nn.Module], type[_Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


# The synchronized class of each class: torch's to begin with, and those made since.
_made: dict[type, type] = dict(OURS)


def synchronized_class(cls: type[Any]) -> type[nn.Module]:
    """The class that a layer of class `cls` gets: one of ours, or a subclass of `cls` and one of ours, the same at each call.

    Raises:
        ValueError: `cls` is a subclass of torch.nn.SyncBatchNorm, whose own forward communicates.
    """
    if cls not in _made:
        _made[cls] = _make(cls)
    return _made[cls]


def _make(cls: type[Any]) -> type[nn.Module]:
    if issubclass(cls, nn.SyncBatchNorm):
        raise ValueError(
            f"given class {cls.__qualname__}, a subclass of torch.nn.SyncBatchNorm, whose forward has collectives of its own; "
            "expected a subclass of nn.BatchNorm1d, 2d or 3d: derive it from one of these, or leave the layer out with skip="
        )
    name = f"Sync{cls.__name__}"
    if issubclass(cls, LazyModuleMixin) and cls.cls_to_become is not None:
        becomes = synchronized_class(cls.cls_to_become)
        lazy = (_Lazy, cls, _Synchronized)
        return types.new_class(name, lazy, {}, lambda body: body.update(_syncbn_wraps=cls, cls_to_become=becomes))
    ours = next((mine for torchs, mine in OURS.items() if issubclass(cls, torchs)), SyncBatchNorm)
    mixin = _ByOrigin if cls.forward is _BatchNorm.forward else _Redirected
    try:
        return types.new_class(name, (mixin, cls, ours), {}, lambda body: body.update(_syncbn_wraps=cls))
    except TypeError as error:
        raise ValueError(
            f"given class {cls.__qualname__}, of which no subclass can be made: {error}; expected one that can be derived from "
            "without arguments: leave the layer out with skip="
        ) from error


class _ByOrigin:
    """Pickles a class made here by the class that it wraps."""

    _syncbn_wraps: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(2)
        if not isinstance(reduced, tuple):
            return reduced
        make, given, *rest = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (self._syncbn_wraps,), *rest)
        return (_made_by, (self._syncbn_wraps, self._syncbn_wraps if make is type(self) else make, given), *rest)


def _new(cls: type[nn.Module]) -> nn.Module:
    made = synchronized_class(cls)
    return made.__new__(made)


def _made_by(cls: type[nn.Module], make: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """In the user's own way, which knows of no other class."""
    layer = make(*given)
    if type(layer) is cls:
        layer.__class__ = synchronized_class(cls)
    return layer


class _Lazy(_ByOrigin):
    """Its first call finds this forward, gets its parameters and with them its class, and then comes here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, LazyModuleMixin):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.forward(*args, **kwargs)


class _Redirected(_ByOrigin):
    """Runs the forward of the wrapped class with its batch normalization replaced by ours."""

    _syncbn_redirect: "_Redirect"  # of the forward that runs, while it is traced

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if not layer.training:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling() and in_backward() and layer.num_batches_tracked is not None:
            with _uncounted(layer):
                return self._syncbn_redirected(*args, **kwargs)
        return self._syncbn_redirected(*args, **kwargs)

    def _syncbn_redirected(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        redirect = _Redirect(layer._syncbn_site())
        if torch.compiler.is_compiling():
            self._syncbn_redirect = redirect
        with redirect:
            result = super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            del self._syncbn_redirect
        redirect.finish()
        return result

    def _syncbn_train(self, *args: Any) -> Tensor:
        """Reached by super().forward. A trace does not show the call of `train` to the mode: it is counted here."""
        if torch.compiler.is_compiling():
            self._syncbn_redirect.count()
            self._syncbn_redirect.inside = True
        return super()._syncbn_train(*args)  # type: ignore[misc]


@contextlib.contextmanager
def _uncounted(layer: Any) -> Iterator[None]:
    """Inside, a forward that a backward recomputes counts no batch, though the user's class counts them itself."""
    counted = layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        layer.num_batches_tracked.copy_(counted)


class _Redirect(TorchFunctionMode):
    """Inside, F.batch_norm is ours, for the layer of `site`; counts how often the layer normalizes."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.calls = 0
        self.evaluated = False  # by running statistics, as a layer does that is frozen in the user's
        self.inside = False  # in our own forward, whose F.batch_norm is meant

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not self.inside:
            return self._batch_norm(*args, **kwargs)
        if func is train and args[3] == self.site:
            self.count()
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            self.evaluated = True
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        self.count()
        if (running_mean is None) != (running_var is None):
            raise half_tracked(self.site.layer)
        running = None
        if running_mean is not None and running_var is not None:
            running = Running(running_mean, running_var, None, momentum)
        site = self.site._replace(channels=None)  # the forward may fold others into them
        return train(input, Affine(weight, bias, eps), running, site)

    def count(self) -> None:
        """Raise if the layer has normalized already."""
        self.calls += 1
        if self.calls > 1:
            raise self._wrong("more than once")

    def finish(self) -> None:
        """Raise if the layer has not normalized."""
        if self.calls == 0 and not self.evaluated:
            raise self._wrong("without F.batch_norm or super().forward")

    def _wrong(self, how: str) -> ValueError:
        return ValueError(
            f"given a batch norm class whose forward normalizes {how}; expected one call of F.batch_norm or of super().forward "
            f"in training: leave the layer out with skip= ({where(self.site.layer)})"
        )


def wrapped_anew(wrapper: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class that parametrize or fully_shard made for a layer, `wrapper`, made anew over another class of layers."""
    old = next(each for each in wrapper.__bases__ if issubclass(each, _BatchNorm))
    bases = tuple(base if each is old else each for each in wrapper.__bases__)
    members = {name: value for name, value in vars(wrapper).items() if name not in ("__dict__", "__weakref__", "__doc__")}
    return type(wrapper.__name__.replace(old.__name__, base.__name__), bases, members)


def class_of(layer: nn.Module) -> tuple[type[nn.Module], type[nn.Module] | None]:
    """The class of a layer without its parametrizations, and the class with them if it has any."""
    return parametrize.type_before_parametrizations(layer), type(layer) if parametrize.is_parametrized(layer) else None


def same_parametrizations(one: type[nn.Module], other: type[nn.Module]) -> bool:
    """Whether two classes made by parametrize have parametrizations of the same tensors."""
    names = [{name for name, value in vars(cls).items() if isinstance(value, property)} for cls in (one, other)]
    return names[0] == names[1]
