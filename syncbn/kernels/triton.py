"""The kernels in Triton, for CUDA devices: contiguous, channels_last and (N, C) tensors of float32, float16 or bfloat16.

Requirements
    - one launch in each of the four functions, so that with the all_reduces a layer takes three forward and three backward;
    - the same bits every time: partial sums are merged in a fixed order by the program that happens to come last;
    - nothing waits for the device; offsets are 64 bits wide where 32 do not reach;
    - values are summed in float32 about a pivot, or the mean, by lanes of some hundred values, and in float64 from there on;
    - Triton inspects a program's arguments only when it has to compile: doing so at each launch costs more than the launch.
"""

import functools
import math
import struct
import sys
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from .. import equations
from . import Affine, GradientSums, Kernels, Running, Saved, keep, move, plans, programs
from .layout import is_channels_last, is_plain, is_watched, like, planes
from .plans import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WHAT, INSTEAD = "the kernels in Triton do not work here", "batch norm is composed of PyTorch's operators"
OPTIONS = {"enable_fp_fusion": True}  # products are added unrounded; releases of Triton differ in what they do unasked

HOOKS = triton.knobs.runtime  # what has those that Triton calls at a launch
INTERPRETED = not isinstance(programs.moments, triton.JITFunction)  # on the CPU, by Triton's interpreter


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x (N, C, *) as it lies in memory, and nothing watches the operators that they replace."""
    placed = (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.shape[1] > 0
    return placed and is_plain(x) and (x.is_contiguous() or is_channels_last(x)) and not is_watched()


def problem(device: str, kernels: Kernels | None = None) -> str | None:
    """Why nothing can be compiled and run on a GPU, by these functions or those of this file, if so."""
    compute = kernels or cast(Kernels, sys.modules[__name__])
    if torch.version.hip is not None:
        return "they were never run on an AMD GPU"
    try:
        x = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)  # which older GPUs lack
        for _ in range(2):  # what Triton compiles it launches itself, from then on we do
            compute.normalize(x, compute.moments(x), Affine(None, None, 1.0), None)
    except Exception as error:  # whatever a compiler, a linker or a driver raises
        if "out of memory" in str(error) or isinstance(error, torch.OutOfMemoryError):  # no fault of the kernels
            raise
        first = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        return f"{first}; Triton needs a C compiler on the path and the headers of Python"
    return None


class Workspace(NamedTuple):
    """What the sums on a stream need, one after another."""

    counters: Tensor  # int32 zeros, which the kernels put back
    partials: Tensor  # float64
    sizes: tuple[int, int]


_workspaces: dict[tuple[int, int], Workspace] = {}  # by device and stream


def workspace(x: Tensor, counters: int, partials: int) -> Workspace:
    """Of the current stream, at least as large. A graph gets its own, zeroed at each replay."""
    device = x.get_device()
    captured = device >= 0 and torch.cuda.is_current_stream_capturing()
    key = device, stream(device)
    found = None if captured else _workspaces.get(key)
    if found is None or found.sizes[0] < counters or found.sizes[1] < partials:
        sizes = (counters, partials) if captured else (max(counters, 2**12), max(partials, 2**18))
        zeros = torch.zeros(sizes[0], dtype=torch.int32, device=x.device)
        found = Workspace(zeros, torch.empty(sizes[1], dtype=torch.float64, device=x.device), sizes)
        if not captured:
            _workspaces[key] = found
    return found


def stream(device: int) -> int:
    """The address of the current stream of a GPU, and of a CPU, which has none, 0."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


def _is_elsewhere(device: int) -> bool:
    """Whether another device is the current one."""
    return device >= 0 and device != torch._C._cuda_getDevice()


class Launcher(NamedTuple):
    """What Triton compiled, and what it launches that by: its own call makes objects for hooks, most often of nobody."""

    compiled: Any
    run: Any
    function: Any
    metadata: Any


# By all that Triton compiles for, the size of integers included.
_launchers: dict[tuple[Any, ...], Launcher] = {}


def _has_hooks() -> bool:
    """Whether someone, such as a profiler, wants to be called at each launch."""
    return any(getattr(hook, "calls", hook) for hook in (HOOKS.launch_enter_hook, HOOKS.launch_exit_hook))


