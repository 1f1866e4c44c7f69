"""The loss and its gradient along the gradient: how far a step may go, and the ends of the Hessian's spectrum.

Requirements: the same batch, buffers and random state at every point; gradients averaged over the ranks before any norm.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..collectives import GroupLike
from .extremes import greatest, least
from .lanczos import Ritz, lanczos
from .objective import Loss, Objective, cosine, norm, objective
from .ranks import dense


class FlatError(ValueError):
    """The gradient is zero."""


class Landscape(NamedTuple):
    """At W − ηG for each η; G = ∇L(W), averaged over all ranks."""

    steps: tuple[float, ...]  # η
    losses: tuple[float, ...]  # L(W − ηG)
    gradient_norm: float  # ‖G‖
    distances: tuple[float, ...]  # ‖G − ∇L(W − ηG)‖: how well the gradient predicts the next
    cosines: tuple[float, ...]  # of the two
    loss_range: float  # the largest loss minus the smallest; NaN, as what follows, where one of its terms is
    effective_beta: float  # the largest ‖G − ∇L(W − ηG)‖/(η‖G‖)

    @property
    def predictiveness(self) -> float:
        """The largest distance."""
        return greatest(self.distances)


def gradient_landscape(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    lr: float,
    factors: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    process_group: GroupLike = None,
) -> Landscape:
    """Loss range, gradient predictiveness and effective smoothness along the gradient, at η = lr·factors.

    (Santurkar et al. 2018, arXiv:1805.11604, section 3.1 and figure 4.) η·β well below 2 is where a step of gradient descent
    surely goes down; it is the one direction that training takes, not the spectrum: see `hessian_spectrum`. Means over training
    favour networks that sit on a plateau: compare maxima, or high quantiles.

    Args:
        model, loss, batch, process_group: as for `syncbn.analysis.objective.objective`. 1 + len(factors) passes.
        lr: above 0.

    Raises:
        ValueError: as `objective`; lr or a factor that is no number above 0; a gradient of zero.
    """
    steps = tuple(lr * factor for factor in factors)
    if not steps or not all(0 < step < math.inf for step in steps):
        raise ValueError(f"given lr={lr!r} and factors={tuple(factors)!r}; expected numbers above 0")
    losses, distances, cosines = [], [], []
    with objective(model, loss, batch, process_group) as goal:
        _, start = goal.gradients()
        length = norm(start)
        if length == 0:
            raise FlatError("given a model and batch whose gradient is zero; expected one that leads somewhere")
        at = [parameter.detach().clone() for parameter in goal.parameters]
        for step in steps:
            with torch.no_grad():
                for parameter, value, gradient in zip(goal.parameters, at, start, strict=True):
                    parameter.copy_(value.double() - step * gradient)
            height, there = goal.gradients()
            losses.append(height)
            distances.append(norm([one - other for one, other in zip(start, there, strict=True)]))
            cosines.append(cosine(start, there))
    beta = greatest(distance / (step * length) for distance, step in zip(distances, steps, strict=True))
    spread = greatest(losses) - least(losses)
    return Landscape(steps, tuple(losses), length, tuple(distances), tuple(cosines), spread, beta)


def hessian_spectrum(
    model: nn.Module, loss: Loss, batch: Any, iterations: int = 30, seed: int = 0, process_group: GroupLike = None
) -> Ritz:
    """The ends of the spectrum of the Hessian by all parameters, by Lanczos' method: one double backward an iteration.

    The largest come first and are found first, with a bound of their errors; `iterations` vectors of the size of the model are
    kept in float64.

    Args:
        model, loss, batch, process_group: as for `syncbn.analysis.objective.objective`; the model twice
            differentiable where it is.
        iterations: 1 or more. seed: of the first vector, the same on all ranks.

    Raises:
        ValueError: as `objective`; iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"given iterations={iterations}; expected 1 or more")
    with objective(model, loss, batch, process_group) as goal:
        found = torch.autograd.grad(goal.local(), goal.parameters, create_graph=True, allow_unused=True)
        gradients = [None if gradient is None else dense(gradient) for gradient in found]
        size = sum(parameter.numel() for parameter in goal.parameters)
        start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return lanczos(lambda vector: _product(goal, gradients, vector), start.to(goal.parameters[0].device), iterations)


def _product(goal: Objective, gradients: Sequence[Tensor | None], vector: Tensor) -> Tensor:
    """The Hessian times a vector (n,)."""
    parts = vector.split([parameter.numel() for parameter in goal.parameters])
    pairs = [(g, part.view_as(g).to(g)) for g, part in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(vector)
    roots, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(roots, goal.parameters, weights, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(p) if h is None else h for p, h in zip(goal.parameters, found, strict=True)]
    return torch.cat([product.flatten().to(vector.device) for product in goal.sum(filled)])
