"""`python -m syncbn analyze`: options, the experiments, and the exit status.

Requirements
    - what is wrong with the options or the installation is said before anything starts;
    - growth and shift run data parallel too, started by torchrun: all ranks measure, rank 0 speaks;
    - the exit status is 0 if every claim holds, else 1.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import collectives, environment
from ..options import Defaults, file_problem, function_name, whole

NAMES = ("noise", "shift", "growth", "smoothness", "gdnp")
PARALLEL = ("growth", "shift")
BATCH = 64  # of the experiments that ranks share
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `analyze` and its options to the command line."""
    parser = commands.add_parser(
        "analyze",
        help="measure what batch norm does to networks: the literature's claims, or your own network",
        description="Run the experiments behind what is claimed of batch normalization; print each claim with what was "
        "expected and what was measured, and draw a picture of each experiment. growth and shift also run under torchrun. "
        "Exit status: 0 if every claim holds, 1 if not, 2 for a usage error, 130 if interrupted.",
        formatter_class=Defaults,
    )
    parser.add_argument("what", choices=(*NAMES, "all"), help="the experiment")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, steps and seeds: all in under three minutes")
    parser.add_argument(
        "--seeds", type=whole(0, 2**31 - 1), nargs="+", default=[0, 1, 2], metavar="N", help="of networks and data"
    )
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="where syncbn-<experiment>.png goes")
    parser.add_argument(
        "--model",
        type=function_name,
        metavar="MODULE:FUNCTION",
        help="with growth: instead of the experiment, your network; the function, called without arguments, gives "
        "(model, batch, loss), where loss(model, batch) is the mean loss of this rank's share",
    )
    parser.set_defaults(run=lambda options: run(options, parser))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Check the options, join the job if there is one, and run; the exit status."""
    if options.model is not None and options.what != "growth":
        parser.error(f"given --model with {options.what}; expected growth")
    problem = environment.problem()
    if problem is not None:
        parser.error(problem)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and options.what not in PARALLEL:
        parser.error(f"given {ranks} ranks for {options.what}; expected one: only {' and '.join(PARALLEL)} run data parallel")
    if ranks > 1 and options.model is None and BATCH % ranks:
        parser.error(f"given {ranks} ranks; expected a number that divides the batch of {BATCH}")
    problem = None if options.model is not None else unwritable(options.out, chosen(options.what))
    if problem is not None:
        parser.error(problem)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing and options.model is None:
        say(f'{", ".join(missing)} not installed; expected what the experiments need: pip install "syncbn[analysis]"')
        return 1
    try:
        with job():
            return _model(options) if options.model is not None else _experiments(options)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except collectives.CollectiveError as error:
        say(str(error))
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        say(file_problem(error))
        return 1


def chosen(what: str) -> tuple[str, ...]:
    """The experiments that the argument names."""
    return NAMES if what == "all" else (what,)


def picture(directory: Path, name: str) -> Path:
    """Of an experiment."""
    return directory / f"syncbn-{name}.png"


def unwritable(directory: Path, names: Sequence[str]) -> str | None:
    """Why pictures of these experiments cannot be written there, if they cannot."""
    path = directory
    try:
        tempfile.TemporaryFile(dir=directory).close()
        for path in (picture(directory, name) for name in names):
            if path.exists():
                path.open("r+b").close()
    except OSError as error:
        return f"given --out {directory}; expected a directory that can be written to: {path}: {error.strerror}"
    return None


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Inside, the processes that torchrun started are a process group on Gloo; a process alone stays alone."""
    if "RANK" not in os.environ:
        yield
        return
    # Its functions, imported once there is a group, keep it, and Gloo's threads beyond its end.
    importlib.import_module("torch.distributed.nn")
    try:
        torch.distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:  # of the store, or the backend
        first = str(error).split("\n", 1)[0]
        raise collectives.CollectiveError(f"this rank could not meet the others ({first}): start every rank") from error
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _experiments(options: argparse.Namespace) -> int:
    from .claims import Settings, shown
    from .plots import new_figure, write

    speaks = collectives.rank_and_size()[0] == 0
    failed, start = 0, time.perf_counter()
    for name in chosen(options.what):
        experiment = importlib.import_module(f"{__package__}.experiments.{name}")
        outcome = experiment.run(Settings(options.quick, tuple(options.seeds), track))
        failed += sum(not claim.holds for claim in outcome.claims)
        if speaks:
            print(f"\n{name}\n\n{shown(outcome)}", flush=True)
            path = picture(options.out, name)
            figure = new_figure(f"{name}, seeds {' '.join(map(str, options.seeds))}")
            outcome.draw(figure)
            write(figure, str(path))
            print(f"picture: {path}", flush=True)
    if speaks:
        result = "every claim holds" if not failed else f"{failed} claim{'s' * (failed > 1)} FAILED"
        print(f"\n{result}; {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


def track(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar on the terminal of rank 0."""
    from tqdm import tqdm

    rank = collectives.rank_and_size()[0]
    return tqdm(items, title, disable=None if rank == 0 else True, leave=False, dynamic_ncols=True)


def _model(options: argparse.Namespace) -> int:
    """Growth of the user's own network."""
    from .growth import advice, gradient_growth
    from .user import load, shown

    try:
        model, batch, loss = load(options.model)
        growth = gradient_growth(model, loss, batch)
    except collectives.CollectiveError:
        raise
    except ValueError as error:
        say(str(error))
        return 1
    except Exception as error:  # the user's code may raise anything
        traceback.print_exception(error)
        say(f"{options.model} failed with {type(error).__name__}; expected (model, batch, loss) that run forward and backward")
        return 1
    if collectives.rank_and_size()[0] == 0:
        print(f"{shown(growth)}\n{advice(growth)}", flush=True)
    return 0


def say(message: str) -> None:
    """One line on standard error."""
    print(f"syncbn analyze: {message}", file=sys.stderr, flush=True)
