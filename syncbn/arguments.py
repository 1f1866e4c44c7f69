"""What is wrong with the arguments of a batch norm, all of it known before the collective."""

import numbers
from typing import Any

import torch
from torch import Tensor

from . import collectives, kernels
from .kernels import Affine, Running

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def problem_of(x: Tensor, affine: Affine, running: Running | None, channels: int | None) -> Exception | None:
    """What is wrong with the input, the vectors and the numbers, if anything."""
    if x.is_nested or x.layout is not torch.strided:
        return TypeError(f"given a {'nested tensor' if x.is_nested else f'tensor of {x.layout}'}; expected a dense one")
    shape, device = x.shape, x.device
    if len(shape) < 2:
        return ValueError(f"given input of shape {tuple(shape)}; expected (N, C, *), 2 dimensions or more")
    if x.dtype not in FLOATING:
        return TypeError(f"given input of {x.dtype}; expected float16, bfloat16, float32 or float64")
    if affine.eps < 0:
        return ValueError(f"given eps={affine.eps}; expected 0 or more")
    if running is not None and not isinstance(running.momentum, (int, float, type(None))):
        return TypeError(f"given momentum={running.momentum!r}; expected a number, or None for the average of all batches")
    mean, var = (None, None) if running is None else running[:2]
    for name, value in (("weight", affine.weight), ("bias", affine.bias), ("running_mean", mean), ("running_var", var)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            return TypeError(f"given {name}={value!r}; expected a tensor (C,), or None")
        if value.dim() != 1 or value.numel() != shape[1]:
            return ValueError(
                f"given input of shape {tuple(shape)} and {name} of shape {tuple(value.shape)}; "
                f"expected {name} of shape {tuple(shape[1:2])}, one value per channel"
            )
        if value.device != device:
            return ValueError(f"given input on {device} and {name} on {value.device}; expected one device")
        if value.dtype not in FLOATING:
            return TypeError(f"given {name} of {value.dtype}; expected float16, bfloat16, float32 or float64")
        channels = None  # what a layer was made for, which its vectors may have been pruned from
    counted = None if running is None else running.num_batches_tracked
    if counted is not None and counted.device != device:
        return ValueError(f"given input on {device} and num_batches_tracked on {counted.device}; expected one device")
    if channels is not None and shape[1] != channels:
        return ValueError(f"given input of shape {tuple(shape)}, {shape[1]} channels; expected {channels} channels")
    return None


def eager_problem(x: Tensor, affine: Affine, running: Running | None, mask: Tensor | None, alone: bool) -> Exception | None:
    """What is wrong with where and in what the values are, which a compiler's trace does not know, if anything."""
    if running is not None and torch._C._are_functorch_transforms_active():
        for name, value in (("input", x), ("a mask", mask)):
            if value is not None and _batches(value) > _batches(running.mean):
                return ValueError(
                    f"given {name} batched by vmap and running statistics that are not, so that no single batch could move "
                    "them; expected eval mode, or track_running_stats=False"
                )
    if not alone and torch.jit.is_tracing():
        return ValueError(
            "given a trace by torch.jit.trace, which has no collectives; expected eval mode in it, or torch.compile"
        )
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        return TypeError(
            "given a DTensor; expected this rank's share of the batch as a plain tensor, x.to_local(), and the mesh dimension "
            'over which it is shared in convert(model, mesh["dp"])'
        )
    if x.is_inference() and mask is None and torch.is_grad_enabled() and _trains(affine):
        return ValueError(
            "given a tensor made inside of torch.inference_mode(), which cannot be kept for backward; expected its clone(), or "
            "a forward inside of torch.no_grad()"
        )
    if x.is_cpu:
        return None
    try:
        kernels.check_device(x)
    except ValueError as error:
        return error
    return None


def _trains(affine: Affine) -> bool:
    """Whether a vector, or what is added, needs a gradient."""
    return any(each is not None and each.requires_grad for each in (affine.weight, affine.bias, affine.residual))


def as_number(momentum: Any) -> Any:
    """A real number of any library, or a tensor () on the CPU, as a float; what is none, for `problem_of` to name, as it is."""
    if momentum is None or isinstance(momentum, (int, float)):
        return momentum
    known = isinstance(momentum, Tensor) and momentum.is_cpu and momentum.dim() == 0
    return float(momentum) if known or isinstance(momentum, numbers.Real) else momentum


def _batches(value: Tensor) -> int:
    """How many vmaps batch the value."""
    functorch, found = torch._C._functorch, 0
    while functorch.is_functorch_wrapped_tensor(value):
        found += functorch.is_batchedtensor(value)
        value = functorch.get_unwrapped(value)
    return found


def residual_problem(x: Tensor, residual: Tensor | None) -> Exception | None:
    """What is wrong with the residual, if anything."""
    if residual is None:
        return None
    if not isinstance(residual, Tensor):
        return TypeError(f"given a residual of type {type(residual).__name__}; expected a tensor of the shape of the input")
    if residual.shape != x.shape:
        return ValueError(
            f"given input of shape {tuple(x.shape)} and a residual of shape {tuple(residual.shape)}; expected one shape"
        )
    if residual.dtype != x.dtype:
        return TypeError(f"given input of {x.dtype} and a residual of {residual.dtype}; expected one dtype")
    if residual.device != x.device:
        return ValueError(f"given input on {x.device} and a residual on {residual.device}; expected one device")
    return None


def mask_problem(x: Tensor, mask: Tensor | None) -> Exception | None:
    """What is wrong with the mask, if anything."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return TypeError(f"given a mask of type {type(mask).__name__}; expected a tensor of torch.bool")
    if mask.dtype != torch.bool:
        return TypeError(f"given a mask of {mask.dtype}; expected torch.bool, true at the positions that count")
    allowed = [(*x.shape[:1], *x.shape[2:]), (*x.shape[:1], 1, *x.shape[2:])]
    if all(mask.shape != shape for shape in allowed):  # which a trace guards, where a size of one is symbolic
        return ValueError(
            f"given input of shape {tuple(x.shape)} and a mask of shape {tuple(mask.shape)}; "
            f"expected a mask of shape {allowed[0]} or {allowed[1]}"
        )
    if mask.device != x.device:
        return ValueError(f"given input on {x.device} and a mask on {mask.device}; expected one device")
    return None


def half_tracked(layer: str) -> ValueError:
    """For running statistics of which one is missing."""
    return ValueError(f"given one of running_mean and running_var; expected both or neither ({where(layer)})")


def where(layer: str) -> str:
    """The end of an error message: which layer, on which rank."""
    rank, size = collectives.rank_and_size()
    return f"layer {layer!r}, rank {rank} of {size}"
