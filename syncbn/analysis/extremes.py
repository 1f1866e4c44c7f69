"""The greatest, the least and the middle of numbers, of which one that is not a number is not passed over.

`max`, `min` and `statistics.median` compare: what they make of a NaN depends on the order.
"""

import math
import statistics
from collections.abc import Iterable


def greatest(values: Iterable[float]) -> float:
    """NaN where one is, or where there is none: a claim on it does not hold."""
    known = list(values)
    return max(known) if _are_numbers(known) else math.nan


def least(values: Iterable[float]) -> float:
    """As `greatest`."""
    return -greatest(-value for value in values)


def median(values: Iterable[float]) -> float:
    """As `greatest`."""
    known = list(values)
    return statistics.median(known) if _are_numbers(known) else math.nan


def _are_numbers(values: list[float]) -> bool:
    return bool(values) and not any(math.isnan(value) for value in values)
