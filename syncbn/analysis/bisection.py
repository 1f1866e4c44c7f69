"""The zero of a function that is negative on the left: what gives a direction its best length."""

import math
from collections.abc import Callable
from typing import NamedTuple

DOUBLINGS = 60


class Bracket(NamedTuple):
    """Where the sign changes."""

    low: float  # slope(low) < 0, before halving
    high: float  # slope(high) > 0
    root: float  # the middle of what halving leaves

    @property
    def width(self) -> float:
        return self.high - self.low


def bisect(slope: Callable[[float], float], halvings: int, from_zero: bool = False) -> Bracket | None:
    """The sign change of `slope` from − to +, by `halvings` halvings of a bracket.

    The bracket is [−1, 1], each end doubled until it has its sign, 60 times at most; None if there is none: the minimum along
    the line is at infinity. With `from_zero`, one end is 0 and the other where the function falls, for one with several minima.
    """
    low, high = -1.0, 1.0
    if from_zero:
        at_zero = slope(0.0)
        low, high = (0.0, 1.0) if at_zero < 0 else (-1.0, 0.0)
    found = _doubled(lambda x: slope(x) < 0, low), _doubled(lambda x: slope(x) > 0, high)
    if math.inf in found:
        return None
    a, b = low, high = found
    for _ in range(halvings):
        middle = (a + b) / 2
        if slope(middle) < 0:
            a = middle
        else:
            b = middle
    return Bracket(low, high, (a + b) / 2)


def _doubled(right: Callable[[float], bool], end: float) -> float:
    """The end, doubled until it is right; 0 is taken as it is; infinite if it never is."""
    if end == 0:
        return end
    for _ in range(DOUBLINGS):
        if right(end):
            return end
        end *= 2
    return math.inf
