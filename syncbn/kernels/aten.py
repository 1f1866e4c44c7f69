"""The kernels composed of ATen operators: every device that has float64, and the fallback wherever nothing faster is at hand.

Requirements: values of `syncbn.equations` to rounding; one temporary of the size of x in each function, in the dtype the
elements are computed in; the low half of the mean is folded into the per-channel addend, so that it costs no pass.
"""

import math

import torch
from torch import Tensor

from .. import equations
from ..equations import channel_dims, compute_dtype, per_channel
from . import Affine, GradientSums, Running, Saved, keep, move


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x − shift (C,) in the dtype x is computed in, with the strides of torch.empty_like(x)."""
    out = torch.empty_like(x, dtype=compute_dtype(x.dtype))
    return torch.sub(x, per_channel(shift, x), out=out)


def pivot(x: Tensor) -> Tensor:
    """(C,) mean of about 32 values of each channel, spread over the share: `equations.pivot` by a slice, not a gather."""
    spatial = x.dim() - 2
    each = math.ceil(8 ** (1 / spatial)) if spatial else 1
    index = [slice(None)] * x.dim()
    for dim in channel_dims(x):
        samples = equations.PIVOT_SAMPLES // each**spatial if dim == 0 else each
        step = max(1, x.shape[dim] // max(1, samples))
        index[dim] = slice(step // 2, None, step)
    return equations.finite(x[tuple(index)].to(compute_dtype(x.dtype)).mean(channel_dims(x)))


def moments(x: Tensor) -> Tensor:
    shift = pivot(x)
    centered = _shifted(x, shift)
    s1 = centered.sum(channel_dims(x))
    s2 = centered.square_().sum(channel_dims(x))
    return equations.pack_moments(x, shift, s1, s2)


def normalize(x: Tensor, message: Tensor, affine: Affine, running: Running | None) -> tuple[Tensor, Saved]:
    stats = equations.statistics(message)
    invstd = equations.invstd(stats.var, affine.eps)
    if running is not None:
        move(running, stats)
    y = _affine(x, stats.mean, invstd, affine.weight, affine.bias)
    if affine.residual is not None:
        y = y.add_(affine.residual)
    y = (y.relu_() if affine.relu else y).to(x.dtype)
    return y, keep(affine, torch.cat([stats.mean, invstd, stats.count.view(1)]), y)


def _affine(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ·x̂ + β in the dtype x is computed in."""
    hi, lo = equations.split(mean, x)
    scale = invstd if weight is None else invstd * weight
    shift = -scale * lo if bias is None else bias - scale * lo
    return _shifted(x, hi).mul_(per_channel(scale, x)).add_(per_channel(shift, x))


def _unpacked(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and invstd (C,), and the count () of the whole batch."""
    c = saved.statistics.numel() // 2
    return saved.statistics[:c], saved.statistics[c:-1], saved.statistics[-1]


def _passed(dy: Tensor, x: Tensor, saved: Saved) -> Tensor:
    """What the ReLU leaves of dy."""
    if not saved.relu:
        return dy
    y = saved.y
    if y is None:
        mean, invstd, _ = _unpacked(saved)
        y = _affine(x, mean, invstd, saved.weight, saved.bias).to(x.dtype)
    return torch.ops.aten.threshold_backward(dy, y, 0)


def gradient_sums(dy: Tensor, x: Tensor, saved: Saved) -> GradientSums:
    dy = _passed(dy, x, saved)
    mean, invstd, _ = _unpacked(saved)
    hi, lo = equations.split(mean, x)
    sum_dy = dy.sum(channel_dims(x), dtype=compute_dtype(x.dtype)).double()
    sum_dy_xhi = _shifted(x, hi).mul_(dy).sum(channel_dims(x)).double()
    sum_dy_xmu = sum_dy_xhi - lo * sum_dy
    message, passed = torch.cat([sum_dy, sum_dy_xmu]), None if saved.y is None else dy
    return GradientSums(message, sum_dy_xmu * invstd, sum_dy, passed)


def input_gradient(dy: Tensor, x: Tensor, saved: Saved, message: Tensor) -> Tensor:
    if saved.y is None:
        dy = _passed(dy, x, saved)
    sum_dy, sum_dy_xmu = message.chunk(2)
    mean, invstd, count = _unpacked(saved)
    hi, lo = equations.split(mean, x)
    n = count.clamp(min=1)
    scale = invstd if saved.weight is None else invstd * saved.weight
    slope = -scale * invstd.square() * sum_dy_xmu / n
    shift = -scale * sum_dy / n - slope * lo
    dx = _shifted(x, hi).mul_(per_channel(slope, x)).add_(per_channel(shift, x))
    return dx.addcmul_(dy.to(dx.dtype), per_channel(scale, x)).to(x.dtype)
