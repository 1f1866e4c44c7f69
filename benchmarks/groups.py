"""What a group costs: the two collectives of a layer, by the size of the group, on one machine with Gloo.

    python benchmarks/groups.py [--world-size 4] [--channels 64 512 2048] [--repeats 200] [--timeout 300]

Every group of the world runs at the same time, as in training. Prints medians with quartiles and appends them to
results/groups.csv.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.distributed as dist

from syncbn import collectives
from syncbn.bench import processes, rows
from syncbn.collectives import Call, Group
from syncbn.options import positive, whole


def measure(rank: int, world_size: int, channels: list[int], repeats: int) -> list[tuple[int, int, list[float]]]:
    """By group size and channels, interleaved, the microseconds of a forward and a backward message."""
    groups = {size: Group(group_size=size).resolve() for size in range(2, world_size + 1) if world_size % size == 0}
    taken: dict[tuple[int, int], list[float]] = {}
    for _ in range(repeats):
        for size, group in groups.items():
            for count in channels:
                call = Call("benchmark", "forward", count, torch.float32, group)
                forward, backward = (torch.zeros(n, dtype=torch.float64) for n in (2 * count + 1, 2 * count))
                dist.barrier()
                start = time.perf_counter()
                collectives.all_reduce(forward, call)
                collectives.all_reduce(backward, call)
                taken.setdefault((size, count), []).append((time.perf_counter() - start) * 1e6)
    return [(size, count, microseconds) for (size, count), microseconds in taken.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=whole(2), default=4)
    parser.add_argument("--channels", type=whole(1), nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=whole(2), default=200)
    parser.add_argument("--timeout", type=positive, default=300.0, help="seconds")
    options = parser.parse_args()
    arguments = {"channels": options.channels, "repeats": options.repeats}
    try:
        answers = processes.run("groups:measure", arguments, options.world_size, options.timeout)
    except processes.ProcessError as error:
        print(f"nothing is reported: {error}", file=sys.stderr)
        return 1
    measured = []
    for size, channels, microseconds in answers[0]:
        low, middle, high = statistics.quantiles(microseconds, n=4)
        measured.append(
            {
                "world_size": options.world_size,
                "group_size": size,
                "channels": channels,
                "microseconds_median": round(middle),
                "microseconds_lower_quartile": round(low),
                "microseconds_upper_quartile": round(high),
                "repeats": options.repeats,
            }
        )
        print(f"group of {size}, {channels:5d} channels: {middle:6.0f} µs forward and backward ({low:.0f} to {high:.0f})")
    print(rows.said(rows.append("groups", measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
