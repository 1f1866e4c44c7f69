"""Synchronized batch normalization as layers.

Requirements
    - a subclass of torch's class of the same dimensions: constructor, flags, parameters, buffers and state_dict are its own;
    - the class alone makes the difference: an nn.BatchNorm2d whose __class__ is SyncBatchNorm2d is a working layer;
    - what is ours in an instance is one attribute, `_syncbn`, which need not be there.
"""

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .arguments import half_tracked, where
from .collectives import Group, GroupLike, ProcessGroup
from .function import Site, local, train
from .kernels import Affine, Running


class Binding(NamedTuple):
    """What a layer knows of its conversion and its group."""

    group: Group
    path: str | None = None  # in the converted model
    origin: type[nn.Module] | None = None  # the class before conversion, parametrizations aside; None: made as ours
    parametrized: type[nn.Module] | None = None  # the class before conversion, if it was parametrized
    theirs: Group | None = None  # of a torch.nn.SyncBatchNorm that had a group before conversion

    def __deepcopy__(self, memo: dict[int, Any]) -> "Binding":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without torch's class of parametrizations, which no pickle takes and `revert` can make anew."""
        return Binding, tuple(self._replace(parametrized=None))


ALL_RANKS = Binding(Group())
TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# Wrappers that were warned about.
_warned: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


