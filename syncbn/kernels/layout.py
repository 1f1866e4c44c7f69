"""How a tensor lies in memory, for kernels that read it by its address."""

import math

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether the values of x are those at its address: none are at that of a zero or of what a transform has left behind."""
    if type(x) not in PLAIN or x.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_neg() or x._is_zerotensor())


def is_watched() -> bool:
    """Whether a dispatch mode, or a transform that batches or traces, has to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (N, C, *) are its contiguous dimension, and the others in order before it."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).is_contiguous()


def planes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S) of the memory of x, contiguous or channels_last; S = 1 where channels are the contiguous dimension."""
    shape, values = x.shape, x.numel()
    n, c = shape[0], shape[1]
    if not values:
        return n, c, math.prod(shape[2:])
    return (n, c, values // (n * c)) if x.is_contiguous() else (values // c, c, 1)


def like(dy: Tensor, x: Tensor) -> Tensor:
    """dy as x lies in memory."""
    lies = dy.is_contiguous() if x.is_contiguous() else dy.stride() == x.stride()
    if lies and dy.dtype == x.dtype and is_plain(dy):
        return dy
    return torch.empty_like(x).copy_(dy)
