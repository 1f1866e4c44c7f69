"""The kernels in Triton, for CUDA devices: contiguous, channels_last and (N, C) tensors of float32, float16 or bfloat16.

Requirements
    - one launch in each of the four functions, so that with the all_reduces a layer takes three forward and three backward;
    - the same bits every time: partial sums are merged in a fixed order by the program that happens to come last;
    - nothing waits for the device; offsets are 64 bits wide where 32 do not reach;
    - values are summed in float32 about a pivot, or the mean, by lanes of some hundred values, and in float64 from there on;
    - the choice of tiles is static: ranks that tune would do so at different speeds, and others wait for them.
"""

import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from .. import equations
from . import Affine, GradientSums, Running, Saved, keep, move, programs
from .layout import is_channels_last, is_plain, is_watched, like, planes
from .tiles import PLANES, ROWS, SHORT

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # values of a tile
OPTIONS = {"enable_fp_fusion": True}  # products are added unrounded; releases of Triton differ in what they do unasked
PROGRAMS = 1024  # programs, about, that share the sums of a tensor
WIDE = 2**31 - TILE  # values that offsets of 32 bits reach

INTERPRETED = not isinstance(programs.moments, triton.JITFunction)  # on the CPU, by Triton's interpreter


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x (N, C, *) as it lies in memory, and nothing watches the operators that they replace."""
    placed = (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.shape[1] > 0
    return placed and is_plain(x) and (x.is_contiguous() or is_channels_last(x)) and not is_watched()


def _sizes(x: Tensor) -> dict[str, Any]:
    """N, C, S of the memory of x and its tiles; the choice is static, so that all ranks compile the same."""
    n, c, s = planes(x) if x.numel() else (0, x.shape[1], 1)
    if s == 1:
        block_c = min(triton.next_power_of_2(c), 64 if x.dtype == torch.float32 else 128)
        kind, block_p = ROWS, TILE // block_c
    else:
        block_c, block_p = 1, TILE if n * s > TILE // 8 else TILE // 8
        kind = PLANES if s >= TILE // 2 else SHORT
    tiles = n * -(-s // block_p) if kind is PLANES else -(-n * s // block_p)
    shape = {"n": n, "c": c, "s": s, "tiles": tiles, "KIND": kind, "IS_WIDE": x.numel() >= WIDE}
    return shape | {"BLOCKS": -(-c // block_c), "BLOCK_P": block_p, "BLOCK_C": block_c}


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrived(x: Tensor, blocks: int) -> Tensor:
    """(blocks,) int32 zeros, of the stream's own: the kernels put them back. A graph gets its own, zeroed at each replay."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(blocks, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    if key not in _counters or len(_counters[key]) < blocks:
        _counters[key] = torch.zeros(max(blocks, 4096), dtype=torch.int32, device=x.device)
    return _counters[key]


def _sums(kernel: Any, x: Tensor, *arguments: Tensor | None, **constants: Any) -> None:
    """Launch a kernel of sums with what the splits of a sum need."""
    sizes = _sizes(x)
    splits = max(1, min(sizes["tiles"], PROGRAMS // sizes["BLOCKS"]))
    partials = torch.empty(splits if splits > 1 else 0, 2, sizes["c"], dtype=torch.float64, device=x.device)
    arrived = _arrived(x, sizes["BLOCKS"] if splits > 1 else 0)
    _launch(kernel, x, sizes["BLOCKS"] * splits, *arguments, partials, arrived, splits=splits, **constants, **sizes)


def _launch(kernel: Any, x: Tensor, count: int, *arguments: Any, **sizes: Any) -> None:
    """Launch `count` programs on the device of x."""
    with torch.cuda.device_of(x):
        kernel[(count,)](*arguments, **sizes, **OPTIONS)


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
    sizes, y = _sizes(x), torch.empty_like(x)
    saved = keep(affine, torch.empty_like(message), y)
    if momentum is None:
        assert tracked is not None, "momentum=None counts batches"
        tracked.add_(message[-1] > 0)
    _launch(
        programs.normalize,
        x,
        sizes["BLOCKS"] * max(1, sizes["tiles"]),
        *(x, y, None if residual is None else like(residual, x), message, saved.statistics, _vector(weight), _vector(bias)),
        *(mean, var, tracked, *_pair(eps), *_pair(momentum or 0.0)),
        RELU=relu,
        IS_CUMULATIVE=momentum is None,
        **sizes,
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
    by_x = (_vector(weight), _vector(bias)) if relu and y is None else (None, None)
    _sums(programs.gradient_sums, x, like(dy, x), x, by_y, passed, statistics, *by_x, *sums[:3], RELU=relu and y is None)
    return sums


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    sizes, dx = _sizes(x), torch.empty_like(x)
    vectors, by_x = (_vector(saved.weight), _vector(saved.bias)), saved.relu and saved.y is None
    if x.numel():
        count = sizes["BLOCKS"] * sizes["tiles"]
        given = (like(dy, x), x, dx, message, saved.statistics, *vectors)
        _launch(programs.input_gradient, x, count, *given, RELU=by_x, **sizes)
    return dx
