"""A group of its own for batch norm: its backward beside gradient buckets, over a slow link.

    python benchmarks/own_group.py [--rate 1gbit] [--queue 200ms] [--repeats 10]                (Linux, as root)

Two ranks in two network namespaces, between them a link that tc's tbf throttles to `--rate` in each direction. A network whose
large layers come last, so that their gradients are on the link while the backward of its batch norm layers goes on, trains in
DistributedDataParallel: batch norm local (torch's), on the default group, and on a group of its own. The three take turns in
one set of processes. Prints the time of a step and of it in the layers' collectives, and appends rows to results/own_group.csv;
refuses where gradients are not those of one process with the whole batch.

Where namespaces cannot be made, or with `--link delayed`, both ranks are on one machine and each collective of a layer starts
`--delay` later: that stands for the latency of a link, not for its bandwidth, and rows say so.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import syncbn
from syncbn import collectives, observing
from syncbn.bench import namespaces, processes, rows, step
from syncbn.bench.network import data_parallel
from syncbn.bench.timing import Quartiles, order, quartiles, ratio
from syncbn.doctor.latency import meet, timed
from syncbn.doctor.model import Stopwatch
from syncbn.options import positive, whole

CPU = torch.device("cpu")
LOCAL, DEFAULT, OWN = "none, local batch norm", "default", "own"
WARM_UP = 2


def network(layers: int, linear: int, hidden: int) -> nn.Module:
    """(N, 3, 64, 64) → (N, 100): small convolutions with batch norm, then large linear layers."""
    made: list[nn.Module] = []
    inputs = 3
    for number in range(layers):
        made += [nn.Conv2d(inputs, 32, 3, 2 if number < 2 else 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        inputs = 32
    made += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, hidden), nn.ReLU()]
    for _ in range(linear):
        made += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*made, nn.Linear(hidden, step.CLASSES))


@contextlib.contextmanager
def delayed(milliseconds: float) -> Iterator[None]:
    """Every collective of a layer starts that much later, below the seam: observers count it."""
    real = collectives._all_reduce

    def late(message: torch.Tensor, call: Any) -> torch.Tensor:
        if call.phase != "control":
            time.sleep(milliseconds / 1e3)
        return real(message, call)

    with mock.patch.object(collectives, "_all_reduce", late):
        yield


def measure(rank: int, world_size: int, delay: float, **arguments: int) -> dict[str, Any]:
    """On each rank, with a delay in milliseconds."""
    with delayed(delay) if delay else contextlib.nullcontext():
        return steps(rank, world_size, **arguments)


def steps(rank: int, world_size: int, images: int, layers: int, linear: int, hidden: int, repeats: int) -> dict[str, Any]:
    """The seconds of each step and of it in the layers' collectives, or the problem that the check found."""
    torch.manual_seed(0)
    initial = network(layers, linear, hidden)
    x, target = step.batch(images * world_size)
    mine = slice(rank * images, (rank + 1) * images)
    made = {
        LOCAL: copy.deepcopy(initial),
        DEFAULT: syncbn.convert(copy.deepcopy(initial)),
        OWN: syncbn.convert(copy.deepcopy(initial), dist.new_group()),
    }
    models = {name: data_parallel(model) for name, model in made.items()}
    watch, taken, inside = Stopwatch(CPU), {name: [] for name in models}, {name: [] for name in models}

    def run(model: nn.Module) -> None:
        model.zero_grad(set_to_none=False)
        with observing.observe(watch):
            y = model(x[mine])
        F.cross_entropy(y, target[mine]).backward()

    for model in models.values():
        run(model)
    synchronized = {name: model for name, model in models.items() if name != LOCAL}
    problem = step.check(initial, synchronized, x, target) if rank == 0 else ""
    for repeat in tqdm(range(-WARM_UP, repeats), "steps", unit=" rounds", disable=None if rank == 0 else True):
        for name in order(list(models), repeat):
            watch.marks.clear()
            meet(dist.group.WORLD, CPU)
            seconds, _ = timed(lambda model=models[name]: run(model), CPU)
            if repeat >= 0:
                taken[name].append(seconds)
                inside[name].append(watch.seconds())
    return {"problem": problem, "taken": taken, "inside": inside, "parameters": sum(p.numel() for p in initial.parameters())}


