"""Steps for ranks whose loaders end at different times.

Requirements
    - every rank takes the same steps, and each step weighs its samples as one process would that has all of them;
    - what travels is four integers a rank and step, over Gloo, posted one step ahead: no GPU waits, compute hides it;
    - a rank whose loader raises, or that is in another loop or step, is an error on every rank, at once.
"""

import copy
import functools
import itertools
import operator
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .collectives import CollectiveError, Group, GroupLike, ProcessGroup
from .control import Place, side_group
from .trees import changed, count_samples, emptied, tensors_of

# What a rank has for a step.
OUT, BATCH, FAILED = 0, 1, 2


def even_steps(
    loader: Iterable[Any],
    process_group: GroupLike = None,
    *,
    count: Callable[[Any], int] | None = None,
    empty: Callable[[Any], Any] | None = None,
) -> Generator[tuple[Any, float], None, None]:
    """One pass over `loader` that lasts as many steps on every rank as on the one with the most batches.

        for (x, target), weight in syncbn.even_steps(loader):
            loss = F.cross_entropy(model(x), target, reduction="sum") * weight
            loss.backward()                       # model: DistributedDataParallel over syncbn.convert(...)
            optimizer.step()

    Yields (batch, weight). A rank that has run out, or never had a batch, gets empty batches of the same structure, so that
    every layer and wrapper runs its collectives. weight is W / N, with W ranks and N samples in the step over all of them (0
    where there are none): a loss summed over the local samples, times weight, makes DistributedDataParallel's mean of the
    gradients that of the mean loss of one process that sees all samples of the step, whatever the ranks' shares. Alone, it is
    1 / N. Losses accumulated over several steps are sums of means; never take a mean on the rank, it is NaN for no samples.

    The loader is read one batch ahead, and the counts of that batch travel while the step is computed. A loader that refills
    one buffer would overwrite the batch in hand: let it yield clones. An error of the loader is raised when its step comes, on
    all ranks. If the loop is left early, leave it on all ranks in the same step: the others wait for the rank that is gone
    until the group's timeout, or raise once that rank begins another loop, or at once inside `syncbn.checked`, if that compares
    the ranks of this loop, no more and no fewer: otherwise they may wait here while that waits there, until the timeout.

    An empty batch has tensors of shape (0, *shape[1:]), of the dtype and on the device of the rank's own first batch; on a rank
    that had none, of another rank's, on the CPU: move batches to the device in the loop. Tensors without dimensions and what is
    no tensor pass as they were in the first batch; lists and tuples without a tensor are emptied. Containers are list, tuple,
    named tuple, dict, UserDict and dataclass.

    Most layers and summed losses take empty batches, forward and backward. Those that fail: `x.view(len(x), -1)` and
    `x.reshape(len(x), -1)` (write `x.flatten(1)`), F.pixel_shuffle in backward, pack_padded_sequence, `x.max()` and other
    reductions without a neutral element, F.ctc_loss. Mean losses are NaN, also when multiplied by 0: sum, and weigh.

    Args:
        loader: batches, any iterable; a tree of tensors whose first dimension counts samples. Its length is not asked for.
        process_group: the ranks that step together: None (all), a ProcessGroup or a 1-D DeviceMesh; the wrapper's group.
        count: batch → number of its samples, an integer; without it, the first dimension of the first tensor that has one.
        empty: batch → a batch of no samples, for batches that are no such tree (lists of images, graphs); it is copied by
            deepcopy for each step, and pickled for ranks that never had a batch.

    Raises:
        TypeError: a group that is none, a count that is no integer, a batch of a class that hides its tensors.
        ValueError: a rank outside of the group, a batch that cannot be counted, first batches that differ between ranks in
            structure, dtype or number of dimensions; a loader that accelerate prepared for an accumulation that its end ends.
        CollectiveError: another rank's loader raised, a rank is in another step, or did not come within the timeout.
    """
    accelerates: Any = getattr(loader, "gradient_state", None)  # of a loader that accelerate prepared
    if getattr(accelerates, "num_steps", 1) > 1 and getattr(accelerates, "sync_with_dataloader", False):
        raise ValueError(
            f"given a loader that accelerate prepared, whose end ends an accumulation of {accelerates.num_steps} steps, and "
            "which is read one batch ahead; expected GradientAccumulationPlugin(sync_with_dataloader=False), or the loader "
            "as it was before prepare"
        )
    return _steps(loader, Group(process_group), count or count_samples, empty)


class _Read(NamedTuple):
    """What a rank has for a step, read from its loader."""

    state: int  # OUT, BATCH or FAILED
    batch: Any = None
    count: int = 0  # type: ignore[assignment]  # samples in the batch
    error: Exception | None = None  # why it FAILED


class _Row(NamedTuple):
    """What a rank says about a step."""

    state: int
    count: int  # type: ignore[assignment]


