"""Halfspaces and tanh units under Gaussian data, exactly: z = −y·x ~ N(u, Σ), S = Σ + uuᵀ.

By Stein's identity ∇f = c1·u + c2·S·w̃ with c1 = E φ' − E φ''·(u·w̃), c2 = E φ'', z·w̃ being Gaussian of one dimension.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bisection import Bracket, bisect
from .extremes import greatest
from .gdnp import derivative, derivatives

STEP, WIDTH = 0.1, 7.5  # of the trapezoidal grid, in standard deviations; Gauss-Hermite fails for tanh(g·z), which has poles


class GaussianHalfspace:
    """`Halfspace` of E φ(z·w̃) by quadrature."""

    def __init__(self, u: Tensor, sigma: Tensor, loss: Callable[[Tensor], Tensor] = F.softplus, step: float = 0.02) -> None:
        self.u, self.sigma, self.loss = u, sigma, loss
        self.second = sigma + torch.outer(u, u)
        self.nodes, self.weights = grid(step)

    def covariance(self, w: Tensor) -> Tensor:
        return self.second @ w

    def factors(self, weight: Tensor) -> tuple[float, float]:
        """E φ'(z·w̃) and E φ''(z·w̃)."""
        first, second = derivatives(self.loss, self._along(weight))
        return (self.weights @ first).item(), (self.weights @ second).item()

    def gradient(self, weight: Tensor) -> tuple[Tensor, float, float]:
        first, second = self.factors(weight)
        return (first - second * (self.u @ weight)) * self.u + second * self.covariance(weight), first, second

    def slope(self, w: Tensor) -> Callable[[float], float]:
        along = self._along(w)
        return lambda g: (self.weights @ (derivative(self.loss, g * along) * along)).item()

    def value(self, weight: Tensor) -> float:
        """f(w̃)."""
        return (self.weights @ self.loss(self._along(weight))).item()

    def _along(self, w: Tensor) -> Tensor:
        return self.u @ w + (w @ self.sigma @ w).sqrt() * self.nodes


