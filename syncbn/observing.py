"""Who sees the collectives of layers, and what is kept of them for recomputations.

Requirements: observers see every call, and cost nothing when there are none; contexts may be left in any order, and in another
thread or task than they were entered in, which all that copied their context then see too.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a collective is for, as observers and error messages see it."""

    layer: str
    phase: str  # "forward", "backward", or "recompute": a forward inside a backward, as activation checkpointing runs it;
    # "control" for what is no layer's
    channels: int
    dtype: torch.dtype  # of the layer's input
    group: Any  # a ProcessGroup; None: this process is alone
    sums: bool = True  # the message is [S1, S2, n] or [G1, G2]; False: a derivative of them
    forward: Any = None  # the function.Forward it belongs to, if it was observed; None for what is no layer's

    def backward(self) -> "Call":
        """That of the same layer's backward."""
        return Call(self.layer, "backward", self.channels, self.dtype, self.group, self.sums, self.forward)


class Observer(Protocol):
    """Sees each collective of each layer run inside `observe`. Messages are not to be written to."""

    def before(self, call: Call, local: Tensor) -> bool | None:
        """True asks that the running statistics be held still in this call."""

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None: ...

    def failed(self, call: Call, error: BaseException) -> None: ...


class Recording(Protocol):
    """Keeps the reduced messages of forwards, and gives them to a recomputation of the same calls."""

    def take(self, call: Call, size: int) -> Tensor | None:
        """What the call had in the forward: no collective is issued; None: it is issued."""

    def add(self, call: Call, reduced: Tensor) -> None: ...


# The observer of a group: it sees all its calls, in any thread and in a backward too, and goes when nobody else holds it.
watchers: weakref.WeakValueDictionary[Any, Observer] = weakref.WeakValueDictionary()
_watched: dict[Any, Any] = vars(watchers)["data"]  # what it holds: to see that it is empty needs no call
_observed_alone: weakref.WeakSet[Any] = weakref.WeakSet()  # layers whose last forward was, in a process that is alone
# Lists of one, which is emptied at the end of its context.
_observers: ContextVar[tuple[list[Observer], ...]] = ContextVar("syncbn_observers", default=())
_recordings: ContextVar[tuple[list[Recording], ...]] = ContextVar("syncbn_recordings", default=())


def observers() -> tuple[Observer, ...]:
    """The observers of this context; compiled code has none. A backward uses its forward's: it may run in another thread."""
    return tuple(itertools.chain.from_iterable(entered)) if (entered := _observers.get()) else ()


def observed(group: Any) -> bool:
    """Whether anyone sees a call over the group that starts now, or keeps its message."""
    return any(_observers.get()) or any(_recordings.get()) or watcher(group) is not None


def observed_in_forward(layer: Any, observed: bool, recomputing: bool) -> bool:
    """Whether a forward in a process that is alone is observed, or the one that a recomputation repeats, which saves the same.

    A recomputation may run in another thread, or behind the end of the observer's context. Of forwards that wait for their
    backward the last one counts; a layer of None has none.
    """
    if layer is None:
        return observed
    if recomputing:
        return layer in _observed_alone
    if observed:
        _observed_alone.add(layer)
    elif _observed_alone:
        _observed_alone.discard(layer)
    return observed


@contextlib.contextmanager
def forwards_apart(layers: Iterable[Any]) -> Iterator[None]:
    """Forwards of the layers inside are none that a backward behind it repeats: see `observed_in_forward`."""
    before = [(layer, layer in _observed_alone) for layer in layers]
    try:
        yield
    finally:
        for layer, observed in before:
            (_observed_alone.add if observed else _observed_alone.discard)(layer)


def watcher(group: Any) -> Observer | None:
    """The observer of a group, if it has one."""
    return watchers.get(group) if _watched else None


def observe(observer: Observer) -> AbstractContextManager[None]:
    """Show `observer` every collective whose forward runs inside, in this context only."""
    return _among(_observers, observer)


@contextlib.contextmanager
def hidden_from(kind: type[Any]) -> Iterator[None]:
    """Show observers of a class nothing of what runs inside."""
    before = _observers.get()
    _observers.set(tuple(entered for entered in before if not any(isinstance(one, kind) for one in entered)))
    try:
        yield
    finally:
        _observers.set(before)


def recorded(recording: Recording) -> AbstractContextManager[None]:
    """Show `recording` every collective of a forward that runs inside, in this context only."""
    return _among(_recordings, recording)


def recordings() -> tuple[Recording, ...]:
    """What records the forwards of this context."""
    return tuple(itertools.chain.from_iterable(entered)) if (entered := _recordings.get()) else ()


@contextlib.contextmanager
def _among(variable: ContextVar[Any], one: Any) -> Iterator[None]:
    """`one` is among the values inside."""
    entered = [one]
    variable.set((*variable.get(), entered))
    try:
        yield
    finally:
        entered.clear()
        variable.set(tuple(filter(None, variable.get())))
