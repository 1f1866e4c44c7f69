"""`python -m syncbn doctor`: options, the examination, and the exit status.

Requirements
    - started alone, or by torchrun on each machine of a job; every rank comes to every check, rank 0 speaks;
    - what ranks say to each other goes over Gloo on the CPU, beside the backend that is examined;
    - the exit status is 0 on every rank if everything holds, else 1, and 130 on one that is interrupted; a rank that never
      comes is an error after --timeout.
"""

import argparse
import datetime
import os
import sys
import traceback

import torch

from .. import environment
from ..options import Defaults, function_name, positive, whole


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` and its options to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="examine this machine, or a job under torchrun: versions, exactness, latency, what a model costs",
        description="Show versions, devices and network of every rank, and whether they agree; check that the layer is batch "
        "norm of the whole batch in every dtype; measure a layer's collectives and, with --model, what they cost a model. "
        "Start it alone, or by torchrun as you start your training. Exit status: 0 if everything holds, 1 if not, 2 for a "
        "usage error, 130 if interrupted.",
        formatter_class=Defaults,
    )
    parser.add_argument(
        "--model",
        type=function_name,
        metavar="MODULE:FUNCTION",
        help="called without arguments, gives (model, input of a rank)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs, if each rank has one")
    parser.add_argument("--repeats", type=whole(2, 10**6), default=30, metavar="N", help="of each collective that is measured")
    parser.add_argument("--steps", type=whole(2, 10**6), default=10, metavar="N", help="of the model that are measured")
    parser.add_argument("--timeout", type=positive, default=60.0, metavar="S", help="seconds to wait for a rank")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine the job; the exit status."""
    try:
        return joined(options)
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def joined(options: argparse.Namespace) -> int:
    """Join the job, examine it, leave it; the exit status."""
    problem = environment.problem()
    if problem is not None:
        say(problem)
        return 1
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if options.device == "cuda" and here <= local:
        say(f"given --device cuda for process {local} of this machine, which has {here} GPUs; expected one for each process")
        return 1
    try:
        device = start(options, local)
    except Exception as error:  # of the backend, or of the store
        from .place import interface

        ranks = os.environ.get("WORLD_SIZE", "1")
        say(
            f"this rank could not meet all {ranks} ranks within {options.timeout:g} s, over interface {interface('gloo')} "
            f"({_first_line(error)}): start every rank; name the right network by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
        return 1
    try:
        status = examine(options, device)
    except (BrokenPipeError, KeyboardInterrupt):
        if device.type == "cpu":  # joins Gloo's threads: one that lets go of a tensor while Python ends would abort it
            torch.distributed.destroy_process_group()
        raise
    except (Exception, SystemExit) as error:  # whatever the user's model, or a peer that is gone, may raise
        traceback.print_exception(error)
        say(f"the examination ended with {_first_line(error)}; look for the first error among the ranks")
        return 1
    torch.distributed.destroy_process_group()
    return status


def start(options: argparse.Namespace, local: int) -> torch.device:
    """Join the processes that torchrun started, or begin a job of one; the device of this rank, the local-th of its machine."""
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = options.device == "cuda" or (options.device == "auto" and enough and torch.cuda.is_available())
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if on_gpu else "gloo", datetime.timedelta(seconds=options.timeout)
    distributed = torch.distributed
    if "RANK" in os.environ:
        distributed.init_process_group(backend, timeout=timeout)
    else:
        distributed.init_process_group(backend, timeout=timeout, store=distributed.HashStore(), rank=0, world_size=1)
    return device


def examine(options: argparse.Namespace, device: torch.device) -> int:
    """Every check, over the default process group; the exit status, the same on every rank."""
    from .. import collectives, control
    from . import exact, latency, model, place
    from .finding import Finding

    world = collectives.Group().resolve()
    assert world is not None
    rank, size, gather = world.rank(), world.size(), control.side_group(world).gather_objects
    found: list[Finding] = []

    def tell(heading: str, more: list[Finding]) -> None:
        found.extend(more)
        if rank == 0:
            print(*([heading, ""] if heading else []), *more, "", sep="\n", flush=True)

    places = gather(place.facts(torch.distributed.get_backend(), device))
    tell(f"{size} rank{'s' * (size > 1)}\n\n{place.shown(places)}", place.judge(places))
    tell("", exact.judge(gather(exact.errors(rank, size, device))))

    loaded = model.load(options.model, device) if options.model is not None else None
    layers: tuple[model.Layer, ...] = ()
    if loaded is not None:
        every = gather(loaded if isinstance(loaded, str) else tuple(model.layers(loaded.model)))
        tell("", model.judge_layers(every))
        layers = () if found[-1].bad else every[0]

    channels = sorted({*latency.SIZES, *(layer.channels for layer in layers)})
    measured = gather(latency.measure(size, channels, options.repeats, device))
    taken = latency.slowest(measured)
    tell(latency.shown(taken, device), latency.judge(measured))

    if layers:
        assert isinstance(loaded, model.Loaded)
        steps = gather(model.measure(loaded, options.steps, device))
        tell(f"{options.model}\n\n{model.shown(steps, taken)}", model.judge(steps, taken))

    bad = sum(finding.bad for finding in found)
    if rank == 0:
        print("everything holds" if not bad else f"{bad} finding{'s' * (bad > 1)} to see to, marked BAD", flush=True)
    return 1 if bad else 0


def say(message: str) -> None:
    """One line on standard error, of this rank."""
    print(f"syncbn doctor: rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
