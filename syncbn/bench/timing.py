"""Interleaved runs, their medians and quartiles."""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..doctor.latency import timed


class Quartiles(NamedTuple):
    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of one value or more."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(times: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Of the ratios of neighbours in time."""
    return quartiles([one / other for one, other in zip(times, base, strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def order(names: Sequence[str], repeat: int) -> list[str]:
    """The names in an order of the repetition's own, so that no one always follows the same."""
    return random.Random(repeat).sample(names, len(names))


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each run: all of them in turn, again and again; the same number of values for each name."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warm_up, repeats):
        for name in order(list(runs), repeat):
            seconds, _ = timed(runs[name], device)
            if repeat >= 0:
                taken[name].append(seconds)
    return taken


def microseconds(times: Quartiles, digits: int = 1) -> dict[str, float]:
    """The columns of a row."""
    return {
        "microseconds_median": round(1e6 * times.median, digits),
        "microseconds_lower_quartile": round(1e6 * times.lower, digits),
        "microseconds_upper_quartile": round(1e6 * times.upper, digits),
    }


def columns(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Those of a row: microseconds, and the ratio over a base."""
    over = ratio(times, base)
    return microseconds(quartiles(times)) | {
        "ratio": round(over.median, 3),
        "ratio_lower_quartile": round(over.lower, 3),
        "ratio_upper_quartile": round(over.upper, 3),
    }
