"""The kernels in Triton, for CUDA devices: contiguous, channels_last and (N, C) tensors of float32, float16 or bfloat16.

Requirements
    - one launch in each of the four functions, so that with the all_reduces a layer takes three forward and three backward;
    - the same bits every time: partial sums are merged in a fixed order by the program that happens to come last;
    - nothing waits for the device; offsets are 64 bits wide where 32 do not reach;
    - values are summed in float32 about a pivot, or the mean, by lanes of some hundred values, and in float64 from there on;
    - the choice of tiles is static: ranks that tune would do so at different speeds, and others wait for them;
    - no program adds more than TILES tiles in float32, and what all of them leave is added by teams, not by the last one alone;
    - Triton looks at the arguments of a program when it has to compile: else they cost more than the launch.
"""

import functools
import math
import operator
import struct
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import equations
from . import Affine, GradientSums, Running, Saved, keep, move, programs
from .layout import is_channels_last, is_plain, is_watched, like, planes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = 8  # of a tile of planes, if they are long enough
SHORT = 128  # values of a plane, at most
TILES = 256  # of a program, at most: what a lane adds in float32
TEAM = 16  # splits whose sums one program adds without a team
OPTIONS = {"enable_fp_fusion": True}  # products are added unrounded; releases of Triton differ in what they do unasked
WIDE = 2**31 - 2**26  # values that offsets of 32 bits reach, those of a program's next tiles, past the end, included

INTERPRETED = not isinstance(programs.moments, triton.JITFunction)  # on the CPU, by Triton's interpreter


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x (N, C, *) as it lies in memory, and nothing watches the operators that they replace."""
    placed = (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.shape[1] > 0
    return placed and is_plain(x) and (x.is_contiguous() or is_channels_last(x)) and not is_watched()


def problem(device: str) -> str | None:
    """Why nothing can be compiled and run on a GPU, if so."""
    if torch.version.hip is not None:
        return "they were never run on an AMD GPU"
    try:
        x = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)  # which older GPUs lack
        normalize(x, moments(x), Affine(None, None, 1.0), None)
    except torch.OutOfMemoryError:  # no fault of the kernels
        raise
    except Exception as error:  # whatever a compiler, a linker or a driver raises
        first = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        return f"{first}; Triton needs a C compiler on the path and the headers of Python"
    return None


class Share(NamedTuple):
    """How a function shares out a tensor; chosen by hand on an H200."""

    tile: int  # values of a tile, at most
    row: int  # bytes of a tile that are one piece of a row of channels
    programs: int  # about, that share the tiles


def _shares(s: int, itemsize: int) -> tuple[Share, Share]:
    """Of what adds and of what does not: as many programs as the multiprocessors of an H100 or H200 hold at once.

    One wave of programs: a second one would start when the first ends, and take as long to its first value and from its last.
    What programs of sums leave for the last one is less if there are few of them, and each has few channels; but short planes,
    of which a thread loads one value at a time, want many threads.
    """
    if s == 1:
        return Share(1024, 64, 528), Share(4096 // itemsize, 128, 924)
    return Share(1024, 0, 924) if s <= SHORT else Share(2048, 0, 528), Share(4096 // itemsize, 0, 924)


class Tiles(NamedTuple):
    """How a tensor (N, C, S) is cut, for any N; the constants of a program, as tiles.py has them."""

    IS_ROWS: bool
    IS_WIDE: bool
    UNIT: int
    BLOCK_P: int
    BLOCK_C: int


def _tiles(c: int, s: int, itemsize: int, is_wide: bool, share: Share) -> Tiles:
    """Static, so that all ranks compile the same. In small planes a thread has values, and so registers, of many channels."""
    channels, plane, tile = triton.next_power_of_2(c), triton.next_power_of_2(s), share.tile
    if s == 1:
        block_c = min(channels, share.row // itemsize, tile)
        return Tiles(True, is_wide, math.gcd(c, 16), tile // block_c, block_c)
    block_p = min(plane, max(tile // CHANNELS, tile // channels))
    values = tile if plane > tile // 16 else tile // 2
    return Tiles(False, is_wide, math.gcd(s, 16), block_p, min(channels, max(1, values // block_p), 256))


class Plan(NamedTuple):
    """The launch of a kernel over the tiles of a tensor."""

    numbers: tuple[int, int, int, int, int]  # N, C, S, tiles, splits
    cut: Tiles
    is_long: tuple[bool, bool]  # whether N and S take 64 bits
    grid: tuple[int, int, int]
    team: int  # splits, of which one program adds the sums
    counters: int  # of the programs that have arrived, one for each team and one for all teams, by block of channels
    partials: int  # float64 values of partial sums


class Plans(NamedTuple):
    """Of the functions that add and of those that do not."""

    sums: Plan
    elements: Plan


def _planned(n: int, c: int, s: int, itemsize: int, share: Share) -> Plan:
    cut = _tiles(c, s, itemsize, n * c * s >= WIDE, share)
    blocks = -(-c // cut.BLOCK_C)
    tiles = -(-n // cut.BLOCK_P) if cut.IS_ROWS else n * -(-s // cut.BLOCK_P)
    splits = max(1, min(tiles, share.programs // blocks), -(-tiles // TILES))
    team = splits if splits <= TEAM else math.isqrt(splits - 1) + 1
    teams = -(-splits // team)
    counters, rows = (blocks * (1 + teams), splits + teams) if splits > 1 else (0, 0)
    return Plan((n, c, s, tiles, splits), cut, (n >= 2**31, s >= 2**31), (blocks * splits, 1, 1), team, counters, 2 * c * rows)


@functools.lru_cache(4096)
def _plans(n: int, c: int, s: int, itemsize: int) -> Plans:
    n, s = (n, s) if n * s else (0, 1)
    return Plans(*(_planned(n, c, s, itemsize, share) for share in _shares(s, itemsize)))


class Workspace(NamedTuple):
    """What the sums on a stream need, one after another."""

    counters: Tensor  # int32 zeros, which the kernels put back
    partials: Tensor  # float64
    sizes: tuple[int, int]


_workspaces: dict[tuple[int, int], Workspace] = {}  # by device and stream


def _workspace(x: Tensor, counters: int, partials: int) -> Workspace:
    """Of the current stream, at least as large. A graph gets its own, zeroed at each replay."""
    device = x.get_device()
    captured = device >= 0 and torch.cuda.is_current_stream_capturing()
    key = device, _stream(device)
    found = None if captured else _workspaces.get(key)
    if found is None or found.sizes[0] < counters or found.sizes[1] < partials:
        sizes = (counters, partials) if captured else (max(counters, 2**12), max(partials, 2**18))
        zeros = torch.zeros(sizes[0], dtype=torch.int32, device=x.device)
        found = Workspace(zeros, torch.empty(sizes[1], dtype=torch.float64, device=x.device), sizes)
        if not captured:
            _workspaces[key] = found
    return found


def _stream(device: int) -> int:
    """The address of the current stream of a GPU, and of a CPU, which has none, 0."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


