"""`python -m syncbn build`: the host side of the GPU kernels, compiled for the torch that is installed, tried, and kept."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `build` to the command line."""
    text = (
        "compile what launches the GPU kernels from C++: small tensors wait for Python; again after updates of torch or syncbn"
    )
    commands.add_parser("build", help=text, description=f"{text}. Exit status: 0, or 1 if it failed.").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        from .kernels import host
    except ImportError as error:
        print(
            f"given a Python without {error.name}; expected Triton, which the kernels are written in and torch for CUDA brings",
            file=sys.stderr,
        )
        return 1
    try:
        with tempfile.TemporaryDirectory(dir=host.LIBRARY.parent, prefix="_host-") as directory:
            made = host.build(Path(directory) / host.LIBRARY.name)
            told = tried(host, made)
            if told is None:
                return 1
            for old in host.LIBRARY.parent.glob(f"_host-*{host.ENDING}"):  # of other sources
                old.unlink(missing_ok=True)  # another build may be at it
            made.replace(host.LIBRARY)
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {host.LIBRARY}, {told}: used by processes that start from now on")
    print("remove the file to go back to Python, and before `pip uninstall`, which does not know it")
    return 0


def tried(host: Any, made: Path) -> str | None:
    """How a library did in this process; None, if it does not work, which is said."""
    host.library = host.load(made)
    if host.library is None:  # the log says why
        return None
    if not torch.cuda.is_available():
        return "not tried, since there is no GPU here"
    problem = host.problem("cuda")
    if problem is None:
        return f"which works on {torch.cuda.get_device_name()}"
    print(f"not kept, since it does not work on {torch.cuda.get_device_name()}: {problem}", file=sys.stderr)
    return None
