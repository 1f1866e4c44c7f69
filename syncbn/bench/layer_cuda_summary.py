"""What `bench layer --device cuda` prints of its rows: ratios, fractions of a copy, targets, and what is lost."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..doctor.finding import table
from .timing import geometric_mean

Row = Mapping[str, Any]
KEYS = ("variant", "dtype", "layout")
TARGETS = {"forward": 0.85, "backward": 0.75}  # of the bandwidth of a copy
LARGE = 25_000_000  # bytes of a tensor: below, latency decides, not bandwidth
SMALL = 10_000_000  # below, a row of layers is measured as a graph too
# How many times as fast as torch-sync, and for which tensors.
FASTER = {f"under {SMALL / 1e6:g} MB": (0, SMALL, 3.0), "of 50 MB and more": (50_000_000, float("inf"), 1.5)}
CLOCKS = {
    "a layer alone, by the clock": "over_torch_sync",
    "a layer of several in a row, by the clock": "chain_over_torch_sync",
    "on the device": "device_over_torch_sync",
}
OURS = ("syncbn", "syncbn-host")
SHOWN = 10  # lost cases that are named


def summary(measured: Sequence[Row]) -> str:
    """Of one run."""
    names = [name for name in OURS if name == OURS[0] or any(row["variant"] == name for row in measured)]
    told = [line for name in names for lines in (targets, faster, lost) for line in lines(measured, name)]
    return "\n\n".join([_table(measured), "\n".join(told)])


def _table(measured: Sequence[Row]) -> str:
    """Geometric means over the shapes; fractions of a copy are medians over large tensors; counts from least to most."""
    heading = (*KEYS, "over torch", "worst", "over torch-sync", "worst", "forward", "backward", "launches", "waits", "memory")
    lines: list[Sequence[object]] = [heading]
    for key in dict.fromkeys(tuple(row[name] for name in KEYS) for row in measured):
        of = [row for row in measured if tuple(row[name] for name in KEYS) == key]
        large = [row for row in of if row["bytes"] >= LARGE]
        cells = [*_means(of, "ratio"), *_means(of, "over_torch_sync")]
        cells += [_one(large, f"{part}_of_copy", statistics.median) for part in TARGETS]
        cells += [_span(of, "launches"), _span(of, "host_synchronizations"), _one(of, "peak_over_torch", geometric_mean)]
        lines.append((*key, *cells))
    return table(lines) + (
        "\n\nover torch, over torch-sync: a step by the clock; forward, backward: fraction of the bandwidth of a copy, on the "
        f"device from a flushed L2, tensors of {LARGE / 1e6:g} MB and more"
    )


def _values(of: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in of if row[name] != ""]


def _one(of: Sequence[Row], name: str, mean: Callable[[list[float]], float]) -> str:
    values = _values(of, name)
    return f"{mean(values):.2f}" if values and min(values) > 0 else "-"


def _means(of: Sequence[Row], name: str) -> list[str]:
    return [_one(of, name, geometric_mean), _one(of, name, max)]


def _span(of: Sequence[Row], name: str) -> str:
    values = _values(of, name)
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def targets(measured: Sequence[Row], ours: str = OURS[0]) -> list[str]:
    """One line for each pass, dtype and layout of ours: how many of the large tensors reach the target."""
    told = []
    large = [row for row in measured if row["variant"] == ours and row["bytes"] >= LARGE]
    for dtype, layout in dict.fromkeys((row["dtype"], row["layout"]) for row in large):
        of = [row for row in large if (row["dtype"], row["layout"]) == (dtype, layout)]
        for part, target in TARGETS.items():
            reached = [float(row[f"{part}_of_copy"]) for row in of]
            enough = sum(one >= target for one in reached)
            least = min(of, key=lambda row: float(row[f"{part}_of_copy"]))
            told.append(
                f"{'ok  ' if enough == len(of) else 'BAD '} {ours}, {dtype}, {layout}, {part}: {enough} of {len(of)} tensors "
                f"of {LARGE / 1e6:g} MB and more have {target:.0%} of the bandwidth of a copy; least {min(reached):.0%}, "
                f"{least['shape']}"
            )
    return told or [f"no tensor of {LARGE / 1e6:g} MB or more was measured with {ours}: nothing is said of the targets"]


def faster(measured: Sequence[Row], ours: str = OURS[0]) -> list[str]:
    """How many times as fast as torch-sync ours is, by each clock; and a graph of ours, of which torch-sync has none."""
    told = []
    for tensors, (least, most, target) in FASTER.items():
        of = [row for row in measured if row["variant"] == ours and least <= row["bytes"] < most]
        for clock, column in CLOCKS.items():
            times = [1 / value for value in _values(of, column)]
            if times:
                enough = sum(one >= target for one in times)
                told.append(
                    f"{'ok  ' if enough == len(times) else 'BAD '} {ours}, tensors {tensors}, {clock}: {min(times):.2f} to "
                    f"{max(times):.2f} times as fast as torch-sync, median {statistics.median(times):.2f}; {enough} of "
                    f"{len(times)} reach {target:g}"
                )
    replayed = [row for row in measured if row["variant"] == ours and row["replay_microseconds_median"] != ""]
    if replayed:
        median = statistics.median(_values(replayed, "replay_microseconds_median"))
        eager = statistics.median(_values(replayed, "chain_microseconds_median"))
        told.append(f"     {ours}, replayed as a graph: {median:.1f} microseconds a layer, launch by launch {eager:.1f}")
    return told


def lost(measured: Sequence[Row], ours: str = OURS[0]) -> list[str]:
    """The cases in which ours is slower, the worst first."""
    told = []
    for base, column in (("torch's local batch norm", "ratio"), ("torch-sync", "over_torch_sync")):
        of = [row for row in measured if row["variant"] == ours and row[column] != ""]
        slower = sorted((row for row in of if float(row[column]) > 1), key=lambda row: -float(row[column]))
        told.append(f"{ours} is slower than {base}, by the clock, in {len(slower)} of {len(of)} cases")
        named = [f"  {row['dtype']}, {row['layout']}, {row['shape']}: {float(row[column]):.2f}" for row in slower[:SHOWN]]
        told += named + ([f"  and {len(slower) - SHOWN} more"] if len(slower) > SHOWN else [])
    return told
