"""The functions of triton.py with their host side in C++ (host.cpp), for tensors that a GPU has done with before Python has.

Requirements
    - the same launches: plans, programs and workspaces are triton.py's, and so is what host.cpp does not know how to do;
    - a library is of one host.cpp, one release of torch and one of Python, by its name, so that no other is loaded; it is built
      when a user asks, never while ranks wait.
"""

import hashlib
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import Affine, GradientSums, Kernels, Running, Saved, keep, plans, triton
from .layout import PLAIN, is_watched

WHAT, INSTEAD = "what `python -m syncbn build` made does not work here", "Python launches the kernels in Triton"
SOURCE = Path(__file__).with_name("host.cpp")
DIGEST = hashlib.sha256(SOURCE.read_bytes() if SOURCE.exists() else b"").hexdigest()[:12]
ENDING = f"-{torch.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
LIBRARY = Path(__file__).with_name(f"_host-{DIGEST}{ENDING}")
PROGRAMS = ("moments", "normalize", "gradient_sums", "input_gradient")  # as host.cpp numbers them


def build(to: Path) -> Path:
    """Compile host.cpp for the torch and the Python that run, which takes a quarter of a minute; `to`, the library.

    Raises:
        RuntimeError: there is no C++ compiler (CXX, or c++), or it failed; what it said is in the message.
    """
    root, python = Path(torch.__file__).parent, sysconfig.get_paths()["include"]
    folders = (root / "include", root / "include/torch/csrc/api/include", python)
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, "-O2", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(to)]
    command += [f"-I{folder}" for folder in folders] + [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"given the C++ compiler {compiler[0]!r}, which cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"the C++ compiler failed: {shlex.join(command)}\n{done.stderr}")
    return to


def load(path: Path = LIBRARY) -> Any:
    """The library; None if it is not there, or, said in the log, is none."""
    if not path.exists():
        return None
    loader = ExtensionFileLoader("syncbn.kernels._host", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        logging.getLogger("syncbn").warning("%s (%s): %s, with the same results but slower", WHAT, error, INSTEAD)
        return None
    use(module)
    return module


def use(module: Any, **others: Any) -> None:
    """Give a library what it calls; `others` in place of some."""
    given = {
        "plans": plans.of,
        "workspace": triton.workspace,
        "stream": triton.stream,
        "launch": _launch,
        "hooks": triton.HOOKS,
    }
    module.use(*(given | others).values())


def _launch(number: int, *given: Any) -> Any:
    """A program by triton.py; how to launch it from then on, if that is known."""
    return triton.launch(getattr(triton.programs, PROGRAMS[number]), *given)


library = load()


def takes(x: Tensor) -> bool:
    """As triton.takes."""
    return (x.is_cuda or triton.INTERPRETED) and type(x) in PLAIN and not is_watched() and bool(library.takes(x))


def problem(device: str) -> str | None:
    """Why nothing can be compiled and run on a GPU, if so."""
    return triton.problem(device, cast(Kernels, sys.modules[__name__]))


def moments(x: Tensor) -> Tensor:
    message = library.moments(x)
    return triton.moments(x) if message is None else message


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    made = None
    if running is None:
        made = library.normalize(x, message, *affine, None, None, None, 0.0)
    elif running.momentum is not None:
        made = library.normalize(x, message, *affine, *running)
    if made is None:
        return triton.normalize(x, message, affine, running)
    y, statistics = made
    return y, keep(affine, statistics, y)


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    made = library.gradient_sums(dy, x, *saved)
    return triton.gradient_sums(dy, x, saved) if made is None else GradientSums(*made)


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    statistics, weight, bias, y, relu = saved
    dx = library.input_gradient(dy, x, statistics, weight, bias, relu and y is None, message)
    return triton.input_gradient(dy, x, saved, message) if dx is None else dx
