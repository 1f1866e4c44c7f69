"""The generalized Rayleigh quotient by ascent in the metric of its denominator."""

from typing import NamedTuple

import torch
from torch import Tensor


class Ascent(NamedTuple):
    directions: Tensor  # (T+1, d), ‖w‖_A = 1
    quotients: Tensor  # (T+1,) ρ(w_t)
    eigenvalues: Tensor  # (d,) of the pencil (B, A), largest first
    rate: float  # the bound's factor of (λ1 − ρ)/(ρ − λ2) per step


def rayleigh_ascent(a: Tensor, b: Tensor, start: Tensor, steps: int) -> Ascent:
    """max wᵀBw/wᵀAw by w ← w + A⁻¹·∇ρ·‖w‖_A²/(2(ρ − λ_min)).

        (λ1 − ρ₊)/(ρ₊ − λ2) ≤ (1 − (λ1 − λ2)/(λ1 − λ_min))²·(λ1 − ρ)/(ρ − λ2)          where ρ(w_0) > λ2

    (Knyazev & Neymeyr 2003, A geometric theory for preconditioned inverse iteration III; Kohler et al. 2018,
    arXiv:1805.10694, section 4.1.) The exponent is 2 per step, and the gradient is that of the A-metric: with the Euclidean
    one and A ≠ I the bound fails. A demonstration, for one process: A is factored.

    Args:
        a: (d, d) A, symmetric and positive definite, d ≥ 2. b: (d, d) B, symmetric. start: (d,) w_0 ≠ 0. All float64.

    Raises:
        ValueError: A is not positive definite, or shapes that do not fit; a start of zero, or along the smallest eigenvalue.
    """
    d = len(start)
    if d < 2 or a.shape != (d, d) or b.shape != (d, d):
        raise ValueError(
            f"given A {tuple(a.shape)}, B {tuple(b.shape)}, start {tuple(start.shape)}; expected (d, d), (d, d), (d,), d ≥ 2"
        )
    factor, info = torch.linalg.cholesky_ex(a)
    if info != 0:
        raise ValueError("given A that is not positive definite; expected a matrix that has a Cholesky factor")
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    eigenvalues = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False)).flip(0)
    if not start.any():
        raise ValueError("given a start of zero; expected a direction")
    w = start / (start @ a @ start).sqrt()
    path = [w]
    for _ in range(steps):
        rho = w @ b @ w
        if not rho > eigenvalues[-1]:
            raise ValueError("given a start along the smallest eigenvalue, from where no step leads on; expected another")
        gradient = 2 * (b @ w - rho * (a @ w))
        w = w + torch.cholesky_solve(gradient[:, None], factor)[:, 0] / (2 * (rho - eigenvalues[-1]))
        w = w / (w @ a @ w).sqrt()
        path.append(w)
    directions = torch.stack(path)
    rate = (1 - (eigenvalues[0] - eigenvalues[1]) / (eigenvalues[0] - eigenvalues[-1])) ** 2
    return Ascent(directions, ((directions @ b) * directions).sum(1), eigenvalues, rate.item())
