"""The kernels compiled from cpu.c, for contiguous, channels_last and (N, C) tensors: how the library is found and called.

Requirements
    - one call of the library and no operator but the allocation of results in each function: small layers are all overhead;
    - threads are torch's, in number and in runtime: the OpenMP that torch has loaded, never a second one;
    - what the library cannot read (other strides, subclasses, tensors under a dispatch mode) is left to `aten`.
"""

import ctypes
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
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # float16 where the processor has it
FUNCTIONS = ("moments", "normalize", "gradient_sums", "input_gradient")

# What cpu.c calls a Call, and what each function reads of it.
MOMENTS = struct.Struct("6q 4P P")
NORMALIZE = struct.Struct("6q 4P 4P PqPq PqPq P2dq")
GRADIENT_SUMS = struct.Struct("6q 4P 4P PqPq PqPq")
INPUT_GRADIENT = struct.Struct("6q 4P 4P PqPq")


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
    return *planes(x), DTYPES[x.dtype], torch.get_num_threads()


def _vector(value: Tensor | None) -> tuple[int, int]:
    return (0, 0) if value is None else (value.data_ptr(), DTYPES[value.dtype])


def _is_vector(value: Tensor | None) -> bool:
    """Whether the library can read a (C,) tensor, or there is none."""
    return value is None or (value.dtype in DTYPES and is_plain(value) and value.is_contiguous())


def _is_read(running: Running) -> bool:
    """Whether the library can move the running statistics."""
    tracked = running.num_batches_tracked
    return _is_vector(running.mean) and _is_vector(running.var) and (tracked is None or tracked.dtype == torch.int64)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the sums of a batch norm layer")


def moments(x: Tensor) -> Tensor:
    message = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
    _check(library.syncbn_moments(MOMENTS.pack(*_shape(x), 0, x.data_ptr(), 0, 0, 0, message.data_ptr())))
    return message


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    weight, bias, eps, relu, residual = affine
    if not (_is_vector(weight) and _is_vector(bias)):
        return aten.normalize(x, message, affine, running)
    if running is not None and not _is_read(running):
        move(running, equations.statistics(message))
        running = None
    mean, var, tracked, momentum = (None, None, None, 0.0) if running is None else running
    assert momentum is not None or tracked is not None, "momentum=None counts batches"
    c = x.shape[1]
    y, added = torch.empty_like(x), None if residual is None else like(residual, x)
    saved = keep(affine, message.new_empty(c), message.new_empty(c), message.new_empty(()), y)
    call = NORMALIZE.pack(
        *_shape(x),
        relu,
        x.data_ptr(),
        0 if added is None else added.data_ptr(),
        0,
        y.data_ptr(),
        message.data_ptr(),
        saved.mean.data_ptr(),
        saved.invstd.data_ptr(),
        saved.count.data_ptr(),
        *_vector(weight),
        *_vector(bias),
        *_vector(mean),
        *_vector(var),
        0 if tracked is None else tracked.data_ptr(),
        eps,
        0.0 if momentum is None else momentum,
        momentum is None,
    )
    _check(library.syncbn_normalize(call))
    if mean is not None and var is not None:
        torch.autograd.graph.increment_version((mean, var) if tracked is None else (mean, var, tracked))
    return y, saved


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    mean, invstd, _, weight, bias, y, relu = saved
    given = (weight, bias) if relu and y is None else (None, None)  # by which the ReLU of x is known
    if not (_is_vector(given[0]) and _is_vector(given[1])):
        return aten.gradient_sums(dy, x, saved)
    c, dy, message = x.shape[1], like(dy, x), mean.new_empty(2 * x.shape[1])
    dtype = torch.float32 if weight is not None and torch.float64 not in (weight.dtype, x.dtype) else torch.float64
    y, passed = (None, None) if y is None else (like(y, x), torch.empty_like(x))
    sums = GradientSums(message, mean.new_empty(c, dtype=dtype), mean.new_empty(c, dtype=dtype), passed)
    call = GRADIENT_SUMS.pack(
        *_shape(x),
        relu,
        x.data_ptr(),
        dy.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if passed is None else passed.data_ptr(),
        message.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        0,
        *_vector(given[0]),
        *_vector(given[1]),
        *_vector(sums.weight),
        *_vector(sums.bias),
    )
    _check(library.syncbn_gradient_sums(call))
    return sums


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    mean, invstd, count, weight, bias, y, relu = saved
    if not (_is_vector(weight) and _is_vector(bias)):
        return aten.input_gradient(dy, x, saved, message)
    dx, dy = torch.empty_like(x), like(dy, x)
    call = INPUT_GRADIENT.pack(
        *_shape(x),
        relu and y is None,
        x.data_ptr(),
        dy.data_ptr(),
        0,
        dx.data_ptr(),
        message.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        count.data_ptr(),
        *_vector(weight),
        *_vector(bias),
    )
    _check(library.syncbn_input_gradient(call))
    return dx
