"""What it means that the samples of a mini-batch are normalized together.

Legend: m values of a channel in a mini-batch, x̂ normalized, ε = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..collectives import GroupLike
from .objective import Loss, norm, objective


def cross_sample_energy(xhat: Tensor) -> float:
    """How much of the Jacobian ∂x̂/∂x of batch norm couples different samples: its squared off-diagonal entries, as a share.

    ∂x̂_i/∂x_j = r·(δ_ij − (1 + x̂_i·x̂_j)/m), ‖∂x̂/∂x‖² = r²·(m − 2), so the share is

        1 − Σ_i (1 − (1 + x̂_i²)/m)²/(m − 2)

    which falls as 1/m: samples of large mini-batches are nearly normalized alone. Under synchronization m is the number of
    values of all ranks (Ioffe & Szegedy 2015, arXiv:1502.03167, section 3: a sample is seen with others).

    Args:
        xhat: (m,) values with mean 0 and mean square 1, m ≥ 3.

    Raises:
        ValueError: another shape, or values that are not normalized.
    """
    if xhat.dim() != 1 or len(xhat) < 3:
        raise ValueError(f"given x̂ of shape {tuple(xhat.shape)}; expected (m,), m of 3 or more")
    mean, square = xhat.double().mean().item(), xhat.double().square().mean().item()
    if abs(mean) > 1e-3 or abs(square - 1) > 1e-3:
        raise ValueError(f"given x̂ of mean {mean:.3g} and mean square {square:.3g}; expected 0 and 1")
    m = len(xhat)
    diagonal = (1 - (1 + xhat.double().square()) / m).square().sum() / (m - 2)
    return 1 - diagonal.item()


class Bias(NamedTuple):
    """Of gradients of mini-batches."""

    relative: float  # ‖E g_m − g‖/‖g‖, g of all samples together
    error: float  # at most one standard error of `relative`: the norm of that of the mean gradient


def gradient_bias(
    model: nn.Module,
    loss: Loss,
    draw: Callable[[int], list[object]],
    whole: object,
    drawings: int,
    process_group: GroupLike = None,
) -> Bias:
    """How far the mean gradient of mini-batches is from the gradient of all samples together: about 1/m with batch norm.

    The square of the Monte Carlo error is taken off the square of the distance. Without batch norm the mean is the gradient,
    and the bias 0.

    Args:
        model, loss, process_group: as for `syncbn.analysis.objective.objective`; mini-batches are those of all ranks together.
        draw: called with 0, 1, …; a partition of the samples into mini-batches of m, this rank's shares of them.
        whole: all samples as one batch, this rank's share.
        drawings: how many partitions, 2 or more.

    Raises:
        ValueError: as `objective`; drawings below 2; no mini-batch drawn; a gradient of all samples that is zero.
    """
    if drawings < 2:
        raise ValueError(f"given drawings={drawings}; expected 2 or more")
    full = _gradient(model, loss, whole, process_group)
    if not full.any():
        raise ValueError("given a model whose gradient of all samples is zero; expected one that a bias can be relative to")
    means = []
    for number in range(drawings):
        parts = [_gradient(model, loss, batch, process_group) for batch in draw(number)]
        if not parts:
            raise ValueError(f"given draw({number}) without a mini-batch; expected a partition of the samples")
        means.append(torch.stack(parts).mean(0))
    each = torch.stack(means)
    spread = (each - each.mean(0)).square().sum().item() / (drawings - 1) / drawings
    length, distance = norm([full]), norm([each.mean(0) - full])
    return Bias(max(distance**2 - spread, 0.0) ** 0.5 / length, spread**0.5 / length)


def _gradient(model: nn.Module, loss: Loss, batch: object, process_group: GroupLike) -> Tensor:
    """(n,) float64."""
    with objective(model, loss, batch, process_group) as goal:
        return torch.cat([gradient.flatten().to(goal.parameters[0].device) for gradient in goal.gradients()[1]])
