"""What a collective takes on its own: ranks meet, then each has it at once.

all_reduce goes through the seam that the layers use. all_gather of the same message from each rank, which syncbn does not use,
is here for comparison alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import collectives
from ..collectives import Call
from ..doctor.latency import meet, timed

OPERATIONS = ("all_reduce", "all_gather")
WARM_UP = 3


def measure(
    rank: int, world_size: int, values: Sequence[int], operations: Sequence[str], repeats: int, device: str
) -> list[dict[str, Any]]:
    """For each operation and number of float64 values: this rank's seconds, and whether every result was right."""
    on = torch.device(device)
    world = dist.group.WORLD
    found: list[dict[str, Any]] = [
        {"operation": operation, "values": count, "seconds": [], "right": True} for operation in operations for count in values
    ]
    for repeat in range(-WARM_UP, repeats):
        for one in found:
            message = torch.full((one["values"],), rank + 1.0, dtype=torch.float64, device=on)
            run = _run(one["operation"], message, world, world_size)
            meet(world, on)
            seconds, result = timed(run, on)
            if repeat >= 0:
                one["seconds"].append(seconds)
            else:
                total = torch.stack(result).sum(0)
                one["right"] = one["right"] and bool((total == world_size * (world_size + 1) / 2).all())
    return found


def _run(operation: str, message: Tensor, world: Any, world_size: int) -> Callable[[], list[Tensor]]:
    """Gives tensors whose sum is that of all ranks' messages."""
    if operation == "all_reduce":
        return functools.partial(_reduce, message, Call("bench", "control", 0, torch.float64, world))
    return functools.partial(_gather, message, [torch.empty_like(message) for _ in range(world_size)])


def _reduce(message: Tensor, call: Call) -> list[Tensor]:
    return [collectives.all_reduce(message, call).message]


def _gather(message: Tensor, into: list[Tensor]) -> list[Tensor]:
    dist.all_gather(into, message)
    return into


def slowest(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each repetition the time of the slowest rank: nobody goes on before."""
    merged = []
    for of in zip(*ranks, strict=True):
        seconds = [max(times) for times in zip(*(one["seconds"] for one in of), strict=True)]
        merged.append({**of[0], "seconds": seconds, "right": all(one["right"] for one in of)})
    return merged
