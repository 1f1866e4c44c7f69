"""Checked mode: ranks that do not run the same program all stop at once, and say where each of them is.

Requirements
    - one fixed-size control message before each collective, in every phase and at the end: ranks that differ always meet,
      and before those of a wrapper's forward, in which others would stand that no layer has called yet;
    - every rank comes to the same verdict from the same rows, so that all raise or none;
    - the error of a rank that failed is its own; the others get its text.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import observing
from .collectives import CollectiveError, Group, ProcessGroup
from .control import Place, Rows, Side, digest, listed, ranks_of, side_group
from .module import _Synchronized
from .names import named
from .observing import Call


@contextlib.contextmanager
def checked(model: nn.Module) -> Iterator[None]:
    """Compare, before each collective of the layers run inside, what the ranks are about to do.

        with syncbn.checked(model):
            for x, target in loader: ...

    Without it, ranks that run different programs stand still until the timeout, add up sums of different layers, or, on Gloo,
    are ended by the backend when the sizes differ. Inside, layer, number of the call, phase, channels, dtype, values sent and
    group have to agree; at the first difference every rank raises the same error at once: who is where. A rank that leaves the
    context, or fails in it, tells the others at their next collective, or step of `even_steps` over the same ranks, and waits
    for it no longer than the group's timeout. A rank that is gone or frozen is named when the backend notices, at the latest
    at the timeout.

    A loop of `even_steps` over other ranks than those compared here has a channel of its own. A rank that waits there, for one
    that is in a layer or has left or failed, hears of it at the timeout, and so does one that waits here for a rank in there.

    What is compared is every collective of a layer of ours whose forward runs inside, of whatever model: `model` gives the
    names, and the ranks that take part: those of the group that all of its layers were given, or else all ranks of the job. All
    of these enter and leave the context together. Of a DistributedDataParallel in `model`, so give the wrapper, forwards that
    broadcast buffers are compared too (a rank that evaluates alone through it does so inside); its other collectives, and those
    of FSDP, wait for a rank that is elsewhere until their timeout. NaN or Inf in what a rank reduces is a warning, once, that
    names the rank and the layer; it propagates as in one process. (In backward under a gradient scaler it is routine.)

    Each collective costs one more small one over Gloo, and waits for the device: a tool for finding an error, or for runs that
    must not stand still. Compiled code is not seen. Not for `SyncBatchNormJoin`, whose ranks out of data run no layers.

    Args:
        model: any model with layers of ours, with its DistributedDataParallel if it has one. Inside, messages name its layers
            by their paths in it.

    Raises:
        CollectiveError: on every rank, inside or at the end: the ranks differ, one left or failed, is gone or frozen. Ranks
            that are still there can enter it again, together.
        ValueError: no layer of ours in the model; this rank is outside of their group.
    """
    with named(model) as layers:
        group = _group_of(list(layers.values()))
        if group is None or group.size() == 1:
            yield
            return
        checks = _Checks(side_group(group))
        try:
            with observing.observe(checks), _forwards_of_wrappers(model, checks):
                yield
        except BaseException as error:
            checks.leave(error)
            raise
        checks.leave(None)


def _group_of(layers: list[Any]) -> ProcessGroup | None:
    """The one group that all layers were given, or all ranks of the job."""
    given = {layer._syncbn.group for layer in layers}
    explicit = len(given) == 1 and next(iter(given)).process_group is not None
    return (next(iter(given)) if explicit else Group()).resolve()


@contextlib.contextmanager
def _forwards_of_wrappers(model: nn.Module, checks: "_Checks") -> Iterator[None]:
    """Compare forwards of DistributedDataParallel too, before they broadcast buffers and no layer can tell."""
    wrappers = [(path, module) for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)]
    hooks = [
        wrapper.register_forward_pre_hook(_Forward(checks, path or type(wrapper).__name__), prepend=True)
        for path, wrapper in wrappers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Forward:
    """The hook of a wrapper's forward; in a copy of the wrapper, or a pickle, one that does nothing."""

    def __init__(self, checks: "_Checks | None", name: str) -> None:
        self.checks, self.name = checks, name

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (None, self.name)

    def __call__(self, wrapper: Any, args: Any) -> None:
        if torch.compiler.is_compiling() or self.checks not in observing.observers() or not wrapper.will_sync_module_buffers():
            return
        if set(self.checks.side.ranks) <= set(ranks_of(wrapper.process_group)):
            # Without gradients no backward follows that ranks could differ in: a rank may evaluate where others train on.
            evaluates = torch.is_grad_enabled() and not any(
                layer.training for layer in wrapper.modules() if isinstance(layer, _Synchronized)
            )
            where = f"at a forward of {self.name}{' in eval mode' if evaluates else ''}"
            self.checks.meet(where, where)


class _Checks:
    """An observer that compares."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.errors = side.errors  # before
        self.number = 0  # of calls
        self.broken = False  # the ranks cannot be reached
        self.warned = False

    def before(self, call: Call, local: Tensor) -> None:
        if call.group is None:  # no collective follows, on no rank: one may do that alone
            return
        ranks = ranks_of(call.group)
        where, what = f"in {call.layer} {call.phase}", f"{call.channels} channels, {call.dtype}, {local.numel()} values"
        details = f"{what}, group of {listed(ranks)}"
        finite = bool(local.isfinite().all())
        rows = self.meet(f"{where} {what}", where, details, (len(ranks), digest(str(ranks)), finite), _complete)
        self.number += 1
        suspects = [rank for rank, (_, _, finite) in zip(self.side.ranks, rows, strict=True) if not finite]
        if suspects and not self.warned:
            self.warned = True
            warnings.warn(
                f"NaN or Inf in the share of {listed(suspects)} of {len(rows)} in {call.layer} {call.phase}, "
                f"call {self.number}",
                stacklevel=2,
            )

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None: ...

    def failed(self, call: Call, error: BaseException) -> None:
        """The error is on its way on this rank; the others are in the same collective, and hear of it from the backend."""
        self.broken = True

    @property
    def over(self) -> bool:
        """The ranks have been told to stop, by whichever message, or cannot be reached."""
        return self.broken or self.side.errors > self.errors

    def leave(self, error: BaseException | None) -> None:
        """Take part once more, as one that left or failed; raises only if this rank has no error of its own."""
        if self.over:
            return
        try:
            if error is None:
                self.meet("left", "out of the context")
            else:
                self.meet("failed", f"failed: {type(error).__name__}: {error}")
        except CollectiveError:
            if error is None:
                raise

    def meet(
        self,
        key: str,
        where: str,
        details: str = "",
        values: Sequence[int] = (),
        agree: Callable[[Rows], bool] = lambda rows: True,
    ) -> Rows:
        """The values of all ranks, if they agree."""
        if self.over:
            raise CollectiveError(f"{where}: checked mode ended before, with an error on every rank; expected nothing after it")
        at = f"call {self.number + 1}"
        return self.side.gather_rows(Place(f"{at} {key}", where, details, at), values, agree)()


def _complete(rows: Rows) -> bool:
    """Whether each rank is at the call with all others of its group."""
    groups = [(size, group) for size, group, _ in rows]
    return all(groups.count((size, group)) == size for size, group in groups)
