"""A data-parallel training program with synchronized batch norm, to start or to copy.

    launch/one_node.sh --bn syncbn --checkpoint run.pt        or, in one process:        python launch/train.py

Trains a small network on scikit-learn's digits, or on a folder of images, and prints the loss of each epoch and the accuracy on
the held-out fifth. Runs on GPUs with NCCL where there is one for each process, else on CPUs with Gloo.

With --checkpoint FILE the state is written there, and where FILE exists the run goes on from it: one command starts, restarts
and resumes. On as many processes as before, the end is that of a run without interruption, to the bit on two CPUs; on
another number of processes it is to rounding.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import torch
import torch.distributed as dist
import torch.distributed.nn  # its functions, imported once there is a group, keep it, and Gloo's threads beyond its end
from checkpoint import Checkpoint, CheckpointError, Progress
from loop import Job, Place, fit, report
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

LIGHTNING = """The training of launch/train.py by Lightning, which starts the processes.

    python launch/lightning_train.py --processes 2 --checkpoint run.ckpt

Trains a small network on scikit-learn's digits, or on a folder of images, and shows Lightning's progress. Runs on GPUs with
NCCL where there is one for each of --processes, else on CPUs with Gloo.

With --checkpoint FILE the state is written at the end of an epoch and of the run, to FILE with the suffix .ckpt in place of its
own, and where that exists the run goes on from it, also inside an epoch.
"""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` on, to `most` where there is one."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            expected = f"{least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"given {text!r}; expected a whole number, {expected}")
        return int(text)

    return parse


def positive(most: float | None = None) -> Callable[[str], float]:
    """The type of an option that takes numbers above 0, to `most` where there is one."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf") or (most is not None and value > most):
            expected = "above 0" if most is None else f"above 0, {most:g} at most"
            raise argparse.ArgumentTypeError(f"given {text!r}; expected a number {expected}")
        return value

    return parse


def variable(name: str, default: str = "") -> int:
    """A whole number that torchrun puts into the environment; exits where there is none and no default."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        given = f"{name}={text!r}" if name in os.environ else f"RANK without {name}"
        raise SystemExit(f"given {given} in the environment; expected a whole number, as torchrun gives")
    return int(text)


def gpus_and_processes() -> tuple[int, int]:
    """How many of each this machine has in the job."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0, variable("LOCAL_WORLD_SIZE", "1")


def unfit(batch_norm: str, gpus: int, processes: int) -> str | None:
    """Why so many processes with so many GPUs cannot have this batch norm, if they cannot."""
    if batch_norm != "torch" or 0 < processes <= gpus:
        return None
    if gpus == 0:
        return "given 'torch' without a GPU; expected local or syncbn"
    given = f"given 'torch' with {gpus} GPU{'s' * (gpus > 1)} for {processes} processes of this machine"
    return f"{given}; expected one for each, or local or syncbn"


def batch_norm(text: str) -> str:
    problem = unfit(text, *gpus_and_processes())
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


def arguments(for_lightning: bool = False) -> argparse.ArgumentParser:
    """The options; for Lightning those that it follows, and the number of processes, which it starts."""
    description = LIGHTNING if for_lightning else __doc__
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images, a subfolder per class; default: digits")
    parser.add_argument("--image-size", type=whole(1), default=64, help="what images of a folder are scaled to")
    parser.add_argument("--workers", type=whole(0), default=0, help="processes per rank that read images ahead")
    kinds = ("local", "torch", "syncbn")
    parser.add_argument("--bn", type=batch_norm, choices=kinds, default="syncbn", help="torch: on GPUs only")
    parser.add_argument("--epochs", type=whole(1), default=5)
    parser.add_argument("--steps", type=whole(1), help="end after this many, resumed ones included")
    parser.add_argument("--batch-size", type=whole(1), default=32, help="samples of all processes in a step")
    parser.add_argument("--learning-rate", type=positive(), default=0.05)
    seed = whole(0, 2**64 - 1)  # what torch takes
    parser.add_argument("--seed", type=seed, default=0, help="of the initial network, the split and the order of the data")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    its = ", its suffix being .ckpt" if for_lightning else ""
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"write it{its}; go on from it if it exists")
    waiting = positive(1e9)  # what a timedelta takes
    parser.add_argument("--timeout", type=waiting, default=600, metavar="SECONDS", help="how long to wait for a process")
    if for_lightning:
        parser.add_argument("--processes", type=whole(1), default=2, help="of this machine; default: 2")
    else:
        parser.add_argument("--checkpoint-every", type=whole(1), default=50, metavar="STEPS")
    return parser


def network(channels: int, classes: int) -> nn.Sequential:
    """(N, channels, H, W) images → (N, classes) logits."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((channels, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def build(options: argparse.Namespace, images: data.Images, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network of the seed with the batch norm asked for, and its optimizer."""
    torch.manual_seed(options.seed)
    model: nn.Module = network(images.shape[0], images.classes).to(device, getattr(torch, options.dtype))
    if options.bn == "syncbn":
        syncbn.convert(model)
    elif options.bn == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, torch.optim.SGD(model.parameters(), options.learning_rate, momentum=0.9)


def settings(options: argparse.Namespace, images: data.Images) -> dict[str, Any]:
    """What a run must have in common with the one whose checkpoint it goes on from."""
    given = {name: getattr(options, name) for name in ("seed", "batch_size", "learning_rate", "bn", "dtype")}
    return given | {"samples": len(images), "shape": images.shape, "classes": images.names}


def train(options: argparse.Namespace, place: Place) -> Progress:
    """Train, and print the accuracy; for every rank of the default process group."""
    images = data.open(options.data, options.image_size)
    model, optimizer = build(options, images, place.device)
    checkpoint = Checkpoint(options.checkpoint, settings(options, images), model, optimizer, place.rank)
    job = Job(options, images, DistributedDataParallel(model), optimizer, checkpoint, place)
    progress = fit(job)
    report(job)
    return progress


def start(timeout: float) -> Place:
    """Join the processes that torchrun started, or begin a job of one."""
    waiting = datetime.timedelta(seconds=timeout)
    gpus, processes = gpus_and_processes()
    if "RANK" not in os.environ:
        device = torch.device("cuda", 0) if gpus else torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=waiting)
        return Place(0, 1, device)
    rank, world_size, local_rank = (variable(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = gpus >= processes
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=waiting)
    return Place(rank, world_size, torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"))


def main() -> None:
    options = arguments().parse_args()
    place = start(options.timeout)
    problem = None
    try:
        train(options, place)
    except CheckpointError as error:  # on every rank; after one of this rank alone, NCCL would wait below for the others
        problem = f"train.py: {error}" if place.rank == 0 else 1
    dist.destroy_process_group()
    if problem:
        sys.exit(problem)


if __name__ == "__main__":
    main()
