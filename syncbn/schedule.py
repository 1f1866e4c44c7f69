"""The calls of the layers in a step, which is the same in all steps of a context: what the ranks that are out of data follow.

Requirements
    - recorded by the ranks with data in their first step, and checked in every other;
    - published as they come: a rank that never had data follows the first step too.
"""

import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from . import collectives
from .collectives import CollectiveError
from .observing import Call


class Entry(NamedTuple):
    """A collective of a layer, as the ranks that are out of data have to know it."""

    size: int  # of the message, float64
    moves: int | None  # the layer whose running statistics it moves, by its place in the model
    phase: str
    layer: str  # its name


class Schedule:
    """Sees all calls of the layers in a context: those of its first step, recorded and published, and checked from then on."""

    def __init__(self, store: Any, context: int, layers: list[Any], is_on: Callable[[], bool]) -> None:
        self.store = store
        self.context = context
        self.is_on = is_on  # whether Join is: Join(..., enable=False) makes contexts too
        self.places = {layer: place for place, layer in enumerate(layers)}
        self.words = 0  # published, or read
        self.entries: list[Entry] = []
        self.whole = False  # a step is recorded
        self.at: int | None = None  # calls made in this step; None: this rank has had no data

    def begin(self, problem: ValueError | None) -> None:
        """A forward of the wrapped model starts. In the first step the ranks that are out of data raise its problem too."""
        if self.at is None:
            self._publish(problem)
        if problem is not None:
            raise problem
        self.end()
        if self.whole and self.at != len(self.entries):
            raise self._error(f"a forward after {self.at} calls of a step")
        self.at = 0

    def end(self) -> None:
        """The step is over, if there was one: what was recorded is the schedule."""
        if self.at is not None and not self.whole:
            self._publish(None)
            self.whole = True

    def before(self, call: Call, local: Tensor) -> None:
        if not self.is_on():
            return
        moving = call.phase == "forward" and call.sums
        moves = self.places.get(call.forward.layer) if moving else None
        entry = Entry(local.numel(), moves, call.phase, call.layer)
        given = f"{entry.phase} of layer {entry.layer!r} with {entry.size} values"
        if self.at is None:
            raise self._error(f"{given} before a forward of the wrapped model")
        if not self.whole:
            self._publish(entry)
            self.entries.append(entry)
        elif self.at == len(self.entries) or entry[:2] != self.entries[self.at][:2]:
            raise self._error(f"{given} as call {self.at + 1} of a step")
        self.at += 1

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None: ...

    def failed(self, call: Call, error: BaseException) -> None: ...

    def _error(self, given: str) -> CollectiveError:
        rank, size = collectives.rank_and_size()
        expected = self.entries[self.at] if self.at is not None and self.at < len(self.entries) else None
        wanted = f"{expected.phase} of layer {expected.layer!r}, {expected.size} values" if expected else "the next forward"
        return CollectiveError(
            f"given {given} on rank {rank} of {size}; expected {wanted}, as in the first step: SyncBatchNormJoin takes "
            "one order of calls only, use syncbn.even_steps"
        )

    def _publish(self, word: Any) -> None:
        self.store.set(f"{self.context}/{self.words}", pickle.dumps(word))
        self.words += 1

    def read(self, seconds: float) -> Any:
        """The next word of the ranks that have data; raised if it is their problem."""
        key, end = f"{self.context}/{self.words}", time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise CollectiveError(f"no word from the ranks that have data within {seconds:g} s; expected their calls")
            time.sleep(0.001)
        self.words += 1
        word = pickle.loads(self.store.get(key))
        if isinstance(word, ValueError):
            raise word
        return word

    def follow(self, seconds: float) -> Iterator[Entry]:
        """The calls of a first step that other ranks are in, as they come."""
        while (entry := self.read(seconds)) is not None:
            self.entries.append(entry)
            yield entry
        self.whole = True
