"""The kernels in Triton, for CUDA devices: contiguous, channels_last and (N, C) tensors of float32, float16 or bfloat16.

Requirements
    - one launch in each of the four functions, so that with the all_reduces a layer takes three forward and three backward;
    - the same bits every time: partial sums are merged in a fixed order by the program that happens to come last;
    - nothing waits for the device; offsets are 64 bits wide where 32 do not reach;
    - values are summed in float32 about a pivot, or the mean, by lanes of some hundred values, and in float64 from there on;
    - the choice of tiles is static: ranks that tune would do so at different speeds, and others wait for them;
    - Triton looks at the arguments of a program when it has to compile: else they cost more than the launch.
"""

import functools
import math
import struct
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import equations
from . import Affine, GradientSums, Running, Saved, keep, move, programs
from .layout import is_channels_last, is_plain, is_watched, like, planes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # values of a tile, at most
OPTIONS = {"enable_fp_fusion": True}  # products are added unrounded; releases of Triton differ in what they do unasked
PROGRAMS = 1024  # programs, about, that share the tiles of a tensor
WIDE = 2**31 - TILE  # values that offsets of 32 bits reach

INTERPRETED = not isinstance(programs.moments, triton.JITFunction)  # on the CPU, by Triton's interpreter


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x (N, C, *) as it lies in memory, and nothing watches the operators that they replace."""
    placed = (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.shape[1] > 0
    return placed and is_plain(x) and (x.is_contiguous() or is_channels_last(x)) and not is_watched()


class Tiles(NamedTuple):
    """How a tensor (N, C, S) is cut, for any N; the constants of a program, as tiles.py has them."""

    IS_ROWS: bool
    IS_WIDE: bool
    UNIT: int
    BLOCK_P: int
    BLOCK_C: int


@functools.cache
def _tiles(c: int, s: int, dtype: torch.dtype, is_wide: bool, tile: int) -> Tiles:
    """Static, so that all ranks compile the same. In small planes a thread has values, and so registers, of many channels."""
    channels, plane = triton.next_power_of_2(c), triton.next_power_of_2(s)
    if s == 1:
        block_c = min(channels, 64 if dtype == torch.float32 else 128, tile)
        return Tiles(True, is_wide, math.gcd(c, 16), tile // block_c, block_c)
    block_p = min(plane, max(tile // 8, tile // channels))
    values = tile if plane >= tile // 16 else tile // 2
    return Tiles(False, is_wide, math.gcd(s, 16), block_p, min(channels, max(1, values // block_p), 256))


class Plan(NamedTuple):
    """The launch of a kernel over the tiles of a tensor."""

    numbers: tuple[int, int, int, int, int]  # N, C, S, tiles, splits
    cut: Tiles
    blocks: int  # of channels


def _plan(x: Tensor) -> Plan:
    n, c, s = planes(x) if x.numel() else (0, x.shape[1], 1)
    cut = _tiles(c, s, x.dtype, x.numel() >= WIDE, TILE)
    blocks = -(-c // cut.BLOCK_C)
    tiles = -(-n // cut.BLOCK_P) if cut.IS_ROWS else n * -(-s // cut.BLOCK_P)
    return Plan((n, c, s, tiles, max(1, min(tiles, PROGRAMS // blocks))), cut, blocks)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrived(x: Tensor, blocks: int) -> Tensor:
    """(blocks,) int32 zeros, of the stream's own: the kernels put them back. A graph gets its own, zeroed at each replay."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(blocks, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    if key not in _counters or len(_counters[key]) < blocks:
        _counters[key] = torch.zeros(max(blocks, 4096), dtype=torch.int32, device=x.device)
    return _counters[key]


def _sums(kernel: Any, x: Tensor, *arguments: Tensor | None, constants: tuple[bool, ...] = ()) -> None:
    """Launch a kernel of sums with what the splits of a sum need."""
    plan = _plan(x)
    splits = plan.numbers[-1]
    partials = torch.empty(splits if splits > 1 else 0, 2, x.shape[1], dtype=torch.float64, device=x.device)
    arrived = _arrived(x, plan.blocks if splits > 1 else 0)
    _launch(kernel, x, plan, (*arguments, partials, arrived), constants=constants)


# What Triton compiled, by all that it compiles for, the size of integers included.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    x: Tensor,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    floats: tuple[float, ...] = (),
    constants: tuple[bool, ...] = (),
) -> None:
    """Launch a kernel over the tiles of x, on its device."""
    numbers, cut, blocks = plan
    arguments = (*tensors, *floats, *numbers, *constants, *cut)
    grid = (blocks * numbers[-1], 1, 1)
    looks = tuple(None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors)
    key = (kernel.__name__, x.device, looks, numbers[0] >= 2**31, constants, cut)
    with torch.cuda.device_of(x):
        known = _compiled.get(key)
        if known is None:
            _compiled[key] = kernel[grid](*arguments, **OPTIONS)
        else:
            known[grid](*arguments)


def _is_vector(value: Tensor) -> bool:
    """Whether the kernels can read a (C,) tensor."""
    return is_plain(value) and value.is_contiguous()


def _vector(value: Tensor | None) -> Tensor | None:
    """A (C,) parameter as the kernels can read it. ATen's would do, but for its ReLU, whose zeros are not quite the same."""
    if value is None or _is_vector(value):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


def _pair(value: float) -> tuple[float, float]:
    """A float as the sum of two that float32 holds, as Triton passes them."""
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
    _launch(
        programs.normalize,
        x,
        _plan(x),
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
    dweight, dbias = (statistics.new_empty(c, dtype=dtype) for _ in range(2))
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
        _launch(programs.input_gradient, x, _plan(x), given, constants=(saved.relu and saved.y is None,))
    return dx