def report(answers: list[dict[str, Any]], link: dict[str, str], options: argparse.Namespace) -> list[rows.Row]:
    """A row for each group."""
    taken = {
        name: [max(pair) for pair in zip(*(a["taken"][name] for a in answers), strict=True)] for name in (LOCAL, DEFAULT, OWN)
    }
    found = []
    for name, seconds in taken.items():
        times, over = Quartiles(*(1e3 * value for value in quartiles(seconds))), ratio(seconds, taken[DEFAULT])
        inside = 1e3 * max(statistics.median(answer["inside"][name]) for answer in answers)
        print(
            f"group {name}: {times.median:.0f} ms a step ({times.lower:.0f} to {times.upper:.0f}), {inside:.0f} ms of it "
            f"in the layers' collectives; over the default group's {over.median:.2f} ({over.lower:.2f} to {over.upper:.2f})"
        )
        found.append(
            {
                "group": name,
                "world_size": 2,
                **link,
                "batch_norm_layers": options.layers,
                "gradient_megabytes": round(4e-6 * answers[0]["parameters"], 1),
                "images_per_rank": options.images,
                **{f"milliseconds_{part}": round(value, 1) for part, value in times._asdict().items()},
                **{f"over_default_group_{part}": round(value, 3) for part, value in over._asdict().items()},
                "milliseconds_in_collectives": round(inside, 1),
                "repeats": options.repeats,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=("auto", "throttled", "delayed"), default="auto", help="auto: throttled if it can be")
    parser.add_argument("--delay", type=positive, default=2.0, help="milliseconds before a layer's collective, where delayed")
    parser.add_argument("--rate", default="1gbit", help="of the link in each direction, as tc writes it")
    parser.add_argument("--queue", default="200ms", help="how long the link holds a packet at most before it drops some")
    parser.add_argument("--layers", type=whole(1), default=20, help="with batch norm")
    parser.add_argument("--linear", type=whole(0), default=4, help="large linear layers behind them")
    parser.add_argument("--hidden", type=whole(1), default=2048, help="width of the linear layers")
    parser.add_argument("--images", type=whole(1), default=16, help="on each rank")
    parser.add_argument("--repeats", type=whole(2), default=10)
    parser.add_argument("--timeout", type=positive, default=600.0, help="seconds")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    try:
        rows.prepare(options.results)
        link, answers = run(options)
        problem = answers[0]["problem"]
        if not problem:
            print(rows.said(rows.append("own_group", report(answers, link, options), options.results)))
    except (OSError, processes.ProcessError, rows.RowError) as error:
        problem = str(error)
    if problem:
        print(f"nothing is reported: {problem}", file=sys.stderr)
    return 1 if problem else 0


def run(options: argparse.Namespace) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The columns that tell of the link, and the answers of the ranks."""
    arguments = {name: getattr(options, name) for name in ("images", "layers", "linear", "hidden", "repeats")}
    task = "own_group:measure"
    if options.link != "delayed":
        with contextlib.ExitStack() as stack:
            try:
                places = stack.enter_context(namespaces.two_nodes(options.rate, options.queue))
            except OSError as error:
                if options.link == "throttled":
                    raise
                print(f"no throttled link, a delay instead: {error}", file=sys.stderr)
            else:
                link = {
                    "link": "veth between network namespaces, tbf",
                    "rate": options.rate,
                    "queue": options.queue,
                    "delay": "",
                }
                return link, processes.run(task, arguments | {"delay": 0.0}, 2, options.timeout, places=places)
    link = {"link": "one machine, injected delay", "rate": "", "queue": "", "delay": f"{options.delay:g}ms"}
    return link, processes.run(task, arguments | {"delay": options.delay}, 2, options.timeout)


if __name__ == "__main__":
    sys.exit(main())
