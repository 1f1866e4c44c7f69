"""Batch normalization of the whole batch in float64, written from the definition; imports nothing of syncbn.

The derivatives are autograd's. Shares are merged by concatenating their values channel by channel, so that shares of any sizes,
spatial sizes and layouts make one batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What one process that sees the whole batch computes, float64."""

    y: list[Tensor]  # by share, (N, C, *)
    dx: list[Tensor]  # by share, (N, C, *)
    dweight: list[Tensor]  # by share, (C,): the share's own sum
    dbias: list[Tensor]  # by share, (C,)
    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,)
    mean: Tensor  # (C,)
    var: Tensor  # (C,) biased
    dresidual: list[Tensor] | None = None  # by share, (N, C, *)


def flat(x: Tensor) -> Tensor:
    """(N, C, *) as (values per channel, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def batch_norm(
    shares: list[Tensor],
    dys: list[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    residuals: list[Tensor] | None = None,
) -> Expected:
    """Normalize all shares as one batch, and ReLU of that and the residuals if asked for; dys are the outputs' gradients."""
    channels = shares[0].shape[1]
    xs = [x.detach().double().clone().requires_grad_() for x in shares]
    gammas = [torch.ones(channels).double() if weight is None else weight.detach().double().clone() for _ in shares]
    betas = [torch.zeros(channels).double() if bias is None else bias.detach().double().clone() for _ in shares]
    for leaf in gammas + betas:
        leaf.requires_grad_()
    values = torch.cat([flat(x) for x in xs])
    n = len(values)
    if n:
        mean = values.mean(0)
        var = (values - mean).square().mean(0)
    else:
        mean, var = torch.zeros(channels).double(), torch.zeros(channels).double()
    added = None if residuals is None else [residual.detach().double().clone().requires_grad_() for residual in residuals]
    ys = []
    for share, (x, gamma, beta) in enumerate(zip(xs, gammas, betas, strict=True)):
        y = gamma * (flat(x) - mean) / (var + eps).sqrt() + beta
        moved = x.movedim(1, -1)
        y = y.reshape(moved.shape).movedim(-1, 1)
        y = y if added is None else y + added[share]
        ys.append(y.relu() if relu else y)
    torch.autograd.backward(ys, [dy.double() for dy in dys])
    new_mean = torch.zeros(channels).double() if running_mean is None else running_mean.double().clone()
    new_var = torch.ones(channels).double() if running_var is None else running_var.double().clone()
    if n > 0:
        new_mean += momentum * (mean.detach() - new_mean)
    if n > 1:
        new_var += momentum * (var.detach() * n / (n - 1) - new_var)
    return Expected(
        [y.detach() for y in ys],
        [grad(x) for x in xs],
        [grad(g) for g in gammas],
        [grad(b) for b in betas],
        new_mean,
        new_var,
        mean.detach(),
        var.detach(),
        None if added is None else [grad(residual) for residual in added],
    )


def grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
