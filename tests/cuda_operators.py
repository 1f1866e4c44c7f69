"""The operators of torch.nn.SyncBatchNorm for the CPU, which has none of them, so that what calls them runs there.

x, dy (N, C, *); mean, invstd (C,) float32; means, invstds (W, C) and counts (W,) of the ranks.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _wide(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), _dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    means, counts, n = means.double(), counts.double().view(-1, 1), counts.double().sum()
    mean = (counts * means).sum(0) / n
    var = (counts * (invstds.double().pow(-2) - eps + (means - mean).square())).sum(0) / n
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    return mean.float(), (var + eps).rsqrt().float()


def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    y = (x.float() - _wide(mean, x)) * _wide(invstd * weight, x) + _wide(bias, x)
    return y.to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, input_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dy = dy.float().sum(_dims(x))
    sum_dy_xmu = (dy.float() * (x.float() - _wide(mean, x))).sum(_dims(x))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor, count: Tensor
) -> Tensor:
    n = count.sum()
    xmu = x.float() - _wide(mean, x)
    centered = dy.float() - _wide(sum_dy / n, x) - xmu * _wide(invstd.square() * sum_dy_xmu / n, x)
    return (centered * _wide(invstd * weight, x)).to(x.dtype)


OPERATORS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """The operators are there inside."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, function in OPERATORS.items():
            library.impl(name, function, "CPU")
        yield
    finally:
        library._destroy()
