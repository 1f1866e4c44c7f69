"""Problems of direction and length, and the descents that GDNP is compared with.

S has eigenvalues spaced evenly in their logarithms up to the condition number, turned at random; u is Gaussian.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..gaussian import GaussianHalfspace
from ..rayleigh import rayleigh_ascent


class Quadratic(NamedTuple):
    """f(w̃) = 2u·w̃ + w̃ᵀSw̃ + const."""

    s: Tensor  # (d, d)
    u: Tensor  # (d,)
    start: Tensor  # (d,)
    smallest: float
    largest: float

    @property
    def best(self) -> float:
        """ρ*."""
        return -(self.u @ torch.linalg.solve(self.s, self.u)).item()

    def above(self, directions: Tensor) -> Tensor:
        """(T+1,) ρ(w) − ρ* of directions (T+1, d) with ‖w‖_S = 1, without a difference of large numbers.

        ‖w* − ⟨w*, w⟩_S·w‖_S² for w* = S⁻¹u.
        """
        goal = torch.linalg.solve(self.s, self.u)
        apart = goal - (directions @ self.u)[:, None] * directions
        return ((apart @ self.s) * apart).sum(1)

    @property
    def rate(self) -> float:
        return (1 - self.smallest / self.largest) ** 2


def turned(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """A symmetric matrix of these eigenvalues."""
    d = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    return q @ torch.diag(eigenvalues) @ q.T


def quadratic(condition: float, seed: int, d: int = 20) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    s = turned(torch.logspace(0, math.log10(condition), d, dtype=torch.float64) / condition, generator)
    u, start = torch.randn(2, d, dtype=torch.float64, generator=generator)
    return Quadratic(s, u, start, 1 / condition, 1.0)


def rows_of(problem: Quadratic) -> tuple[Tensor, Tensor]:
    """2d rows x and targets y with Σx = 0, Σy = 0, E xxᵀ = S and −E yx = u exactly."""
    root, scale = torch.linalg.cholesky(problem.s), math.sqrt(len(problem.u))
    targets = torch.linalg.solve_triangular(root, problem.u[:, None], upper=False)[:, 0]
    return scale * torch.cat([root.T, -root.T]), scale * torch.cat([-targets, targets])


def gradient_descent(problem: Quadratic, step: float, steps: int) -> Tensor:
    """(T+1,) f − f* of plain gradient descent from the best length of the start."""
    w = problem.start * -(problem.u @ problem.start) / (problem.start @ problem.s @ problem.start)
    values = []
    for _ in range(steps + 1):
        values.append(2 * problem.u @ w + w @ problem.s @ w)
        w = w - 2 * step * (problem.u + problem.s @ w)
    return torch.stack(values) - problem.best


def batch_norm_descent(problem: Quadratic, rate: float, steps: int) -> Tensor:
    """(T+1,) f − f* of joint gradient descent on (w, g), rates `rate` and ¼."""
    w, g = problem.start.clone(), problem.u.new_zeros(())
    values = []
    for _ in range(steps + 1):
        s_w = problem.s @ w
        length = (w @ s_w).sqrt()
        weight = g * w / length
        values.append(2 * problem.u @ weight + weight @ problem.s @ weight)
        gradient = 2 * (problem.u + problem.s @ weight)
        by_g = w @ gradient / length
        w, g = w - rate * g / length * (gradient - s_w * (w @ gradient) / length**2), g - 0.25 * by_g
    return torch.stack(values) - problem.best


def iterations(values: Tensor, limit: float) -> float:
    """The first step at which the value is below the limit; infinite if none is."""
    below = (values <= limit).nonzero()
    return below[0].item() if len(below) else math.inf


def end_of(values: Tensor, most: float = 1e30) -> float:
    """The last of the values of a descent, at most `most`, beyond which they may overflow; NaN where they do so earlier."""
    finite = values[: int(values.isfinite().cumprod(0).sum())]
    if len(finite) == len(values) or (len(finite) and finite[-1] >= most):
        return min(finite[-1].item(), most)
    return math.nan


def leading(a: Tensor, b: Tensor) -> Tensor:
    """The vector of the largest eigenvalue of the pencil (B, A), ‖·‖ = 1."""
    factor = torch.linalg.cholesky(a)
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    _, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    vector = torch.linalg.solve_triangular(factor.T, vectors[:, -1:], upper=True)[:, 0]
    return vector / vector.norm()


def start_above(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """Near the leading vector, (d,), drawn until its quotient is above the second eigenvalue."""
    best = leading(a, b)
    while True:
        start = best + 0.3 * torch.randn(len(best), dtype=torch.float64, generator=generator)
        found = rayleigh_ascent(a, b, start, 0)
        if found.quotients[0] > found.eigenvalues[1]:
            return start


def gaussian_problem(seed: int, d: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, Σ and a start."""
    generator = torch.Generator().manual_seed(seed)
    sigma = turned(torch.logspace(0, math.log10(condition), d, dtype=torch.float64), generator) / math.sqrt(condition)
    u, start = torch.randn(2, d, dtype=torch.float64, generator=generator)
    return u / math.sqrt(d), sigma, start


def halfspace_descent(problem: GaussianHalfspace, start: Tensor, step: float, steps: int) -> Tensor:
    """(T+1,) ‖∇f‖²_{S⁻¹} of plain gradient descent on the weight."""
    weight, inverse, norms = start, torch.linalg.inv(problem.second), []
    for _ in range(steps + 1):
        gradient = problem.gradient(weight)[0]
        norms.append(gradient @ inverse @ gradient)
        weight = weight - step * gradient
    return torch.stack(norms)
