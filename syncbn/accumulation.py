"""Running statistics that move once for several calls of a layer.

Requirements
    - while calls are watched the running statistics of the watched layers stay where they are, and no others do;
    - a call belongs to the layer that makes it, whatever names layers share, in this context only: other threads are not seen;
    - nothing is left behind, neither hooks nor statistics moved halfway, when an exception passes.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from . import equations, observing
from .kernels import Running, move
from .module import _Synchronized
from .observing import Call

WRAPPERS = (DistributedDataParallel, nn.DataParallel, AveragedModel)  # whose module runs, in the mode that it is in


@contextlib.contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Move running statistics once for all micro-batches of one optimizer step, as if they had been one batch.

        with syncbn.accumulate_statistics(model):
            for x, target in micro_batches:      # under no_sync() but for the last
                (loss(model(x), target) / len(micro_batches)).backward()
        optimizer.step()

    A micro-batch is normalized by the statistics of its own, over all ranks: those of the others are not known yet.
    So outputs and gradients are those of batch norm on micro-batches, and noisier than those of one large batch.
    Exact statistics of the large batch would take a forward pass over all micro-batches for each batch norm layer.
    What is exact is the running statistics: mean and unbiased variance of all micro-batches' values, by one step of momentum.
    They take the sums S1, S2, n that the layers reduce anyway: no further communication, no pass over data.

    Every call of a layer inside counts, a second one in the same forward too; those of a measure of syncbn.analysis do not. A
    layer that is not called, in eval mode or without running statistics is left alone, and so are layers of torch.
    num_batches_tracked advances by one. It is the layer's own statistics that move, not those that torch.func.functional_call
    puts in their place for a call. An exception that leaves the context leaves all as it was. Activation checkpointing
    counts each forward once.

    Args:
        model: any model with layers of ours. Code that torch.compile has compiled before runs eagerly inside, in all
            threads, for its calls are not seen.

    Raises:
        ValueError: the model itself is compiled, its statistics are accumulated already, or none of its batch norm layers is
            ours.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    layers = [layer for layer in norms if isinstance(layer, _Synchronized)]
    if norms and not layers:
        raise ValueError(
            f"given a {type(model).__name__} with {len(norms)} batch norm layers, none of them synchronized; "
            "expected one or more: call syncbn.convert(model) first"
        )
    if is_compiled(model):
        raise ValueError(
            f"given a compiled {type(model).__name__}, whose statistics move at each call; expected a model in eager mode"
        )
    sums: dict[_BatchNorm, Tensor] = {}

    def add(layer: _BatchNorm, message: Tensor) -> None:
        sums[layer] = sums[layer] + message if layer in sums else message.clone()

    with eagerly(), Calls(layers, add).watch():
        yield
    for layer, message in sums.items():
        move_statistics(layer, message)


class Calls:
    """An observer: gives `add` each layer of `layers` that is called, with its reduced message [S1, S2, n], (2C+1,) float64."""

    def __init__(self, layers: list[Any], add: Callable[[Any, Tensor], None]) -> None:
        self.layers, self.watched = layers, frozenset(layers)
        self.add = add
        self.entered: set[nn.Module] = set()  # called as modules
        self.seen: set[nn.Module] = set()  # of which a collective was seen

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the calls run inside, the layers' running statistics and num_batches_tracked held.

        Raises:
            ValueError: one of the layers is watched already.
        """
        others = {layer for one in observing.observers() if isinstance(one, Calls) for layer in one.layers}
        if others.intersection(self.layers):
            raise ValueError(
                "given a model whose statistics are being accumulated already; expected no accumulate_statistics or "
                "update_bn_stats inside of another: leave the outer one first"
            )
        # A user's own forward may advance it, in each call.
        counters = [(layer, layer.num_batches_tracked) for layer in self.layers if layer.num_batches_tracked is not None]
        counts = [counter.clone() for _, counter in counters]
        hooks: list[Any] = []
        try:
            for layer in self.layers:
                hooks.append(layer.register_forward_pre_hook(self._enter, prepend=True))
            with observing.observe(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for (layer, counter), count in zip(counters, counts, strict=True):
                if layer in self.entered or layer in self.seen:
                    layer.num_batches_tracked = counter.copy_(count)

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ([], None)  # in a copy of the model, or a pickle, whose hook does nothing

    def before(self, call: Call, local: Tensor) -> bool:
        return self._caller(call) is not None

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None:
        layer = self._caller(call)
        if layer is not None:
            self.seen.add(layer)
            self.add(layer, reduced)

    def failed(self, call: Call, error: BaseException) -> None:
        """The layer's forward raises."""

    def _caller(self, call: Call) -> nn.Module | None:
        """The layer that makes a call, if it is a watched one and the call its forward's: not that of a derivative."""
        layer = None if call.forward is None else call.forward.layer
        return layer if call.phase == "forward" and call.sums and layer in self.watched else None

    def _enter(self, layer: nn.Module, args: Any) -> None:
        if self in observing.observers():
            self.entered.add(layer)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it runs by torch.compile: a wrapper, or nn.Module.compile."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


class _Eagerly:
    """What `eagerly` gives: one stance for all threads, which the first to enter takes and the last to leave gives back."""

    def __init__(self) -> None:
        self.lock, self.inside, self.stance = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0 and "torch._dynamo" in sys.modules:
                try:
                    self.stance.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:  # of which a trace may have none
                    raise RuntimeError(
                        "given a call inside of code that torch.compile has compiled; expected it outside, where what is "
                        "compiled can run eagerly"
                    ) from error
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.stance.close()

    # As torch.compiler.disable, without importing the compiler: a trace may not touch the stance.
    __enter__._torchdynamo_disable = True  # type: ignore[attr-defined]
    __exit__._torchdynamo_disable = True  # type: ignore[attr-defined]


_eagerly = _Eagerly()


def eagerly() -> _Eagerly:
    """Inside, what was compiled runs eagerly, be it a model, a method or a function; no compiler is imported for it."""
    return _eagerly


def unwrapped(model: Any) -> nn.Module:
    """Out of data parallel wrappers, averages of weights and torch.compile, in any order."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model


@torch.no_grad()
def move_statistics(layer: Any, message: Tensor) -> None:
    """One step of the layer's running statistics towards those of the reduced message (2C+1,)."""
    mean, var, counted = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if not layer.track_running_stats or mean is None or var is None:
        return
    momentum = 0.0 if layer.momentum is None and counted is None else layer.momentum
    move(Running(mean, var, counted, momentum), equations.statistics(message))
