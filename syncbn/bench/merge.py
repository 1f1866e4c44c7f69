"""`bench merge`: what a rank computes of the collective's result before it normalizes, by the number of ranks W.

torch.nn.SyncBatchNorm gathers W rows and merges them on each rank; syncbn's message is summed on the way and has one size. Only
this computation is measured, no collective: a gathered message of 4·W·(2C+1) bytes costs more on the wire too.

Requirements
    - torch's merge is its operator alone, with the boolean masks of its layer and without; ours is the whole of `normalize`, on
      one position, so that its share of the elementwise work counts against us;
    - mean and variance of every variant are those of all W rows in float64, or nothing is reported;
    - on the device: CALLS calls in a row behind a flush, by events, and in what share of the repetitions the host was ahead of
      all of them; by the clock: one call alone.

rows (W, 2C+1) float32 [mean, invstd, count] of each rank; message (2C+1,) float64 [S1, S2, n], their sum.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import kernels
from ..doctor.finding import table
from ..doctor.latency import timed
from ..kernels import Affine, Running
from . import counts, peers, rows, sync_operators
from .agreement import DisagreementError
from .device_time import Pass, clock
from .peers import TORCH_SYNC, available
from .rows import Row
from .run import say
from .timing import microseconds, order, quartiles

CALLS = 4  # more launches than the host can queue during a flush would be timed with gaps
EPS, MOMENTUM = 1e-5, 0.1
# Error of the mean, in standard deviations, and relative of invstd. Torch's operator adds row after row in float32.
ALLOWED, ALLOWED_OURS = 1e-4, 1e-7
UNMASKED = "torch-sync-unmasked"
OURS = ("syncbn", "syncbn-aten")
Merge = Callable[[], tuple[Tensor, Tensor]]  # gives mean and invstd (C,)


class Given(NamedTuple):
    """The statistics of W ranks, as torch gathers and as ours reduces them."""

    x: Tensor  # (1, C) what is normalized
    gathered: Tensor  # (W, 2C+1) float32
    message: Tensor  # (2C+1,) float64
    mean: Tensor  # (C,) float64, of all ranks
    invstd: Tensor


def run(options: argparse.Namespace) -> int:
    """Measure every W and C, print, append rows; the exit status."""
    device = torch.device(options.device)
    missing = sync_operators.missing(device)
    if missing is not None:
        return say(f"given --device {options.device}: {missing}, so there is no merge of it to measure; expected --device cuda")
    versions = rows.accelerator(device)
    names = [TORCH_SYNC, UNMASKED, *(name for name in OURS if available(name, device) is None)]
    sweep = [(ranks, channels) for channels in options.channels for ranks in options.ranks]
    measured: list[Row] = []
    for ranks, channels in tqdm(sweep, "merge", unit=" sizes", disable=None):
        measured += [row | versions for row in measure(names, ranks, channels, options.repeats, device)]
    print(shown(measured))
    print(rows.said(rows.append("merge", measured, options.results, options.device)))
    return 0


def given(ranks: int, channels: int, device: torch.device) -> Given:
    """Ranks with shares of 1 to 64 images of 7×7, whose means and variances differ."""
    generator = torch.Generator().manual_seed(0)
    count = 49.0 * torch.randint(1, 65, (ranks, 1), generator=generator)
    mean = torch.randn(ranks, channels, generator=generator)
    var = torch.rand(ranks, channels, generator=generator) + 0.5
    gathered = torch.cat([mean, (var + EPS).rsqrt(), count], 1)
    mean, n = gathered[:, :channels].double(), count.double()
    var = gathered[:, channels:-1].double().pow(-2) - EPS
    sums = [(n * mean).sum(0), (n * (var + mean.square())).sum(0), n.sum(0)]
    whole = sums[0] / n.sum()
    invstd = ((n * (var + (mean - whole).square())).sum(0) / n.sum() + EPS).rsqrt()
    x = torch.randn(1, channels, generator=generator)
    return Given(*(value.to(device) for value in (x, gathered, torch.cat(sums), whole, invstd)))


def merge_of(name: str, of: Given) -> Merge:
    """The variant's, which moves running statistics as well."""
    c = of.x.shape[1]
    mean, var = (of.x.new_full((c,), value) for value in (0.0, 1.0))
    if name in OURS:
        running = Running(mean, var, None, MOMENTUM)
        affine = Affine(of.x.new_ones(c), of.x.new_zeros(c), EPS)
        chosen = kernels.pick(of.x)

        def ours() -> tuple[Tensor, Tensor]:
            statistics = chosen.normalize(of.x, of.message, affine, running)[1].statistics
            return statistics[:c], statistics[c:-1]

        return ours

    def theirs() -> tuple[Tensor, Tensor]:
        parts: Sequence[Tensor] = of.gathered.split(c, dim=1)
        if name == TORCH_SYNC:
            mask = parts[2].squeeze(-1) >= 1
            parts = [part[mask] for part in parts]
        means, invstds, count = parts
        merged: tuple[Any, Any] = torch.batch_norm_gather_stats_with_counts(
            of.x, means, invstds, mean, var, MOMENTUM, EPS, count.view(-1)
        )
        return merged

    return theirs


