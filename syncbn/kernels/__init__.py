"""The compute seam: four functions over one share of the batch, and the choice of who computes them.

    moments(x) → message                                   reduce: [S1, S2, n], (2C+1,) float64
    normalize(x, message, affine, running) → y, saved      apply; writes the running statistics when they are given
    gradient_sums(dy, x, saved) → sums                     reduce: [G1, G2], (2C,) float64, and the local dγ, dβ
    input_gradient(dy, x, saved, message) → dx             apply

With a ReLU behind it, normalize gives y = max(γ·x̂ + β + residual, 0), and backward lets dy pass only where y > 0. Without a
residual, gradient_sums and input_gradient find the sign from x again. With one, gradient_sums takes the sign of y and returns
the dy that passed, which input_gradient is given in place of dy.

`syncbn.equations` is the reference that every implementation is tested against. All of them keep the strides that
`torch.empty_like` gives, return the dtype of x, and never wait for the device.
"""

import functools
import logging
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..equations import Statistics, running_statistics
from . import extension

# CUDA tensors of this many bytes or more go to the kernels in Triton: all of them (benchmarks/results/layer_cuda.csv).
TRITON_FROM_BYTES = 0.0


class Affine(NamedTuple):
    """What is applied to the normalized value."""

    weight: Tensor | None  # (C,) any floating dtype
    bias: Tensor | None  # (C,) any floating dtype
    eps: float
    relu: bool = False
    residual: Tensor | None = None  # (N, C, *) in the dtype of x; added before the ReLU, and never without one


class Running(NamedTuple):
    """The buffers that `normalize` moves in place, and how far."""

    mean: Tensor  # (C,) any floating dtype
    var: Tensor  # (C,)
    num_batches_tracked: Tensor | None  # () int64; advances by one if the batch has a value
    momentum: float | None  # None: 1 / num_batches_tracked, the cumulative average


class Saved(NamedTuple):
    """What backward needs beside x: copies, never the buffers."""

    statistics: Tensor  # (2C+1,) float64 [mean, invstd, n] of the whole batch
    weight: Tensor | None  # (C,)
    bias: Tensor | None = None  # (C,) where a ReLU goes by x
    y: Tensor | None = None  # (N, C, *) where it goes by y
    relu: bool = False


class GradientSums(NamedTuple):
    """The message of backward and, from the same sums, the share's own parameter gradients."""

    message: Tensor  # (2C,) float64 [G1, G2]
    weight: Tensor  # (C,) local dγ, float64, or float32 where neither x nor weight is float64
    bias: Tensor  # (C,) local dβ, of the same dtype
    dy: Tensor | None = None  # (N, C, *) what the ReLU leaves of it, where it goes by y; the gradient of the residual


class Kernels(Protocol):
    """The seam as a type; a module is one."""

    def moments(self, x: Tensor) -> Tensor: ...
    def normalize(self, x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]: ...
    def gradient_sums(self, dy: Tensor, x: Tensor, saved: Saved) -> GradientSums: ...
    def input_gradient(self, dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor: ...


class Compiled(Kernels, Protocol):
    """Kernels that do not take every tensor."""

    def takes(self, x: Tensor) -> bool: ...


def keep(affine: Affine, statistics: Tensor, y: Tensor) -> Saved:
    """What backward needs: no y but for the sign of a sum, no bias but for that of the normalized values."""
    by_y = affine.residual is not None
    bias = affine.bias if affine.relu and not by_y else None
    return Saved(statistics, affine.weight, bias, y if by_y else None, affine.relu)


def move(running: Running, stats: Statistics) -> None:
    """Move the running statistics in place, in float64, by a factor that stays on the device."""
    factor: float | Tensor
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(stats.count > 0)
    if running.momentum is not None:
        factor = running.momentum
    else:
        assert running.num_batches_tracked is not None, "momentum=None counts batches"
        factor = running.num_batches_tracked.clamp(min=1).double().reciprocal()
    mean, var = running_statistics(running.mean, running.var, stats, factor)
    running.mean.copy_(mean)
    running.var.copy_(var)


@functools.cache
def has_float64(device_type: str) -> bool:
    """Whether the device can hold the float64 messages."""
    try:
        torch.empty(0, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return False
    return True


@functools.cache
def composed() -> Kernels:
    """The kernels of every device."""
    from . import aten

    return cast(Kernels, aten)


@functools.cache
def compiled() -> Compiled | None:
    """The compiled kernels of the CPU; None, said once in the log, where the library was not built."""
    from . import cpu

    if cpu.library is not None:
        return cast(Compiled, cpu)
    logging.getLogger("syncbn").warning(
        "the compiled CPU kernels are not there (%s): batch norm is composed of PyTorch's operators, with the same results but "
        "slower; install again with gcc or clang on the path to build them",
        cpu.LIBRARY,
    )
    return None


_tried: dict[tuple[int | None, bool], Compiled | None] = {}  # by GPU, None: whether Triton is installed; and by the library


def in_triton(gpu: int | None = None) -> Compiled | None:
    """The kernels of CUDA devices; None where Triton is not installed and, said once in the log, where it fails on the GPU.

    Nothing can be tried while a graph is captured: until a forward outside of one has, None.
    """
    key = gpu, extension.library is not None
    if key in _tried:
        return _tried[key]
    try:
        from . import host, triton
    except ImportError:
        _tried[key] = None
        return None
    if gpu is not None and torch.cuda.is_current_stream_capturing():
        return None
    found = None
    for fast in (triton,) if extension.library is None else (host, triton):
        problem = None if gpu is None else fast.problem(f"cuda:{gpu}")
        if problem is None:
            found = cast(Compiled, fast)
            break
        logging.getLogger("syncbn").warning("%s (%s): %s, with the same results but slower", fast.WHAT, problem, fast.INSTEAD)
    _tried[key] = found
    return found


def check_device(x: Tensor) -> None:
    """ValueError if the device of x has no float64."""
    if not has_float64(x.device.type):
        raise ValueError(
            f"given input on device {str(x.device)!r}, which has no float64; "
            "expected a device that has it, since statistics are reduced in float64: train on the CPU or a CUDA device"
        )


def pick(x: Tensor) -> Kernels:
    """The kernels for x, whose device has float64."""
    if x.is_cpu:
        fast = compiled()
        if fast is not None and fast.takes(x):
            return fast
    elif x.is_cuda and x.nbytes >= TRITON_FROM_BYTES:
        fast = in_triton()
        if fast is not None and fast.takes(x) and in_triton(x.get_device()) is not None:
            return fast
    return composed()
