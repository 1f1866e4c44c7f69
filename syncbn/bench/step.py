"""`bench step`: a training step of a ResNet-18 in DistributedDataParallel, over the same with torch's local batch norm.

Requirements
    - one thread a rank; all variants live in one set of processes and take turns, step by step, each after a barrier;
    - before any time is taken, gradients and running statistics are those of one process with the whole batch, in float64;
    - a step takes what the slowest rank takes; buffers are not broadcast, for any variant;
    - time in collectives is split: what the same messages take when ranks come at once, and waiting for a rank that is late.
"""

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import control, observing
from ..convert import convert
from ..doctor.finding import table
from ..doctor.latency import meet, timed
from ..doctor.model import Stopwatch
from . import messages, peers, processes, rows
from .agreement import DisagreementError
from .network import CLASSES, SIZE, data_parallel, fuse, network, replace
from .peers import TORCH
from .rows import Row
from .timing import Quartiles, order, quartiles, ratio

TASK = "syncbn.bench.step:measure"
OWN = "syncbn-local"  # our kernels, local statistics
FUSED = "syncbn-fused"  # the ReLUs, and the additions before them, in our layers
WATCHED = "syncbn-watched"  # syncbn with a stopwatch on its collectives
# Relative, in the norm of all, or twice what torch's own float32 step of the whole batch is off float64: ReLU passes or stops
# single values by their last bit, 2e-3 of 16 images, 3e-2 of two. Local statistics are 1.1 and 2e-3 off.
ALLOWED = {"gradients": 1e-2, "running statistics": 1e-6}
WARM_UP = 2
Build = Callable[[nn.Module], nn.Module]
Answer = dict[str, Any]


def variants(size: int, device: torch.device) -> dict[str, Build]:
    """What becomes of the network, and its kernels by the name of a peer, for each variant that can run here."""
    makers: dict[str, Build] = {
        TORCH: lambda model: model,
        OWN: _local,
        "syncbn": peers.forced,
        FUSED: lambda model: fuse(peers.forced(model), peers.fused),
        "syncbn-aten": peers.forced,
        WATCHED: peers.forced,
        "plain": lambda model: replace(model, peers.PlainSyncBatchNorm),
        "torch-sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    }
    if size == 1:
        del makers[OWN]  # is syncbn
    if device.type != "cuda":
        del makers["torch-sync"]
    return makers


def _local(model: nn.Module) -> nn.Module:
    return convert(peers.forced(model), group_size=1)


def kernels_of(name: str) -> str:
    """The peer whose kernels a variant takes."""
    return name if name in peers.PEERS else "syncbn"


def run(options: argparse.Namespace) -> int:
    """Measure at each number of ranks, print, append rows; the exit status."""
    measured: list[Row] = []
    for size in fitting(options.ranks, options.device):
        arguments = {"images": options.images, "width": options.width, "repeats": options.repeats, "device": options.device}
        answers = processes.run(TASK, arguments, size, options.timeout, options.device)
        measured += rows_of(answers, options, size)
        rows.require("step", measured, options.results)
    print(shown(measured))
    print(rows.said(rows.append("step", measured, options.results, options.device)))
    return 0


def fitting(sizes: Sequence[int], device: str) -> list[int]:
    """The numbers of ranks for which there is a device each; what is left out is said."""
    there = torch.cuda.device_count() if device == "cuda" else max(sizes)
    for size in sizes:
        if size > there:
            print(f"syncbn bench: {size} ranks are skipped: there are GPUs for {there}", file=sys.stderr)
    return [size for size in sizes if size <= there]


def rows_of(answers: Sequence[Answer], options: argparse.Namespace, size: int) -> list[Row]:
    """A row for each variant.

    Raises:
        DisagreementError: a rank found one that does not train as one process does; nothing is reported.
    """
    problems = [answer["problem"] for answer in answers if answer["problem"]]
    if problems:
        raise DisagreementError(problems[0])
    taken = {
        name: [max(times) for times in zip(*(answer["taken"][name] for answer in answers), strict=True)]
        for name in answers[0]["taken"]
    }
    share, waiting = (statistics.fmean(answer[name] for answer in answers) for name in ("share", "waiting"))
    own = taken.get(OWN, taken["syncbn"])
    found = []
    for name, times in taken.items():
        over, over_own = ratio(times, taken[TORCH]), ratio(times, own)
        milliseconds = Quartiles(*(1e3 * value for value in quartiles(times)))
        found.append(
            {
                "variant": name,
                "world_size": size,
                "network": f"ResNet-18, width {options.width}",
                "images_per_rank": options.images,
                "threads_per_rank": 1,
                "cores": os.cpu_count(),
                "device": options.device,
                **{f"milliseconds_{part}": round(value, 2) for part, value in milliseconds._asdict().items()},
                **{f"over_torch_{part}": round(value, 3) for part, value in over._asdict().items()},
                **{f"over_own_kernels_{part}": round(value, 3) for part, value in over_own._asdict().items()},
                "share_in_collectives": round(share, 4) if name == WATCHED else "",
                "share_waiting": round(waiting, 4) if name == WATCHED else "",
                "repeats": len(times),
            }
        )
    return found


def shown(measured: Sequence[Row]) -> str:
    """Ratios of medians, between quartiles."""
    lines: list[Sequence[object]] = [
        ("ranks", "variant", "ms a step", "over torch", "over own kernels", "in collectives", "waiting")
    ]
    for row in measured:
        ratios = [
            f"{row[f'{over}_median']:.2f} ({row[f'{over}_lower']:.2f} to {row[f'{over}_upper']:.2f})"
            for over in ("over_torch", "over_own_kernels")
        ]
        shares = [f"{row[share]:.1%}" if row[share] != "" else "" for share in ("share_in_collectives", "share_waiting")]
        lines.append((row["world_size"], row["variant"], f"{row['milliseconds_median']:.1f}", *ratios, *shares))
    return table(lines)


def measure(rank: int, world_size: int, images: int, width: int, repeats: int, device: str) -> Answer:
    """On each rank: its seconds of every step, the shares in collectives, or the problem that the check found."""
    on = torch.device(device)
    torch.manual_seed(0)
    initial = network(width)
    x, target = batch(images * world_size)
    mine = slice(rank * images, (rank + 1) * images)
    makers = variants(world_size, on)
    models = {name: data_parallel(make(copy.deepcopy(initial)).to(on)) for name, make in makers.items()}
    share = x[mine].to(on), target[mine].to(on)
    torch.backends.cudnn.allow_tf32 = False  # convolutions are float32, as those that they are checked against
    for name, model in models.items():
        with peers.using(kernels_of(name)):
            F.cross_entropy(model(share[0]), share[1]).backward()
    problem = check(initial, models, x, target) if rank == 0 else ""
    world = torch.distributed.group.WORLD
    assert world is not None
    if any(control.side_group(world).gather_objects(problem)):
        return {"problem": problem}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3) for name, model in models.items()}
    answer: Answer = {"problem": problem, "taken": {name: [] for name in models}}
    watch, seconds_in = Stopwatch(on), []
    turns = tqdm(range(-WARM_UP, repeats), f"{world_size} ranks", unit=" rounds", disable=None if rank == 0 else True)
    for repeat in turns:
        for name in order(list(models), repeat):
            run = _step(name, models[name], optimizers[name], share, watch)
            watch.seen.clear()
            watch.marks.clear()
            meet(world, on)
            seconds, _ = timed(run, on)
            if repeat >= 0:
                answer["taken"][name].append(seconds)
            if repeat >= 0 and name == WATCHED:
                seconds_in.append(watch.seconds())
                values = [one.values for one in watch.seen]
    return answer | _shares(rank, world_size, values, seconds_in, answer["taken"][WATCHED], device)