def launch(
    kernel: Any,
    x: Tensor,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    more: tuple[float, ...] = (),  # numbers of the kernel's own
    constants: tuple[bool, ...] = (),
) -> Launcher | None:
    """Launch a kernel over the tiles of x, on its device and the current stream; by what from then on, unless by Triton."""
    device = x.get_device()
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return launch(kernel, x, plan, tensors, more, constants)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    odd = None  # which of them 16 bytes do not divide
    if math.gcd(16, *filter(None, pointers)) < 16:
        odd = tuple([pointer is not None and pointer % 16 > 0 for pointer in pointers])
    key = (kernel.__name__, device, dtypes, odd, plan.is_long, constants, plan.cut)
    known = _launchers.get(key)
    others = (*more, *plan.numbers, *constants, *plan.cut)
    if known is None:
        compiled = kernel[plan.grid](*tensors, *others, **OPTIONS)
        if not INTERPRETED:
            known = Launcher(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            _launchers[key] = known
        return known
    # By addresses: where tensors are Triton would ask the driver.
    arguments, current = (*pointers, *others), stream(device)
    if _has_hooks():
        known.compiled[plan.grid](*arguments, stream=current)
    else:
        known.run(*plan.grid, current, known.function, known.metadata, None, None, None, *arguments)
    return known


def _sums(kernel: Any, x: Tensor, *arguments: Tensor | None, constants: tuple[bool, ...] = ()) -> None:
    """Launch a kernel of sums with what the splits of a sum need."""
    if _is_elsewhere(x.get_device()):
        with torch.cuda.device(x.device):
            _sums(kernel, x, *arguments, constants=constants)
        return
    plan = plans.of(*planes(x), x.itemsize).sums
    counters, partials, _ = workspace(x, plan.counters, plan.partials)
    launch(kernel, x, plan, (*arguments, partials, counters), (plan.team,), constants)


def _is_vector(value: Tensor) -> bool:
    """Whether the kernels can read a (C,) tensor."""
    return is_plain(value) and value.is_contiguous()


def _vector(value: Tensor | None) -> Tensor | None:
    """A (C,) parameter as the kernels can read it. ATen's would do, but for its ReLU, whose zeros are not quite the same."""
    if value is None or _is_vector(value):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


@functools.lru_cache(256)
def _pair(value: float) -> tuple[float, float]:
    """A float as the sum of two that float32 holds, as Triton passes them."""
    value = float(value)  # NumPy's are no numbers to Triton
    if not math.isfinite(value):
        return value, 0.0
    (hi,) = struct.unpack("f", struct.pack("f", value))
    return hi, value - hi


def moments(x: Tensor) -> Tensor:
    message = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    _sums(programs.moments, x, x, message)
    return message


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    weight, bias, eps, relu, residual = affine
    if running is not None and not (_is_vector(running.mean) and _is_vector(running.var)):
        move(running, equations.statistics(message))
        running = None
    mean, var, tracked, momentum = (None, None, None, 0.0) if running is None else running
    y = torch.empty_like(x)
    saved = keep(affine, torch.empty_like(message), y)
    if momentum is None:
        assert tracked is not None, "momentum=None counts batches"
        tracked.add_(message[-1] > 0)
    added = None if residual is None else like(residual, x)
    vectors = (_vector(weight), _vector(bias), mean, var, tracked)
    launch(
        programs.normalize,
        x,
        plans.of(*planes(x), x.itemsize).elements,
        (x, y, added, message, saved.statistics, *vectors),
        (*_pair(eps), *_pair(momentum or 0.0)),
        (relu, momentum is None),
    )
    if mean is not None and var is not None:
        torch.autograd.graph.increment_version((mean, var) if tracked is None else (mean, var, tracked))
    return y, saved


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    statistics, weight, bias, y, relu = saved
    c, dtype = x.shape[1], torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
    passed = None if y is None else torch.empty_like(x)
    dweight, dbias = statistics.new_empty(c, dtype=dtype), statistics.new_empty(c, dtype=dtype)
    sums = GradientSums(statistics.new_empty(2 * c), dweight, dbias, passed)
    by_y = None if y is None else like(y, x)
    by_x = relu and y is None
    vectors = (_vector(weight), _vector(bias)) if by_x else (None, None)
    given = (like(dy, x), x, by_y, passed, statistics, *vectors, *sums[:3])
    _sums(programs.gradient_sums, x, *given, constants=(by_x,))
    return sums


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel():
        given = (like(dy, x), x, dx, message, saved.statistics, _vector(saved.weight), _vector(saved.bias))
        launch(
            programs.input_gradient,
            x,
            plans.of(*planes(x), x.itemsize).elements,
            given,
            constants=(saved.relu and saved.y is None,),
        )
    return dx
