"""The kernels compiled from cpu*.c, for contiguous, channels_last and (N, C) tensors: how the library is found and called.

Requirements
    - one call of the library and no operator but the allocation of results in each function: small layers are all overhead;
    - threads are torch's, in number and in runtime: the OpenMP that torch has loaded, never a second one;
    - what the library cannot read (other strides, subclasses, tensors under a dispatch mode) is left to `aten`.
"""

import ctypes
import functools
import os
import struct
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import equations
from . import Affine, GradientSums, Running, Saved, aten, keep, move
from .layout import is_channels_last, is_plain, is_watched, like, planes

LIBRARY = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # float16 where the processor converts it
NONE = (0, 0)  # a vector that is not there
FUNCTIONS = ("moments", "normalize", "gradient_sums", "input_gradient")

# What cpu.c calls a Call, and what each function reads of it.
MOMENTS = struct.Struct("6q 4P P")
NORMALIZE = struct.Struct("6q 4P 2P PqPq PqPq P2dq")
GRADIENT_SUMS = struct.Struct("6q 4P 2P PqPq PqPq")
INPUT_GRADIENT = struct.Struct("6q 4P 2P PqPq")


def load() -> Any:
    """The library, on torch's threads; None if it was not built."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        functions = [getattr(library, f"syncbn_{name}") for name in FUNCTIONS]
    except (OSError, AttributeError):
        return None
    for function in functions:
        function.argtypes = [ctypes.c_char_p]
    if not library.syncbn_has_float16():
        DTYPES.pop(torch.float16, None)
    use_threads(library)
    return library


def use_threads(library: Any) -> None:
    """Give the library the OpenMP functions that torch's own library has found; without them it stays on one thread.

    A forked child stays on one: the runtime's threads are not in it, and to wait for them would hang.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    library.syncbn_threads.argtypes = [ctypes.c_char_p]
    try:
        runtime = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        found = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):
        return
    library.syncbn_threads(struct.pack("3P", *found))
    os.register_at_fork(after_in_child=lambda: library.syncbn_threads(bytes(struct.calcsize("3P"))))


library = load()


def takes(x: Tensor) -> bool:
    """Whether the library can read x (N, C, *) as it lies in memory, and nothing watches the operators that it replaces."""
    return x.dtype in DTYPES and is_plain(x) and (x.is_contiguous() or is_channels_last(x)) and not is_watched()


def _shape(x: Tensor) -> tuple[int, int, int, int, int]:
    """N, C, S of the memory of x, its dtype, and how many threads there are for it."""
    n, c, s = planes(x)
    return n, c, s, DTYPES[x.dtype], torch.get_num_threads()


def _vectors(*values: Tensor | None) -> list[int] | None:
    """Address and dtype of (C,) tensors, zeros for none; None if there is one that the library cannot read."""
    found: list[int] = []
    for value in values:
        if value is None:
            found += NONE
            continue
        dtype = DTYPES.get(value.dtype)
        if dtype is None or not is_plain(value) or not value.is_contiguous():
            return None
        found += value.data_ptr(), dtype
    return found


@functools.cache
def _model(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")


def _new(size: int, dtype: torch.dtype) -> Tensor:
    """An empty vector, by the operator that makes y and dx: where no operator is in a cache, another costs as much again."""
    return torch.empty_like(_model(size, dtype))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the sums of a batch norm layer")


def moments(x: Tensor) -> Tensor:
    message = _new(2 * x.shape[1] + 1, torch.float64)
    _check(library.syncbn_moments(MOMENTS.pack(*_shape(x), 0, x.data_ptr(), 0, 0, 0, message.data_ptr())))
    return message


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    weight, bias, eps, relu, residual = affine
    mean, var, tracked, momentum = (None, None, None, 0.0) if running is None else running
    vectors = _vectors(weight, bias, mean, var)
    if vectors is None or (tracked is not None and tracked.dtype != torch.int64):
        return _normalize_apart(x, message, affine, running)
    assert momentum is not None or tracked is not None, "momentum=None counts batches"
    y, added = torch.empty_like(x), None if residual is None else like(residual, x)
    saved = keep(affine, torch.empty_like(message), y)
    call = NORMALIZE.pack(
        *_shape(x),
        relu,
        x.data_ptr(),
        0 if added is None else added.data_ptr(),
        0,
        y.data_ptr(),
        message.data_ptr(),
        saved.statistics.data_ptr(),
        *vectors,
        0 if tracked is None else tracked.data_ptr(),
        eps,
        0.0 if momentum is None else momentum,
        momentum is None,
    )
    _check(library.syncbn_normalize(call))
    if mean is not None and var is not None:
        torch.autograd.graph.increment_version((mean, var) if tracked is None else (mean, var, tracked))
    return y, saved


def _normalize_apart(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    """What the library cannot read is left to torch's operators: parameters with the elements, buffers by themselves."""
    if _vectors(affine.weight, affine.bias) is None:
        return aten.normalize(x, message, affine, running)
    assert running is not None, "nothing else is left"
    move(running, equations.statistics(message))
    return normalize(x, message, affine, None)


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    statistics, weight, bias, y, relu = saved
    vectors = _vectors(weight, bias) if relu and y is None else (*NONE, *NONE)  # by which the ReLU of x is known
    if vectors is None:
        return aten.gradient_sums(dy, x, saved)
    dtype = torch.float32 if weight is not None and torch.float64 not in (weight.dtype, x.dtype) else torch.float64
    c, dy, passed = x.shape[1], like(dy, x), None
    if y is not None:
        y, passed = like(y, x), torch.empty_like(x)
    dweight = _new(c, dtype)
    sums = GradientSums(_new(2 * c, torch.float64), dweight, torch.empty_like(dweight), passed)
    call = GRADIENT_SUMS.pack(
        *_shape(x),
        relu,
        x.data_ptr(),
        dy.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if passed is None else passed.data_ptr(),
        sums.message.data_ptr(),
        statistics.data_ptr(),
        *vectors,
        dweight.data_ptr(),
        DTYPES[dtype],
        sums.bias.data_ptr(),
        DTYPES[dtype],
    )
    _check(library.syncbn_gradient_sums(call))
    return sums


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    vectors = _vectors(saved.weight, saved.bias)
    if vectors is None:
        return aten.input_gradient(dy, x, saved, message)
    dx, dy = torch.empty_like(x), like(dy, x)
    call = INPUT_GRADIENT.pack(
        *_shape(x),
        saved.relu and saved.y is None,
        x.data_ptr(),
        dy.data_ptr(),
        0,
        dx.data_ptr(),
        message.data_ptr(),
        saved.statistics.data_ptr(),
        *vectors,
    )
    _check(library.syncbn_input_gradient(call))
    return dx
