"""The functions of triton.py with their host side in C++ (host.cpp), for tensors that a GPU has done with before Python has.

Requirements: the same launches; plans, programs and workspaces are triton.py's, and so is what host.cpp does not know to do.
"""

import sys
from typing import Any, cast

from torch import Tensor

from . import Affine, GradientSums, Kernels, Running, Saved, extension, keep, plans, triton
from .layout import PLAIN, is_watched

WHAT, INSTEAD = extension.WHAT, "Python launches the kernels in Triton"
PROGRAMS = ("moments", "normalize", "gradient_sums", "input_gradient")  # as host.cpp numbers them


def use(module: Any, **others: Any) -> None:
    """Give a library what it calls; `others` in place of some."""
    given = {
        "kernels": sys.modules[__name__],
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


if extension.library is not None:
    use(extension.library)


def takes(x: Tensor) -> bool:
    """As triton.takes."""
    return (x.is_cuda or triton.INTERPRETED) and type(x) in PLAIN and not is_watched() and bool(extension.library.takes(x))


def problem(device: str) -> str | None:
    """Why nothing can be compiled and run on a GPU, if so."""
    return triton.problem(device, cast(Kernels, sys.modules[__name__]))


def moments(x: Tensor) -> Tensor:
    message = extension.library.moments(x)
    return triton.moments(x) if message is None else message


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    made = None
    if running is None:
        made = extension.library.normalize(x, message, *affine, None, None, None, 0.0)
    elif running.momentum is not None:
        made = extension.library.normalize(x, message, *affine, *running)
    if made is None:
        return triton.normalize(x, message, affine, running)
    y, statistics = made
    return y, keep(affine, statistics, y)


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    made = extension.library.gradient_sums(dy, x, *saved)
    return triton.gradient_sums(dy, x, saved) if made is None else GradientSums(*made)


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    statistics, weight, bias, y, relu = saved
    dx = extension.library.input_gradient(dy, x, statistics, weight, bias, relu and y is None, message)
    return triton.input_gradient(dy, x, saved, message) if dx is None else dx
