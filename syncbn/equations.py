"""The arithmetic of synchronized batch normalization: plain, differentiable torch; no process group, no device, no flag.

Requirements this page must meet
    - any split of a batch into shares, empty ones included, gives the result of the whole batch;
    - statistics are float64 from the message on; elements are computed in float32 (float64 for float64 input);
    - nothing waits for the device and no shape depends on data; a count of 0 or 1 makes no NaN.

Legend: x is (N, C, *), any number of trailing dimensions; (C,) per-channel float64; n counts the values of one channel.

Forward, per channel (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1, the mini-batch being all shares together)

    S1 = Σx      S2 = Σx²      n                 summed over every share; the message is [S1, S2, n]
    μ = S1/n     v = max(S2/n − μ², 0)     i = (v + ε)^(−1/2)     x̂ = (x − μ)·i     y = γ·x̂ + β

Backward. The paper (section 3) has six derivatives, g being ∂L/∂y:

    ∂L/∂x̂ = g·γ                                            (1)
    ∂L/∂v  = Σ ∂L/∂x̂·(x − μ)·(−1/2)·i³                     (2)
    ∂L/∂μ  = −i·Σ ∂L/∂x̂ + ∂L/∂v·Σ(−2)(x − μ)/n             (3)
    ∂L/∂x  = ∂L/∂x̂·i + ∂L/∂v·2(x − μ)/n + ∂L/∂μ/n           (4)
    ∂L/∂γ  = Σ g·x̂                                         (5)
    ∂L/∂β  = Σ g                                           (6)

Write G1 = Σg and G2 = Σg·(x − μ). In (3) the last sum is Σ(x − μ) = 0, so ∂L/∂μ = −i·γ·G1; (2) is −γ·i³·G2/2. Put into (4):

    ∂L/∂x = γ·i·g − γ·i³·G2·(x − μ)/n − γ·i·G1/n = γ·i·(g − G1/n − x̂·i·G2/n)

which holds for every ε. (5) and (6) are dγ = G2·i and dβ = G1, of which each share returns its own part; the message is
[G1, G2].

Precision. S2 taken about 0 loses (mean/std)² in float32, so the sums are taken about a pivot K near the mean,
s1 = Σ(x − K) and s2 = Σ(x − K)², and moved to 0 in float64: S1 = s1 + nK, S2 = s2 + 2K·s1 + nK². K is a constant to
autograd: S1 and S2 do not depend on it. x − μ is taken as (x − hi) − lo with hi + lo = μ: hi alone is off by 2^−24·|μ|.
What is left is the float64 message's own limit, an error of v of about 1e-14·(mean/std)².
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PIVOT_SAMPLES = 32


class Statistics(NamedTuple):
    """Statistics of the whole batch, float64, finite for every count."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,) biased
    count: Tensor  # type: ignore[assignment]  # () values per channel


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype elements of a `dtype` tensor are computed in: never below float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_dims(x: Tensor) -> list[int]:
    """The dimensions a per-channel sum runs over: all but dimension 1."""
    return [0, *range(2, x.dim())]


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, …) in the dtype x is computed in, ready to broadcast against x."""
    return value.to(compute_dtype(x.dtype)).view(1, -1, *[1] * (x.dim() - 2))


def values_per_channel(x: Tensor) -> int:
    """How many values of x one channel has: N times the sizes behind the channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def pivot(x: Tensor) -> Tensor:
    """(C,) mean of `PIVOT_SAMPLES` values of each channel, spread over the share on a lattice.

    Its operations are the same for all sizes, so that compiled code serves them all. 0 where the share is empty or the mean is
    not finite.
    """
    if x.numel() == 0:
        return torch.zeros(x.shape[1], dtype=compute_dtype(x.dtype), device=x.device)
    point = torch.arange(PIVOT_SAMPLES, device=x.device)
    index = [(point * (2 * dim + 1)) % PIVOT_SAMPLES * x.shape[dim] // PIVOT_SAMPLES for dim in channel_dims(x)]
    sample = x.detach().movedim(1, -1)[tuple(index)]  # (PIVOT_SAMPLES, C)
    return finite(sample.to(compute_dtype(x.dtype)).mean(0))


def finite(shift: Tensor) -> Tensor:
    """0 where a pivot (C,) is not finite: it must not turn an infinite sum into one that is no number."""
    return torch.where(shift.isfinite(), shift, 0)


def pack_moments(x: Tensor, shift: Tensor, s1: Tensor, s2: Tensor, count: Tensor | None = None) -> Tensor:
    """The message [S1, S2, n], (2C+1,) float64, from the sums s1, s2 (C,) taken about the pivot `shift` (C,).

    `count` is n if it is not that of all values of x: a tensor (1,) float64.
    """
    n = values_per_channel(x) if count is None else count
    shift, s1, s2 = shift.double(), s1.double(), s2.double()
    sent = n if isinstance(n, Tensor) else torch.full((1,), n, dtype=torch.float64, device=x.device)
    return torch.cat([s1 + n * shift, s2 + shift * (2 * s1 + n * shift), sent])


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The message [S1, S2, n] of one share: (2C+1,) float64. The sum of all shares' messages is that of the batch.

    With a mask (N, 1, *), of the values where it is true; x (N, C, *) is finite elsewhere.
    """
    if mask is None:
        shift, count = pivot(x), None
        centered = x - per_channel(shift, x)
    else:
        count = mask.sum(dtype=torch.float64).reshape(1)
        total = torch.where(mask, x, 0).sum(channel_dims(x), dtype=compute_dtype(x.dtype))
        shift = finite((total / count.clamp(min=1)).to(total.dtype)).detach()
        centered = torch.where(mask, x - per_channel(shift, x), 0)
    # What a compiler makes of a sum on a CPU adds one value after the other, where torch's operator adds sums of few.
    dtype = torch.float64 if torch.compiler.is_compiling() and x.is_cpu else centered.dtype
    s1, s2 = (values.sum(channel_dims(x), dtype=dtype) for values in (centered, centered.square()))
    return pack_moments(x, shift, s1, s2, count)


def statistics(message: Tensor) -> Statistics:
    """Mean, biased variance and count of the batch from its message (2C+1,); mean and variance are 0 when the count is."""
    channels = message.shape[0] // 2
    s1, s2, count = message[:channels], message[channels:-1], message[-1]
    n = count.clamp(min=1)
    mean = s1 / n
    return Statistics(mean, (s2 / n - mean.square()).clamp(min=0), count)


def invstd(var: Tensor, eps: float) -> Tensor:
    """i = (v + ε)^(−1/2), (C,) float64."""
    return (var + eps).rsqrt()


def split(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (C,) as a pair hi + lo of the dtype x is computed in; its derivative passes through lo alone."""
    hi = mean.detach().to(compute_dtype(x.dtype))
    return hi, (mean - hi.double()).to(hi.dtype)


def normalize(
    x: Tensor,
    stats: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """y = γ·(x − μ)·i + β in the dtype of x, or max(y + residual, 0), rounded once; differentiable in all that is given."""
    hi, lo = split(stats.mean, x)
    scale = invstd(stats.var, eps)
    if weight is not None:
        scale = scale * weight.double()
    y = (x - per_channel(hi, x) - per_channel(lo, x)) * per_channel(scale, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    if residual is not None:
        y = y + residual
    y = y.relu() if relu else y
    return y if y.dtype == x.dtype else y.to(x.dtype)  # the compiler of torch 2.11 loses the gradient of a conversion to itself


def running_statistics(mean: Tensor, var: Tensor, stats: Statistics, momentum: float | Tensor) -> tuple[Tensor, Tensor]:
    """New running mean and variance, (C,) float64: a step of `momentum` towards μ and v·n/(n − 1).

    A batch of no value moves neither; one of a single value has no unbiased variance and moves the mean alone.
    """
    unbiased = stats.var * (stats.count / (stats.count - 1).clamp(min=1))
    old_mean, old_var = mean.double(), var.double()
    new_mean = torch.where(stats.count > 0, (1 - momentum) * old_mean + momentum * stats.mean, old_mean)
    new_var = torch.where(stats.count > 1, (1 - momentum) * old_var + momentum * unbiased, old_var)
    return new_mean, new_var


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """The message [G1, G2] of one share, (2C,) float64, for dy of the shape of x and the global mean (C,)."""
    hi, lo = split(mean, x)
    dy = dy.to(compute_dtype(x.dtype))
    centered = x - per_channel(hi, x) - per_channel(lo, x)
    sum_dy, sum_dy_xmu = dy.sum(channel_dims(x)), (dy * centered).sum(channel_dims(x))
    return torch.cat([sum_dy, sum_dy_xmu]).double()


def input_gradient(dy: Tensor, x: Tensor, stats: Statistics, weight: Tensor | None, eps: float, message: Tensor) -> Tensor:
    """dx = γ·i·(dy − G1/n − x̂·i·G2/n) of one share, in the dtype of x, from the reduced message (2C,)."""
    sum_dy, sum_dy_xmu = message.chunk(2)
    hi, lo = split(stats.mean, x)
    n, inv = stats.count.clamp(min=1), invstd(stats.var, eps)
    scale = inv if weight is None else inv * weight.double()
    centered = x - per_channel(hi, x) - per_channel(lo, x)
    inner = dy - per_channel(sum_dy / n, x) - centered * per_channel(inv.square() * sum_dy_xmu / n, x)
    return (per_channel(scale, x) * inner).to(x.dtype)
