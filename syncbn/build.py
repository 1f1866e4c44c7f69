"""`python -m syncbn build`: the host side of the GPU kernels, compiled for the torch that is installed."""

import argparse
import sys

import torch


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `build` to the command line."""
    text = "compile what launches the GPU kernels to C++: small tensors wait for Python; again after each update of torch"
    commands.add_parser("build", help=text, description=f"{text}. Exit status: 0, or 1 if it failed.").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build, load and try it; the exit status."""
    try:
        from .kernels import host
    except ImportError as error:
        print(f"given a Python without {error.name}; expected Triton, which the kernels are written in", file=sys.stderr)
        return 1
    try:
        path = host.build()
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    host.library = host.load(path)
    if host.library is None:  # the log says why
        return 1
    print(f"built {path}: used from now on, by processes that start with this torch {torch.__version__}")
    if not torch.cuda.is_available():
        print("not tried: no GPU here")
        return 0
    problem = host.problem("cuda")
    if problem is None:
        print(f"tried on {torch.cuda.get_device_name()}: works")
        return 0
    path.unlink()
    print(f"removed again, since it does not work on {torch.cuda.get_device_name()}: {problem}", file=sys.stderr)
    return 1