class _Peers:
    """The ranks that step together; alone, the rows are one."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.side, self.size, self.loop = None, 1, 1
        if group is not None and group.size() > 1:
            self.side, self.size = side_group(group), group.size()
            self.side.loops += 1
            self.loop = self.side.loops

    def post(self, step: int, read: _Read) -> Callable[[], list[_Row]]:
        """Say what this rank has for `step`; the function returned waits for the others' rows."""
        row = _Row(read.state, read.count)
        if self.side is None:
            return lambda: [row]
        where = f"in step {step} of loop {self.loop} of even_steps"
        gathered = self.side.gather_rows(Place(where, where), row)
        return lambda: [_Row(state, count) for state, count, *_ in gathered()]

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.side is None else self.side.gather_objects(value)


def _steps(
    loader: Iterable[Any], group: Group, count: Callable[[Any], int], empty: Callable[[Any], Any] | None
) -> Generator[tuple[Any, float], None, None]:
    peers = _Peers(group.resolve())
    source = _each(loader)
    template: Any = None
    again = functools.partial(changed, change=Tensor.clone) if empty is None else copy.deepcopy
    try:
        ahead = _read(source, count)
        rows = peers.post(0, ahead)
        for step in itertools.count():
            now, said = ahead, rows()
            _check(peers, step, said, now)
            if all(row.state == OUT for row in said):
                return
            if step == 0 and peers.size > 1:
                template = _agree(peers, now, empty)
            ahead = now if now.state == OUT else _read(source, count)
            rows = peers.post(step + 1, ahead)
            samples = sum(row.count for row in said)
            yield now.batch if now.state == BATCH else again(template), peers.size / samples if samples else 0.0
    finally:
        source.close()


def _each(loader: Iterable[Any]) -> Generator[Any, None, None]:
    yield from loader


def _read(source: Iterator[Any], count: Callable[[Any], int]) -> _Read:
    """The next batch; an error is kept for its step."""
    try:
        for batch in itertools.islice(source, 1):
            return _Read(BATCH, batch, _integer(count(batch)))
        return _Read(OUT)
    except Exception as error:
        return _Read(FAILED, error=error)


def _integer(samples: Any) -> int:
    try:
        number = operator.index(samples)
    except TypeError:
        raise TypeError(
            f"given {samples!r} of type {type(samples).__name__} as the number of samples in a batch; expected an integer from "
            "the argument count"
        ) from None
    if number < 0:
        raise ValueError(f"given {number} as the number of samples in a batch; expected 0 or more from the argument count")
    return number


def _check(peers: _Peers, step: int, said: list[_Row], now: _Read) -> None:
    """Raise, on every rank, if one failed."""
    if all(row.state != FAILED for row in said):
        return
    errors = peers.gather(None if now.error is None else f"{type(now.error).__name__}: {now.error}")
    if now.error is not None:
        raise now.error
    rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
    raise CollectiveError(f"the loader of rank {rank} of {peers.size} raised for step {step} of even_steps: {error}")


class _Offer(NamedTuple):
    """What a rank tells the others of its first batch."""

    problem: str | None  # why it has no empty form
    leaves: list[str] | None = None  # the tensors of the template in words, None: not to be compared


def _agree(peers: _Peers, first: _Read, empty: Callable[[Any], Any] | None) -> Any:
    """The empty batch of this rank, which takes another's if it has no batch; an error on all ranks if there is a problem."""
    template, offer, error = None, None, None
    if first.state == BATCH:
        try:
            template, offer = (empty or emptied)(first.batch), _Offer(None)
            if empty is None:
                leaves = [f"{path}: {t.dtype}, {t.dim()} dimensions" for path, t in tensors_of("batch", template)]
                offer = _Offer(None, leaves)
        except Exception as caught:
            error = caught
            offer = _Offer(f"{type(error).__name__}: {error}")
    offers = {rank: offer for rank, offer in enumerate(peers.gather(offer)) if offer is not None}
    if error is not None:
        raise error
    chosen, (_, expected) = next(iter(offers.items()))
    for rank, (problem, leaves) in offers.items():
        if problem is not None:
            raise CollectiveError(f"the first batch of rank {rank} of {peers.size} has no empty form: {problem}")
        if leaves != expected:
            given = next((pair for pair in itertools.zip_longest(expected or [], leaves or []) if pair[0] != pair[1]), None)
            raise ValueError(
                f"given first batches of different structure: {given and given[0]} on rank {chosen} and {given and given[1]} "
                f"on rank {rank}; expected the same containers, dtypes and numbers of dimensions on every rank"
            )
    return template if len(offers) == peers.size else _shared(peers, template, chosen)


def _shared(peers: _Peers, template: Any, chosen: int) -> Any:
    """The template of this rank, or, if it has none, that of the chosen one."""
    assert peers.side is not None
    pickled = peers.side.gather_bytes(_pickled(template) if peers.side.rank == chosen else b"")[chosen]
    if not pickled:
        raise TypeError(
            "given batches that cannot be pickled for a rank that has none; expected what can, or the argument empty"
        )
    return pickle.loads(pickled) if template is None else template


def _pickled(template: Any) -> bytes:
    """The template on the CPU; nothing if it cannot be pickled."""
    try:
        return pickle.dumps(changed(template, Tensor.cpu))
    except Exception:
        return b""
