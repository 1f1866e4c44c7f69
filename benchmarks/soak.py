"""A long run of a small network: what grows, and whether ranks stay the same to the bit.

    python benchmarks/soak.py [--steps 10000] [--world-size 2] [--checked] [--timeout 1800]

Each rank trains a network with two batch norm layers in DistributedDataParallel on shares that change their size at each step,
empty ones included. Open files, threads and resident memory are read after a tenth of the steps and at the end. Prints them and
appends rows to results/soak.csv; exits 1 if files or threads grew, memory grew by more than 1 MiB, or ranks differ in a bit.
"""

import argparse
import contextlib
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.bench import processes, rows
from syncbn.options import positive, whole

LIMIT = 2**20  # bytes


def figures() -> tuple[int, int, int]:
    """Open files, threads, resident bytes of this process."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident


def soak(rank: int, world_size: int, steps: int, checked: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    ddp = DistributedDataParallel(syncbn.convert(model))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    before, start = figures(), time.perf_counter()
    with syncbn.checked(ddp) if checked else contextlib.nullcontext():
        for step in range(steps):
            if step == steps // 10:
                before = figures()
            x = torch.randn((step + 2 * rank) % 5, 6, generator=generator) * 3 + rank
            optimizer.zero_grad()
            ddp(x).square().sum().backward()
            optimizer.step()
    seconds, after = time.perf_counter() - start, figures()
    state = torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])
    states = [torch.zeros_like(state) for _ in range(world_size)]
    dist.all_gather(states, state)
    same = all(torch.equal(state, other) for other in states)
    return {"seconds": seconds, "before": before, "after": after, "same": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(1), default=10_000)
    parser.add_argument("--world-size", type=whole(1), default=2)
    parser.add_argument("--checked", action="store_true", help="in checked mode")
    parser.add_argument("--timeout", type=positive, default=1800.0, help="seconds")
    options = parser.parse_args()
    arguments = {"steps": options.steps, "checked": options.checked}
    try:
        answers = processes.run("soak:soak", arguments, options.world_size, options.timeout)
    except processes.ProcessError as error:
        print(f"nothing is reported: {error}", file=sys.stderr)
        return 1
    measured, good = [], True
    for rank, answer in enumerate(answers):
        seconds, before, after, same = (answer[name] for name in ("seconds", "before", "after", "same"))
        row = {"rank": rank, "world_size": options.world_size, "steps": options.steps, "checked": options.checked}
        row |= {"seconds": round(seconds, 1), "files_before": before[0], "files_after": after[0]}
        row |= {"threads_before": before[1], "threads_after": after[1], "resident_growth_bytes": after[2] - before[2]}
        measured.append(row | {"same_bits_on_all_ranks": same})
        good = good and same and after[:2] == before[:2] and after[2] - before[2] <= LIMIT
        print(
            f"rank {rank}: {options.steps} steps in {seconds:.0f} s; after a tenth and at the end {before[0]} and {after[0]} "
            f"files, {before[1]} and {after[1]} threads, memory {after[2] - before[2]:+,} bytes; same bits on all ranks: {same}"
        )
    print(rows.said(rows.append("soak", measured)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