def grid(step: float = STEP) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal by the trapezoidal rule."""
    count = round(2 * WIDTH / step) + 1
    nodes = torch.linspace(-WIDTH, WIDTH, count, dtype=torch.float64)
    weights = (-nodes.square() / 2).exp()
    return nodes, weights / weights.sum()


class UnitRun(NamedTuple):
    """Descent on one unit."""

    quotients: Tensor  # (T+1,) ρ(w_t)
    gradient_norms: Tensor  # (T+1,) ‖∇_i f‖²_{S⁻¹}
    off_line: float  # the largest part of ∂f/∂w that is not along A_w·u
    value: float  # f afterwards; NaN where no length is best


class TanhUnits:
    """F(x) = Σ θ_i·tanh(x·w̃_i) with fixed θ: f = E softplus(Σ θ_i·tanh(z·w̃_i)), one unit trained after the other.

    The others are zero (not yet trained) or on the line w̃_j = c_j·S⁻¹u, where every critical point has them; then ∂f/∂w
    of the unit in training is along A_w·u, and its direction converges as that of least squares. The scheme is linear for each
    unit; the sweeps over units converge at a rate of their own (Kohler et al. 2018, arXiv:1805.10694, section 6). With the
    others off the line half of the gradient is off A_w·u, and the claim is void.
    """

    def __init__(self, u: Tensor, sigma: Tensor, theta: Sequence[float], step: float = STEP) -> None:
        self.u, self.sigma, self.theta = u, sigma, tuple(theta)
        self.second = sigma + torch.outer(u, u)
        self.goal = torch.linalg.solve(self.second, u)  # S⁻¹u
        self.inverse = torch.linalg.inv(self.second)
        eigenvalues = torch.linalg.eigvalsh(self.second)
        self.smallest, self.largest = eigenvalues[0].item(), eigenvalues[-1].item()
        self.best = -(u @ self.goal).item()  # ρ*
        self.on_line = [0.0] * len(theta)  # c_i
        nodes, weights = grid(step)
        self.first, self.other = nodes[:, None], nodes[None]
        self.weights = weights[:, None] * weights

    def train(self, unit: int, start: Tensor, steps: int, halvings: int = 30) -> UnitRun:
        """Descend on a unit from direction `start`, (d,), then put it on the line."""
        w = self._unit(start)
        bracket = self._length(unit, w, halvings)
        quotients: list[float] = []
        norms: list[float] = []
        off_line = [0.0]
        for step in range(steps + 1):
            if bracket is None:
                return UnitRun(torch.tensor(quotients), torch.tensor(norms), greatest(off_line), math.nan)
            g = bracket.root
            gradient, factor = self.gradient(unit, g * w)
            quotients.append(-(self.u @ w).square().item())
            norms.append((gradient @ self.inverse @ gradient).item())
            if step == steps:
                break
            by_w = g * (gradient - (w @ gradient) * (self.second @ w))
            along = self.u - (self.u @ w) * (self.second @ w)
            off = by_w - (by_w @ along) / along.square().sum().clamp(min=1e-300) * along
            if along.norm() > 1e-4 * self.u.norm():  # not at its goal, where it is rounding
                off_line.append((off.norm() / by_w.norm()).item())
            h = factor * (self.u @ w)
            if abs(h) > 1e-14:
                w = self._unit(w + by_w / (self.largest * g * h))
            bracket = self._length(unit, w, halvings)
        self.on_line[unit] = (g * (self.u @ w)).item() / -self.best
        return UnitRun(torch.tensor(quotients), torch.tensor(norms), greatest(off_line), self.value())

    def value(self) -> float:
        """f of all units on the line."""
        _, s = self._joint(self.goal)
        total = self._others(-1, s)
        return (self.weights * F.softplus(total)).sum().item()

    def gradient(self, unit: int, weight: Tensor) -> tuple[Tensor, float]:
        """∇_i f(w̃_i) (d,), with the others on the line, and the factor C1 of ∂f/∂w = (g/‖w‖_S)·C1·A_w·u."""
        a, s = self._joint(weight)
        theta, tanh = self.theta[unit], torch.tanh(a)
        slope = 1 - tanh.square()
        first, second = derivatives(F.softplus, theta * tanh + self._others(unit, s))
        alpha = theta * (self.weights * first * slope).sum()
        own = theta * (self.weights * first * -2 * tanh * slope).sum()
        own = own + theta**2 * (self.weights * second * slope.square()).sum()
        along = sum(
            self.theta[j] * theta * c * (self.weights * second * slope * (1 - torch.tanh(c * s).square())).sum()
            for j, c in enumerate(self.on_line)
            if j != unit
        ) + torch.zeros_like(alpha)
        v = own * weight + along * self.goal
        factor = alpha - self.u @ v
        return factor * self.u + self.second @ v, (factor + along).item()

    def _others(self, unit: int, s: Tensor) -> Tensor:
        return sum(
            (self.theta[j] * torch.tanh(c * s) for j, c in enumerate(self.on_line) if j != unit and c != 0),
            torch.zeros_like(s),
        )

    def _length(self, unit: int, w: Tensor, halvings: int) -> Bracket | None:
        """The nearest minimum along w from length 0 in the direction of descent."""
        a, s = self._joint(w)
        others, theta = self._others(unit, s), self.theta[unit]

        def slope(g: float) -> float:
            tanh = torch.tanh(g * a)
            return (self.weights * torch.sigmoid(theta * tanh + others) * theta * (1 - tanh.square()) * a).sum().item()

        return bisect(slope, halvings, from_zero=True)

    def _joint(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """z·w and z·S⁻¹u on the grid of two independent normals."""
        spread_w = (w @ self.sigma @ w).sqrt()
        shared = (w @ self.sigma @ self.goal) / spread_w
        rest = (self.goal @ self.sigma @ self.goal - shared.square()).clamp(min=0).sqrt()
        a = self.u @ w + spread_w * self.first
        return a.expand_as(self.weights), self.u @ self.goal + shared * self.first + rest * self.other

    def _unit(self, w: Tensor) -> Tensor:
        return w / (w @ self.second @ w).sqrt()
