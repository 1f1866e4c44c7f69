"""Ranks with different numbers of batches, by torch's Join.

Requirements
    - a rank that is out of data issues the collectives of the layers as the others do, with nothing in them, and moves its
      running statistics as they do;
    - it posts them all and goes on: the others are at those of DistributedDataParallel in between;
    - what it posts is what the others call, in their order, also in a backward: recorded in the first step of each context,
      checked in every other.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from . import collectives, observing
from .accumulation import Calls, is_compiled, move_statistics
from .collectives import CollectiveError, Group, timeout
from .control import own_group
from .module import _Synchronized
from .schedule import Entry, Schedule

COMPILED = "given a compiled model or training step, whose collectives are not seen; expected eager mode, or syncbn.even_steps"
UNSEEN = "given a forward in which no layer in training mode was seen; expected one, in eager mode, or syncbn.even_steps"
HELD = (
    "given accumulate_statistics or update_bn_stats in SyncBatchNormJoin, and no broadcast of buffers: ranks out of data would "
    "keep other running statistics; expected broadcast_buffers=True, or use syncbn.even_steps"
)


def _refused(problem: str) -> ValueError:
    rank, size = collectives.rank_and_size()
    return ValueError(f"{problem} (rank {rank} of {size})")


class _Hook:
    """Of the wrapper's forward; in a copy of the wrapper, or a pickle, one that does nothing."""

    def __init__(self, does: Callable[..., None] | None = None) -> None:
        self.does = does

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, *args: Any) -> None:
        if self.does is not None:
            self.does(*args)


class SyncBatchNormJoin(Joinable):
    """Lets `torch.distributed.algorithms.Join` serve a DistributedDataParallel model with layers of ours.

        joined = syncbn.SyncBatchNormJoin(ddp_model)                  # once, on every rank of the job
        with Join([joined, ddp_model]):                               # ours first
            for x, target in loader: ...

    A rank that is out of data, or has none at all, takes part in the statistics of the others with an empty share, and ends
    with their running statistics. Gradients are what Join makes of them: DistributedDataParallel divides by all ranks, or, with
    Join(..., divide_by_initial_world_size=False), by those that still have data. The mean loss of one process takes the number
    of samples of all ranks in the step, which Join does not tell: `syncbn.even_steps` does.

    Static schedules only: every forward of the wrapped model in a context calls the same layers in the same order, followed by
    its backward before the next forward. What the backward calls counts too: checkpoints recompute, gradient penalties
    differentiate twice. Another order is an error on the ranks that have data, and for `syncbn.even_steps`, which takes any.
    Each context has a schedule of its own, its first step's, whatever ended the one before.

    Takes any of the wrapper's broadcast of buffers, find_unused_parameters and no_sync; `accumulate_statistics` with broadcast
    of buffers alone; nothing compiled, whose collectives are not seen. What is not taken is a ValueError on every rank, at the
    start of a context or in its first step. What Join does not send is the state of the optimizer: a rank that was out of data
    has momentum of its own, and even_steps keeps it alike. With accelerate `accelerator.join_uneven_inputs([joined, ddp_model],
    even_batches=False)`, which serves GPUs only: on the CPU it warns and does nothing.

    The layers get a group of their own, of the same ranks, for good, which cannot be pickled: save the state_dict. Their paths
    in messages become those in the wrapped model.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        """
        Args:
            ddp: wraps a model with layers of ours, all over the group of the wrapper.

        Raises:
            TypeError: no DistributedDataParallel.
            ValueError: no layer of ours in it, or one over other ranks; a compiled model, at each context too.
        """
        super().__init__()
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"given a {type(ddp).__name__}; expected a DistributedDataParallel")
        self.ddp = ddp
        self._refuse_compiled()
        layers = {path: layer for path, layer in ddp.module.named_modules() if isinstance(layer, _Synchronized)}
        if not layers:
            raise ValueError("given a model without layers of syncbn; expected some: syncbn.convert it before wrapping")
        for path, layer in layers.items():
            if layer._syncbn.group.resolve() is not ddp.process_group:
                raise ValueError(
                    f"given layer {path!r} with {layer._syncbn.group!r}; expected the group of the DistributedDataParallel"
                )
        self.group, self.store = own_group(ddp.process_group, self.join_device)
        for path, layer in layers.items():
            layer._syncbn = layer._syncbn._replace(group=Group(self.group), path=path)
        self.layers = list(layers.values())
        self.contexts = 0  # made so far: the same number on every rank
        ddp.register_forward_pre_hook(_Hook(self._before_forward), prepend=True)
        ddp.register_forward_hook(_Hook(self._after_forward))

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Of a new context, which alone holds its schedule: unless a name keeps it, it goes when an exception leaves it."""
        self._refuse_compiled()
        self.contexts += 1
        schedule = Schedule(self.store, self.contexts, self.layers, lambda: self._join_config.enable)
        observing.watchers[self.group] = schedule
        return _Shadow(self, schedule)

    @property
    def join_device(self) -> torch.device:
        return self.ddp.join_device

    @property
    def join_process_group(self) -> Any:
        return self.ddp.join_process_group

    def _refuse_compiled(self) -> None:
        if is_compiled(self.ddp):
            raise _refused(COMPILED)

    def _before_forward(self, ddp: Any, args: Any) -> None:
        if self._join_config.enable:
            self._start_step(COMPILED if torch.compiler.is_compiling() else self._problem())

    def _start_step(self, problem: str | None) -> None:
        """Tell Join that this rank has data, in the place of the wrapper, and the schedule what its step cannot have."""
        schedule: Any = observing.watchers.get(self.group)
        if schedule is not None and not self._join_config.is_first_joinable:
            raise ValueError(
                "given a Join with others before this one; expected Join([joined, ddp_model]), of one model, ours first"
            )
        work = Join.notify_join_context(self)
        if work is not None:
            self.ddp.reducer._set_forward_pass_work_handle(work, self.ddp._divide_by_initial_world_size)
        if schedule is not None:
            schedule.begin(None if problem is None else _refused(problem))

    # As torch.compiler.disable, without importing the compiler: run, and not traced, in a compiled training step.
    _start_step._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _after_forward(self, ddp: Any, args: Any, output: Any) -> None:
        if self._join_config.enable and self.group.size() > 1 and any(layer.training for layer in self.layers):
            schedule: Any = observing.watchers.get(self.group)
            if schedule is not None and schedule.at == 0:
                raise _refused(UNSEEN)  # code that was compiled by itself

    def _problem(self) -> str | None:
        """Why no rank that is out of data could follow a step that starts now."""
        held = {layer for one in observing.observers() if isinstance(one, Calls) for layer in one.layers}
        return None if self.ddp.broadcast_buffers or held.isdisjoint(self.layers) else HELD