class _Synchronized(_BatchNorm):
    """The forward of every layer of ours, over any `_BatchNorm`."""

    _syncbn: Binding = ALL_RANKS
    _force_sync: bool = False  # take the synchronized path in a process that is alone too: for tests and benchmarks
    _syncbn_are_kept: bool = True  # whether no class attribute stands before the tensors of a layer

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._syncbn_are_kept = not any(hasattr(cls, name) for name in TENSORS)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group whose ranks share statistics, None where this process is alone. ValueError on a rank outside of it.

        Can be set, to what `convert` takes. In a user's class with an attribute of this name it is that attribute.
        """
        return vars(self)["process_group"] if self._syncbn_has_own_group() else self._syncbn.group.resolve()

    @process_group.setter
    def process_group(self, group: GroupLike) -> None:
        if self._syncbn_has_own_group():
            vars(self)["process_group"] = group
        else:
            self._syncbn = self._syncbn._replace(group=Group(group))

    def _syncbn_has_own_group(self) -> bool:
        """Whether process_group is an attribute of a user's class, and not that of torch's."""
        origin = self._syncbn.origin or type(self)
        return "process_group" in vars(self) and not issubclass(origin, nn.SyncBatchNorm)

    def _syncbn_build(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        factory: dict[str, Any],  # device and dtype; bias only when it is False: not every torch has it
        group: Group,
    ) -> None:
        """Torch's constructor, and the group."""
        if eps < 0:
            raise ValueError(f"given eps={eps} for {type(self).__name__}({num_features}); expected 0 or more")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        if not group.is_everyone():
            self._syncbn = Binding(group)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """y of `input` (N, C, *): where `mask`, (N, *) or (N, 1, *) bool, is true, and 0 elsewhere; see `sync_batch_norm`."""
        return self._syncbn_forward(input, False, None, mask)

    def _syncbn_forward(self, input: Tensor, relu: bool, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        try:
            self._check_input_dim(input)
        except torch.fx.proxy.TraceError as error:
            todo = "trace before syncbn.convert, or by a Tracer whose is_leaf_module takes the layers of syncbn for such"
            raise type(error)(f"{error}: {todo} ({where(self._syncbn_name())})") from None
        except ValueError as error:
            raise ValueError(f"{error} ({where(self._syncbn_name())})") from None
        weight, bias, mean, var, counted = self._syncbn_tensors()
        affine = Affine(weight, bias, self.eps, relu, residual)
        if (mean is None) != (var is None) and (self.track_running_stats or not self.training):
            raise half_tracked(self._syncbn_name())
        if not self.training:
            return local(input, mean, var, affine, mean is None and var is None, mask, self._syncbn_name())
        running = None
        if self.track_running_stats and mean is not None and var is not None:
            if not (self._syncbn.group.is_everyone() or torch.compiler.is_compiling()):
                self._syncbn_warn_if_broadcast()
            running = Running(mean, var, counted, 0.0 if self.momentum is None and counted is None else self.momentum)
        return self._syncbn_train(input, affine, running, mask)

    def _syncbn_tensors(self) -> tuple[Any, ...]:
        """Those of TENSORS, from where torch.nn.Module keeps them: its __getattr__, for what is elsewhere, takes far longer."""
        p, b = self._parameters, self._buffers
        if self._syncbn_are_kept:
            try:
                return p["weight"], p["bias"], b["running_mean"], b["running_var"], b["num_batches_tracked"]
            except KeyError:  # a parametrization
                pass
        return tuple(getattr(self, name) for name in TENSORS)

    def _syncbn_train(self, input: Tensor, affine: Affine, running: Running | None, mask: Tensor | None) -> Tensor:
        return train(input, affine, running, self._syncbn_site(), mask)

    def _syncbn_warn_if_broadcast(self) -> None:
        """Warn, once a wrapper, if DistributedDataParallel will overwrite statistics of a smaller group by those of rank 0."""
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or ddp in _warned or not ddp.broadcast_buffers:
            return
        size = self._syncbn.group.size()
        if size < ddp.process_group.size():
            _warned.add(ddp)
            warnings.warn(
                f"layer {self._syncbn_name()!r} shares statistics among {size} ranks, but DistributedDataParallel over "
                f"{ddp.process_group.size()} ranks broadcasts the buffers of its first rank before each forward, so every "
                "group gets the running statistics of one: turn its broadcast of buffers off",
                stacklevel=3,
            )

    def _syncbn_site(self) -> Site:
        """Where this layer normalizes."""
        return Site(self._syncbn_name(), self._syncbn.group, self.num_features, self._force_sync, self)

    def _syncbn_name(self) -> str:
        """The layer in messages: its path if it was converted, else its class and size, as in compiled code always.

        The compiler would guard a path, and compile each layer by itself.
        """
        path = None if torch.compiler.is_compiling() else self._syncbn.path
        return path or f"{type(self).__name__}({self.num_features})"

    def extra_repr(self) -> str:
        group = self._syncbn.group
        return super().extra_repr() + ("" if group.is_everyone() else f", {group!r}")


class SyncBatchNorm(_Synchronized):
    """Batch normalization over the batch of all processes, for input (N, C, *) of 2 dimensions and more.

    In training, mean and variance are those of the whole mini-batch, exactly, for any split of it among the ranks: unequal,
    empty, or one element each (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1). The running variance takes v·n/(n − 1)
    with the global count n. In eval mode, and in a process that is alone, it is torch's batch norm; with momentum=None such
    a process moves its running statistics on the device, equal to torch's to rounding. Takes state_dicts of nn.BatchNorm*
    and nn.SyncBatchNorm, and gives them back.

    Inside a backward, as activation checkpointing recomputes, running statistics and num_batches_tracked do not move: once a
    step, reentrant or not. That goes for any forward that a backward hook or a custom backward calls, but for compiled code,
    which cannot tell: an eager checkpoint around a compiled block moves them twice, as nn.BatchNorm does; put the checkpoint
    inside. The collective repeats, alike on all ranks, unless `syncbn.checkpoint_context` is given.

    A batch without a value on any rank leaves running statistics and num_batches_tracked as they were (torch counts it where
    it does not raise); a single value in the whole batch moves running_mean and leaves running_var.

    **Gradients of weight and bias are the sums over this rank's share**, which a data-parallel wrapper reduces with the others.
    DistributedDataParallel averages them over W ranks, so with unequal shares a mean loss on each rank is not the mean loss of
    the batch. Sum instead: with N samples in the whole batch, a loss of

        F.cross_entropy(output, target, reduction="sum") * W / N

    on each rank gives the gradients of the mean loss of one process, for any shares; never take the mean of an empty share,
    which is NaN.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: GroupLike = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        group_size: int | None = None,
    ) -> None:
        """
        Args:
            num_features: C.
            eps, momentum, affine, track_running_stats, device, dtype, bias: as torch.nn.SyncBatchNorm has them.
            process_group: the ranks that share statistics: None (all), a ProcessGroup or a 1-D DeviceMesh.
            group_size: instead, contiguous groups of this many ranks.

        Raises:
            TypeError, ValueError: a group that is none, both kinds of group, or a negative eps; in forward, those of
                `sync_batch_norm`.
        """
        factory = {"device": device, "dtype": dtype} | ({} if bias else {"bias": False})
        self._syncbn_build(num_features, eps, momentum, affine, track_running_stats, factory, Group(process_group, group_size))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class SyncBatchNormReLU(SyncBatchNorm):
    """`SyncBatchNorm` and the ReLU behind it as one layer: max(batch_norm(x) + residual, 0), rounded once.

    Takes and gives back the state_dicts of nn.BatchNorm*. Backward reads the sign of the sum off x again, or off y where
    something was added, so that nothing is kept beside x and what the next layer keeps anyway; see `syncbn.kernels`.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            input: (N, C, *), as `sync_batch_norm` takes it.
            residual: (N, C, *) of the shape, dtype and device of `input`, any strides; added before the ReLU.
            mask: (N, *) or (N, 1, *) bool: y and the gradients of `input` and `residual` are 0 where it is false.

        Raises:
            ValueError, TypeError: a residual of another shape, device or dtype; those of `sync_batch_norm`.
        """
        return self._syncbn_forward(input, True, residual, mask)


class _LikeTorch(_Synchronized):
    """The constructor of SyncBatchNorm1d/2d/3d: torch's of the same dimensions, and the group by keyword."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        process_group: GroupLike = None,
        group_size: int | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype} | ({} if bias else {"bias": False})
        self._syncbn_build(num_features, eps, momentum, affine, track_running_stats, factory, Group(process_group, group_size))


class SyncBatchNorm1d(_LikeTorch, nn.BatchNorm1d):
    """`SyncBatchNorm` as nn.BatchNorm1d: input (N, C) or (N, C, L)."""


class SyncBatchNorm2d(_LikeTorch, nn.BatchNorm2d):
    """`SyncBatchNorm` as nn.BatchNorm2d: input (N, C, H, W)."""


class SyncBatchNorm3d(_LikeTorch, nn.BatchNorm3d):
    """`SyncBatchNorm` as nn.BatchNorm3d: input (N, C, D, H, W)."""
