"""What a group costs: the two collectives of a layer, by the size of the group, on one machine with Gloo.

    python benchmarks/groups.py [--world-size 4] [--channels 64 512 2048] [--repeats 200]

Every group of the world runs at the same time, as in training. Prints medians with quartiles and appends them to
results/groups.csv.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

from syncbn import collectives
from syncbn.bench import rows
from syncbn.collectives import Call, Group


def measure(rank: int, world_size: int, store: str, channels: list[int], repeats: int, answers) -> None:
    """The microseconds of a forward and a backward message, interleaved over the group sizes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
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
    if rank == 0:
        answers.put(taken)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (options.world_size, f"{directory}/store", options.channels, options.repeats, answers)
        torch.multiprocessing.spawn(measure, arguments, nprocs=options.world_size)
    measured = []
    for (size, channels), microseconds in answers.get().items():
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


if __name__ == "__main__":
    main()