class _Shadow(JoinHook):
    """What a rank that is out of data does for the layers in a step of the others."""

    def __init__(self, joined: SyncBatchNormJoin, schedule: Schedule) -> None:
        self.joined = joined
        self.schedule = schedule
        self.seconds = timeout(joined.group).total_seconds()
        self.posted: list[tuple[Entry, Tensor, Any]] = []  # call, message, work
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def main_hook(self) -> None:
        """Post the calls of a step; the first one, not known to a rank that never had data, is followed by a thread.

        The thread has a stream of its own: on theirs the wrapper's hooks wait for what comes after.
        """
        self._finish()
        self.schedule.end()
        if self.schedule.whole:
            self._post(self.schedule.entries)
        else:
            self.schedule.read(self.seconds)  # a step that all can take
            self.thread = threading.Thread(target=self._follow, daemon=True)
            self.thread.start()

    def post_hook(self, is_last_joiner: bool) -> None:
        """The context is left: forwards outside of it are nobody's business."""
        self.schedule.end()
        self._finish()
        observing.watchers.pop(self.joined.group, None)
        self.joined._join_config = self.joined._join_config._replace(enable=False)

    def _follow(self) -> None:
        try:
            with collectives.stream_of_its_own(self.joined.join_device):
                self._post(self.schedule.follow(self.seconds))
        except BaseException as error:
            self.error = error

    def _post(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            message = torch.zeros(entry.size, dtype=torch.float64, device=self.joined.join_device)
            self.posted.append((entry, message, collectives.post(message, self.joined.group)))

    def _finish(self) -> None:
        """Wait for what was posted, and move the running statistics as the ranks with data do."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error
        for entry, message, work in self.posted:
            try:
                work.wait()
            except RuntimeError as error:
                raise CollectiveError(
                    f"a rank out of data waited in vain for {entry.phase} of layer {entry.layer!r}; expected the ranks with "
                    "data to call it within the group's timeout: look for the first error among them"
                ) from error
            if message.is_cuda:  # made on another stream
                message.record_stream(torch.cuda.current_stream(message.device))
            if entry.moves is not None:
                move_statistics(self.joined.layers[entry.moves], message)
        self.posted = []
