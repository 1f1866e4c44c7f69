"""Checked mode: ranks that do not run the same program all stop at once, and say where each of them is.

Requirements
    - one fixed-size control message before each collective, in every phase and at the end: ranks that differ always meet;
    - every rank comes to the same verdict from the same rows, so that all raise or none;
    - the error of a rank that failed is its own; the others get its text.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import collectives
from .collectives import Call, CollectiveError, Group, ProcessGroup
from .control import Side, ranks_of, side_group
from .module import named

CALL, LEFT, FAILED = range(3)


class _Row(NamedTuple):
    """What a rank says before a collective, or at the end: integers, for the comparison."""

    kind: int
    number: int  # of collectives before this one
    layer: int  # digest of the name
    phase: int  # digest
    channels: int
    dtype: int  # digest
    group_size: int
    group: int  # digest of its ranks
    finite: int  # whether the message of this rank is


@contextlib.contextmanager
def checked(model: nn.Module) -> Iterator[None]:
    """Compare, before each collective of the layers run inside, what the ranks are about to do.

        with syncbn.checked(model):
            for x, target in loader: ...

    Without it, ranks that run different programs stand still until the timeout, add up sums of different layers, or, on Gloo,
    are ended by the backend when the sizes differ. Inside, layer, number of the call, phase, channels, dtype and group have to
    agree; at the first difference every rank raises the same error at once: who is where. A rank that leaves the context, or
    fails in it, tells the others at their next collective, and waits for it no longer than the group's timeout. A rank that is
    gone or frozen is named when the backend notices, at the latest at the timeout.

    What is compared is every collective of a layer of ours that runs inside, of whatever model: `model` gives the names, and
    the ranks that take part: those of the group that all of its layers were given, or else all ranks of the job. All of these
    enter and leave the context together. NaN or Inf in what a rank reduces is a warning, once, that names the rank and the
    layer; it propagates as in one process. (In backward under a gradient scaler it is routine.)

    Each collective costs one more small one over Gloo, and waits for the device: a tool for finding an error, or for runs that
    must not stand still. Compiled code is not seen. Not for `SyncBatchNormJoin`, whose ranks out of data run no layers.

    Args:
        model: any model with layers of ours, in DistributedDataParallel or not. Inside, messages name its layers by their
            paths in it.

    Raises:
        CollectiveError: on every rank, inside or at the end: the ranks differ, one left or failed, is gone or frozen.
        ValueError: no layer of ours in the model; this rank is outside of their group.
    """
    with named(model) as layers:
        group = _group_of(list(layers.values()))
        if group is None or group.size() == 1:
            yield
            return
        checks = _Checks(side_group(group))
        try:
            with collectives.observe(checks):
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


class _Checks:
    """An observer that compares."""

    def __init__(self, side: Side) -> None:
        self.side = side
        side.uses += 1
        self.number = 0
        self.over = False  # the ranks have been told to stop, or cannot be reached
        self.warned = False

    def before(self, call: Call, local: Tensor) -> None:
        ranks = ranks_of(call.group)
        finite = bool(local.isfinite().all())
        row = _Row(
            CALL,
            self.number,
            _digest(call.layer),
            _digest(call.phase),
            call.channels,
            _digest(str(call.dtype)),
            len(ranks),
            _digest(str(ranks)),
            finite,
        )
        where = f"in {call.layer} {call.phase}"
        details = f"{call.channels} channels, {call.dtype}, group of ranks {', '.join(map(str, ranks))}"
        rows = self._meet(row, where, details)
        self.number += 1
        suspects = [rank for rank, row in zip(self.side.ranks, rows, strict=True) if not row.finite]
        if suspects and not self.warned:
            self.warned = True
            warnings.warn(
                f"NaN or Inf in the share of {_ranks(suspects)} of {len(rows)} in {call.layer} {call.phase}, "
                f"call {self.number}",
                stacklevel=2,
            )

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None: ...

    def failed(self, call: Call, error: BaseException) -> None:
        """The error is on its way on this rank; the others are in the same collective, and hear of it from the backend."""
        self.over = True

    def leave(self, error: BaseException | None) -> None:
        """Take part once more, as one that left or failed; raises only if this rank has no error of its own."""
        if self.over:
            return
        row = _Row(LEFT if error is None else FAILED, self.number, 0, 0, 0, 0, 0, 0, 1)
        where = "out of the context" if error is None else f"failed: {type(error).__name__}: {error}"
        try:
            self._meet(row, where, "")
        except CollectiveError:
            if error is None:
                raise

    def _meet(self, row: _Row, where: str, details: str) -> list[_Row]:
        """The rows of all ranks, if they agree. `where` says in words where this rank is."""
        if self.over:
            raise CollectiveError(f"{where}: checked mode ended before, with an error on every rank; expected nothing after it")
        try:
            rows = [_Row(*values) for values in self.side.gather_rows(row)()]
            if _agree(rows):
                return rows
            told = self.side.gather_objects((where, details))
        except CollectiveError as error:
            self.over = True
            raise self._alone(row, where) from error
        self.over = True
        raise CollectiveError(_verdict(self.side.ranks, rows, told))

    def _alone(self, row: _Row, where: str) -> CollectiveError:
        """The error of a rank whose message was not answered."""
        absent = self.side.absent(f"use {self.side.uses} call {row.number}")
        who = _ranks(self.side.ranks[rank] for rank in absent) if absent else "a rank"
        return CollectiveError(
            f"no answer from {who} at call {row.number + 1}, where rank {self.side.ranks[self.side.rank]} is {where}: gone, "
            f"frozen, or elsewhere for longer than {self.side.timeout}; expected every rank there: look at its own messages"
        )


def _agree(rows: list[_Row]) -> bool:
    """Whether all ranks are at the same call, each with all others of its group; or all at the end."""
    if len({row[:6] for row in rows}) > 1:
        return False
    groups = [(row.group_size, row.group) for row in rows]
    return rows[0].kind != CALL or all(groups.count(group) == group[0] for group in groups)


def _verdict(ranks: list[int], rows: list[_Row], told: list[tuple[str, str]]) -> str:
    """Who is where, fewest ranks first; with what else differs, if the place does not."""
    same_place = len({where for where, _ in told}) == 1
    places: dict[str, list[int]] = {}
    for rank, (where, details) in zip(ranks, told, strict=True):
        places.setdefault(f"{where} ({details})" if same_place else where, []).append(rank)
    found: list[str] = []
    for place, there in sorted(places.items(), key=lambda item: len(item[1])):
        verb = "" if found or place.startswith("failed") else "are " if len(there) > 1 else "is "
        found.append(f"{_ranks(there)} {verb}{place}")
    return (
        f"ranks differ at call {max(row.number for row in rows) + 1}: {', '.join(found)}; expected the same calls in the same "
        "order on every rank: look for a condition that depends on the rank or its data"
    )


def _ranks(ranks: Any) -> str:
    named = list(ranks)
    return f"rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"


def _digest(text: str) -> int:
    """63 bits of a hash, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