def measure(names: Sequence[str], ranks: int, channels: int, repeats: int, device: torch.device) -> list[Row]:
    """A row for each variant.

    Raises:
        DisagreementError: a merge gives other statistics; nothing is reported.
    """
    of = given(ranks, channels, device)
    merges, seen = {}, {}
    for name in names:
        with peers.using(name):
            merges[name] = merge_of(name, of)
            allowed = ALLOWED_OURS if name in OURS else ALLOWED
            require(f"{name} of {ranks} ranks, {channels} channels", merges[name](), of, allowed)
            seen[name] = counts.of(merges[name], device)[0]
    on_device: dict[str, list[Pass]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    device_clock = clock(device)
    for repeat in range(-1, repeats):
        for name in order(names, repeat):
            merge = merges[name]
            with peers.using(name):
                seconds, _ = timed(merge, device)
                several_calls = device_clock(functools.partial(several, merge))
            if repeat >= 0:
                alone[name].append(seconds)
                on_device[name].append(several_calls)
    found = []
    for name in names:
        passes = on_device[name]
        of_one = quartiles([each.seconds / CALLS for each in passes])
        device_times = {f"device_{key}": value for key, value in microseconds(of_one, 2).items()}
        counted = seen[name]
        found.append(
            {
                "variant": name,
                "ranks": ranks,
                "channels": channels,
                "bytes": (of.message if name in OURS else of.gathered).nbytes,
                "device": device.type,
                **device_times,
                "host_ahead": round(sum(each.ahead for each in passes) / len(passes), 2),
                **microseconds(quartiles(alone[name])),
                **(dict.fromkeys(counts.Counts._fields, "") if counted is None else counted._asdict()),
                "repeats": repeats,
            }
        )
    return found


def several(merge: Merge) -> None:
    for _ in range(CALLS):
        merge()


def require(told: str, found: tuple[Tensor, Tensor], of: Given, allowed: float) -> None:
    """DisagreementError unless mean and invstd are those of all ranks."""
    for what, value, want in zip(("mean", "invstd"), found, (of.mean, of.invstd), strict=True):
        unit = 1 / of.invstd if what == "mean" else want
        error = float(((value.double() - want) / unit).abs().max())
        if not error <= allowed:
            raise DisagreementError(f"{told}: the {what} is off by {error:.1e}")


def shown(measured: Sequence[Row]) -> str:
    """Microseconds on the device by W, a line for each variant and C."""
    ranks = sorted({row["ranks"] for row in measured})
    lines: list[Sequence[object]] = [("channels", "variant", *(f"W={count}" for count in ranks), "waits")]
    for channels, name in dict.fromkeys((row["channels"], row["variant"]) for row in measured):
        of = {row["ranks"]: row for row in measured if (row["channels"], row["variant"]) == (channels, name)}
        cells = [f"{of[count]['device_microseconds_median']:.2f}" if count in of else "-" for count in ranks]
        lines.append((channels, name, *cells, next(iter(of.values()))["host_synchronizations"]))
    behind = sorted({row["variant"] for row in measured if row["host_ahead"] < 1})
    late = (
        f"; gaps between launches count for {', '.join(behind)}, which the host did not always queue in time" if behind else ""
    )
    return (
        table(lines) + f"\n\nmicroseconds a call on the device, of {CALLS} in a row{late}; rows have one call by the clock too"
    )