def batch(samples: int) -> tuple[Tensor, Tensor]:
    """The whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, SIZE, SIZE, generator=generator)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def _step(name: str, model: nn.Module, optimizer: Any, share: tuple[Tensor, Tensor], watch: Stopwatch) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad(set_to_none=False)
        with peers.using(kernels_of(name)):
            if name == WATCHED:
                with observing.observe(watch):
                    y = model(share[0])
            else:
                y = model(share[0])
            F.cross_entropy(y, share[1]).backward()
        optimizer.step()

    return run


def check(initial: nn.Module, models: Mapping[str, nn.Module], x: Tensor, target: Tensor) -> str:
    """What is wrong with the first gradients and running statistics, if anything.

    Synchronized layers beside one process with the whole batch in float64; our local ones beside torch's.
    """
    wanted, single = (_step_of_one(initial, x, target, dtype) for dtype in (torch.float64, torch.float32))
    for name, model in models.items():
        reference = state(models[TORCH]) if name == OWN else wanted
        if name == TORCH:
            continue
        for what, value, want, torchs, exact in zip(ALLOWED, state(model), reference, single, wanted, strict=True):
            off, allowed = _off(value, want), max(ALLOWED[what], 2 * _off(torchs, exact))
            if not off <= allowed:
                told = f"{what} of {len(x)} images are off by {off:.1e} of their norm, more than {allowed:.1e}"
                return f"{name} does not train as one process with the whole batch: {told}"
    return ""


def _step_of_one(initial: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The state of torch's layers after a first step of one process."""
    model = copy.deepcopy(initial).to(dtype).train()
    F.cross_entropy(model(x.to(dtype)), target).backward()
    return state(model)


def _off(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def state(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All gradients, and all running statistics, float64."""
    gradients = [p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None]
    running = [b.double().cpu().flatten() for n, b in model.named_buffers() if "running_" in n]
    return torch.cat(gradients), torch.cat(running)


def _shares(
    rank: int, world_size: int, values: Sequence[int], seconds_in: Sequence[float], steps: Sequence[float], device: str
) -> dict[str, float]:
    """Of the watched steps: the share in collectives, and what of it is waiting."""
    alone = messages.measure(rank, world_size, sorted(set(values)), ["all_reduce"], 10, device)
    median = {one["values"]: statistics.median(one["seconds"]) for one in alone}
    step, inside = statistics.median(steps), statistics.median(seconds_in)
    transfer = sum(median[count] for count in values)
    return {"share": inside / step, "waiting": max(0.0, inside - transfer) / step}
