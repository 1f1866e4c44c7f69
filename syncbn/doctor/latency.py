"""What a layer's two collectives take here, by channels and by the size of the group, and whether they sum."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from .. import collectives
from ..collectives import Call, Group
from ..control import listed
from .finding import Finding, table

SIZES = (64, 128, 256, 512, 1024, 2048)
WARM_UP = 3
Result = TypeVar("Result")


class Key(NamedTuple):
    group_size: int
    channels: int


class Taken(NamedTuple):
    """Seconds, one for each repetition."""

    forward: list[float]  # of 2C+1 float64
    backward: list[float]  # of 2C


class Measured(NamedTuple):
    """Of one rank, or of all."""

    taken: dict[Key, Taken]
    wrong: list[Key]  # whose sums are not what they must be


def group_sizes(world_size: int) -> list[int]:
    """Of more than one rank, those that divide the world, the whole world last."""
    return [size for size in range(2, world_size + 1) if world_size % size == 0]


def measure(world_size: int, channels: Sequence[int], repeats: int, device: torch.device) -> Measured:
    """Every rank comes; groups of a size run at the same time, as in training."""
    measured = Measured({}, [])
    if world_size == 1:
        return measured
    groups = {size: Group(group_size=size).resolve() for size in group_sizes(world_size)}
    for repeat in range(-WARM_UP, repeats):
        for size, group in groups.items():
            assert group is not None
            for count in channels:
                seconds = []
                for length, phase in ((2 * count + 1, "forward"), (2 * count, "backward")):
                    call = Call("doctor", phase, count, torch.float64, group)
                    meet(groups[world_size], device)
                    message = torch.full((length,), group.rank() + 1.0, dtype=torch.float64, device=device)
                    taken, reduced = timed(functools.partial(collectives.all_reduce, message, call), device)
                    seconds.append(taken)
                    if repeat < 0 and bool((reduced.message != size * (size + 1) / 2).any()):
                        measured.wrong.append(Key(size, count))
                if repeat >= 0:
                    for times, one in zip(measured.taken.setdefault(Key(size, count), Taken([], [])), seconds, strict=True):
                        times.append(one)
    return measured


def meet(world: collectives.ProcessGroup | None, device: torch.device) -> None:
    """So that what is measured next is no waiting for a late rank."""
    message = torch.zeros(1, dtype=torch.float64, device=device)
    collectives.all_reduce(message, Call("doctor", "control", 0, torch.float64, world))


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """The seconds that it takes, on the device too, and what it gives."""
    _finish(device)
    start = time.perf_counter()
    result = run()
    _finish(device)
    return time.perf_counter() - start, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(ranks: Sequence[Measured]) -> dict[Key, Taken]:
    """By repetition the time of the slowest rank: nobody goes on before."""
    merged = {}
    for key in ranks[0].taken:
        sides = [
            [max(of) for of in zip(*(getattr(one.taken[key], side) for one in ranks), strict=True)] for side in Taken._fields
        ]
        merged[key] = Taken(*sides)
    return merged


def cost(taken: Mapping[Key, Taken], group_size: int, channels: int, phase: str) -> float:
    """The median seconds of a collective; none for a group of one."""
    if group_size == 1:
        return 0.0
    times = taken[Key(group_size, channels)]
    return statistics.median(times.backward if phase == "backward" else times.forward)


def shown(taken: Mapping[Key, Taken], device: torch.device) -> str:
    """Microseconds of each group size; nothing for a process that is alone."""
    rows: list[Sequence[object]] = [("group of", "channels", "forward 2C+1", "backward 2C")]
    for (size, channels), times in sorted(taken.items(), key=lambda item: (-item[0].group_size, item[0].channels)):
        rows.append((size, channels, *(_microseconds(side) for side in times)))
    heading = f"all_reduce of float64 on {device.type}: median microseconds (quartiles) of the slowest rank"
    return f"{heading}\n\n{table(rows)}" if taken else ""


def _microseconds(seconds: Sequence[float]) -> str:
    low, middle, high = (1e6 * value for value in statistics.quantiles(seconds, n=4, method="inclusive"))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def judge(ranks: Sequence[Measured]) -> list[Finding]:
    """Whether every all_reduce was the sum."""
    if len(ranks) == 1:
        return [
            Finding("a single process, whose layers issue no collective", "start it under torchrun to examine them", note=True)
        ]
    wrong = [rank for rank, measured in enumerate(ranks) if measured.wrong]
    if not wrong:
        return [Finding("all_reduce gives the sum, in groups of every size")]
    first = min(key for rank in wrong for key in ranks[rank].wrong)
    where = f"{listed(wrong)}, first in groups of {first.group_size} at {first.channels} channels"
    return [
        Finding(
            f"all_reduce does not give the sum on {where}",
            "nothing trained over this backend is right: try another backend or version of torch",
        )
    ]
