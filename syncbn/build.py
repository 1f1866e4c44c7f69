"""`python -m syncbn build`: what small tensors wait for in C++, compiled for the torch that is installed, tried, and kept."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from .function import sync_batch_norm
from .kernels import extension


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `build` to the command line."""
    text = (
        "compile what small tensors wait for, autograd's node and the launches of the GPU kernels, in C++; again after updates "
        "of torch or syncbn"
    )
    commands.add_parser("build", help=text, description=f"{text}. Exit status: 0, or 1 if it failed.").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    library = extension.LIBRARY
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="_host-") as directory:
            made = extension.build(Path(directory) / library.name)
            told = tried(made)
            if told is None:
                return 1
            for old in library.parent.glob(f"_host-*{extension.ENDING}"):  # of other sources
                old.unlink(missing_ok=True)  # another build may be at it
            made.replace(library)
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {library}, {told}: used by processes that start from now on")
    print("remove the file to go back to Python, and before `pip uninstall`, which does not know it")
    return 0


def tried(made: Path) -> str | None:
    """How a library did in this process; None, if it does not work, which is said."""
    extension.library = extension.load(made)
    if extension.library is None:  # the log says why
        return None
    places = {"cpu": "the CPU"}
    if torch.cuda.is_available():
        places["cuda"] = torch.cuda.get_device_name()
    for device, name in places.items():
        problem = (launch_problem(device) if device == "cuda" else None) or step_problem(device)
        if problem is not None:
            print(f"not kept, since it does not work on {name}: {problem}", file=sys.stderr)
            return None
    return f"which works on {' and '.join(places.values())}"


def launch_problem(device: str) -> str | None:
    """Why the library cannot launch what is compiled for a GPU, if so; without Triton there is nothing to launch."""
    try:
        from .kernels import host
    except ImportError:
        return None
    host.use(extension.library)
    return host.problem(device)


def step_problem(device: str) -> str | None:
    """What is wrong with steps of training by the library, if anything: they are not those by Python."""
    given = torch.linspace(-2, 3, 24, device=device).view(4, 3, 2), torch.ones(3, device=device), torch.zeros(3, device=device)
    made, library = [], extension.library
    try:
        for extension.library in (None, library, library):  # what Triton compiles it launches itself, from then on C++ does
            x, weight, bias = (value.clone().requires_grad_() for value in given)
            running = torch.zeros(3, device=device), torch.ones(3, device=device)
            y = sync_batch_norm(x, *running, weight, bias, training=True, _force_sync=True)
            y.backward(given[0])
            made.append((y.detach(), x.grad, weight.grad, bias.grad, *running))
    except Exception as error:  # whatever C++ raises
        return f"{type(error).__name__}: {error}"
    names = ("y", "dx", "dγ", "dβ", "the running mean", "the running variance")
    wrong = [name for name, *values in zip(names, *made, strict=True) if not all(map(values[0].equal, values))]
    return f"otherwise than by Python: {', '.join(wrong)}" if wrong else None