def _is_elsewhere(device: int) -> bool:
    """Whether another device is the current one."""
    return device >= 0 and device != torch._C._cuda_getDevice()


def _sums(kernel: Any, x: Tensor, *arguments: Tensor | None, constants: tuple[bool, ...] = ()) -> None:
    """Launch a kernel of sums with what the splits of a sum need."""
    if _is_elsewhere(x.get_device()):
        with torch.cuda.device(x.device):
            return _sums(kernel, x, *arguments, constants=constants)
    plan = _plans(*planes(x), x.itemsize).sums
    counters, partials, _ = _workspace(x, plan.counters, plan.partials)
    return _launch(kernel, x, plan, (*arguments, partials, counters), (plan.team,), constants)


# What Triton compiled, by all that it compiles for, the size of integers included.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    x: Tensor,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    more: tuple[float, ...] = (),  # numbers of the kernel's own
    constants: tuple[bool, ...] = (),
) -> None:
    """Launch a kernel over the tiles of x, on its device and the current stream."""
    device = x.get_device()
    if _is_elsewhere(device):
        with torch.cuda.device(device):
            return _launch(kernel, x, plan, tensors, more, constants)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    odd = None  # which of them 16 bytes do not divide
    if functools.reduce(operator.or_, filter(None, pointers), 0) % 16:
        odd = tuple([pointer is not None and pointer % 16 > 0 for pointer in pointers])
    key = (kernel.__name__, device, dtypes, odd, plan.is_long, constants, plan.cut)
    known = _compiled.get(key)
    others = (*more, *plan.numbers, *constants, *plan.cut)
    if known is None:
        _compiled[key] = kernel[plan.grid](*tensors, *others, **OPTIONS)
    else:  # addresses, of which Triton would ask the driver where they are if they were tensors
        known[plan.grid](*pointers, *others, stream=_stream(device))
    return None


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
        _plans(*planes(x), x.itemsize).elements,
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
        _launch(
            programs.input_gradient,
            x,
            _plans(*planes(x), x.itemsize).elements,
            given,
            constants=(saved.relu and saved.y is None,),
        )
    return dx
