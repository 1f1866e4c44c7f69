"""Gradient descent in normalized parameters: the linear head of a batch norm network, direction and length apart.

Requirements
    - over ranks: each keeps its rows; a product with the covariance is one all_reduce of d values, no matrix is formed;
    - a length that has no minimum is reported, never run after;
    - float64.

Legend: x (N, d) centred, S = E xxᵀ, ‖w‖_S² = wᵀSw, µ and L its smallest and largest eigenvalues. Batch norm of x·w with gain g
is x·w̃ with w̃ = g·w/‖w‖_S: the gain is the length, w gives the direction (Kohler et al. 2018, arXiv:1805.10694, section 3).
With A_w = I − S·wwᵀ/‖w‖_S²

    ∂f/∂w = (g/‖w‖_S)·A_w·∇f(w̃)      ∂f/∂g = w·∇f(w̃)/‖w‖_S      ⟨w, ∂f/∂w⟩ = 0
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..collectives import GroupLike, ProcessGroup
from .bisection import Bracket, bisect
from .lanczos import lanczos
from .ranks import resolve, sum_over_ranks

NOTHING = 1e-14  # of h, below which a direction is at its goal


class Descent(NamedTuple):
    """A run of T steps."""

    weight: Tensor  # (d,) w̃ = g·w of the end, w with ‖w‖_S = 1; w itself where `unbounded`
    directions: Tensor  # (T+1, d) w_t, ‖w_t‖_S = 1
    lengths: Tensor  # (T+1,) g_t
    quotients: Tensor  # (T+1,) ρ(w_t) = −(u·w)²/‖w‖_S²
    largest: float  # L, an upper bound
    widths: Tensor  # (T+1,) of the brackets of g_t; zeros for least squares
    unbounded: bool  # along the last direction the loss falls for ever: there is no best length


class Rows:
    """The rows of all ranks: means over them."""

    def __init__(self, x: Tensor, group: ProcessGroup | None) -> None:
        self.group = group
        self.x = x.detach().double()
        self.count = sum_over_ranks([self.x.new_tensor([len(x)])], group, "gdnp")[0].item()
        if self.count < 1:
            raise ValueError("given no row on any rank; expected one or more")

    def mean(self, values: Tensor) -> Tensor:
        """E[values], of this rank's (n, *)."""
        return sum_over_ranks([values.sum(0)], self.group, "gdnp")[0] / self.count

    def times(self, weights: Tensor) -> Tensor:
        """(d,) E[weights·x], by (n,) weights."""
        return sum_over_ranks([weights @ self.x], self.group, "gdnp")[0] / self.count

    def covariance(self, w: Tensor) -> Tensor:
        """(d,) S·w = E[x·(x·w)]."""
        return self.times(self.x @ w)

    def centred(self) -> "Rows":
        rows = Rows(self.x, self.group)
        rows.x = self.x - self.mean(self.x)
        return rows


def gdnp_least_squares(
    x: Tensor, y: Tensor, steps: int = 100, start: Tensor | None = None, process_group: GroupLike = None
) -> Descent:
    """Least squares, f(w̃) = E(y − x·w̃)², by gradient descent on the direction, whose length is always the best.

    With u = −E[yx]: g* = −u·w/‖w‖_S, and ρ(w) = f(w, g*) − E y² = −(u·w)²/‖w‖_S². The step η = ‖w‖_S²/(2L|ρ(w)|) gives

        w ← w + (‖w‖_S²/(L·u·w))·u − S·w/L          ρ(w_t) − ρ* ≤ (1 − µ/L)^(2t)·(ρ(w_0) − ρ*)

    (Kohler et al. 2018, arXiv:1805.10694, section 4.) That is the direction of gradient descent with step 1/(2L), f having
    smoothness 2L, which has the same bound: the gain over it is a constant. x and y are centred first, as batch norm and its
    shift do, so that no assumption on the mean of x is needed.

    Args:
        x: (n, d) this rank's rows; any number, also none. Computed in float64.
        y: (n,) this rank's targets.
        steps: T, each with one all_reduce of d values.
        start: (d,) w_0, the same on all ranks; None: u.
        process_group: the ranks whose rows make the data; None: all.

    Raises:
        ValueError: shapes that do not fit; no row; values that are not finite; u·w_0 = 0, from where no step leads on.
    """
    _check(x, y, steps)
    group = resolve(process_group)
    rows = Rows(x, group).centred()
    target = y.detach().double() - Rows(y.detach().double(), group).mean(y.detach().double())
    u = -rows.times(target)
    largest = _largest(rows.covariance, u)
    w, s_w = _normalized(_start(start, u), rows.covariance)
    path = [(w, -(u @ w))]
    for _ in range(steps):
        w, s_w = _normalized(w + u / (largest * (u @ w)) - s_w / largest, rows.covariance)
        path.append((w, -(u @ w)))
    directions, lengths = torch.stack([w for w, _ in path]), torch.stack([g for _, g in path])
    zeros = torch.zeros_like(lengths)
    return Descent(lengths[-1] * directions[-1], directions, lengths, -lengths.square(), largest, zeros, False)


class Halfspace(Protocol):
    """f(w̃) = E φ(z·w̃), z = −y·x: what descent on it needs. u = E z and S = E zzᵀ."""

    u: Tensor  # (d,)

    def covariance(self, w: Tensor) -> Tensor:
        """(d,) S·w."""

    def gradient(self, weight: Tensor) -> tuple[Tensor, float, float]:
        """∇f(w̃) (d,), E φ'(z·w̃) and E φ''(z·w̃)."""

    def slope(self, w: Tensor) -> Callable[[float], float]:
        """g ↦ ∂f/∂g = E φ'(g·z·w)·z·w for ‖w‖_S = 1."""


class SampleHalfspace:
    """`Halfspace` of data: expectations are means over the rows of all ranks."""

    def __init__(self, rows: Rows, loss: Callable[[Tensor], Tensor]) -> None:
        self.rows, self.loss = rows, loss
        self.u = rows.mean(rows.x)
        self.covariance = rows.covariance

    def gradient(self, weight: Tensor) -> tuple[Tensor, float, float]:
        first, second = derivatives(self.loss, self.rows.x @ weight)
        together = self.rows.mean(torch.stack([first, second], 1))
        return self.rows.times(first), together[0].item(), together[1].item()

    def slope(self, w: Tensor) -> Callable[[float], float]:
        along = self.rows.x @ w
        return lambda g: self.rows.mean(derivative(self.loss, g * along) * along).item()


def gdnp_halfspace(
    x: Tensor,
    y: Tensor,
    steps: int = 300,
    halvings: int = 40,
    start: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] = F.softplus,
    process_group: GroupLike = None,
) -> Descent:
    """A linear classifier, f(w̃) = E φ(−y·x·w̃), by gradient descent on the direction and bisection for the length.

    The step on the direction is s = −‖w‖_S³/(L·g·h) with h = (E φ' − E φ''·u·w̃)·(u·w): it undoes the factor of the loss, so
    that for Gaussian x the directions are those of least squares, w* ∝ S⁻¹u, whatever φ is, and

        ‖∇f‖²_{S⁻¹} ≤ (1 − µ/L)^(2T)·Φ²·(ρ(w_0) − ρ*) + 4^−(halvings+1)·(ζ·|b − a|/µ)²

    (Kohler et al. 2018, arXiv:1805.10694, section 5; h and the bisection's term as derived here, for with the published
    h = E φ'·(u·w) − E φ''·(u·w)² the linear rate is lost.) Other distributions reach S⁻¹u approximately alone.
    Here S = E zzᵀ is not centred.

    Args:
        x: (n, d) this rank's rows. y: (n,) of −1 and 1. Computed in float64.
        steps, halvings: T, with two all_reduces of d values and one of two a step, and of one value two for the bracket,
            one for each doubling of an end of it, and one each halving.
        start: (d,) w_0, the same on all ranks; None: u = −E[yx].
        loss: φ, elementwise, twice differentiable, increasing.
        process_group: the ranks whose rows make the data; None: all.

    Returns:
        `unbounded` where no length is best (separable data, or a loss that is bounded above): the descent ends there.

    Raises:
        ValueError: shapes that do not fit; labels other than −1 and 1; no row; values that are not finite; u·w_0 = 0.
    """
    _check(x, y, steps)
    if not bool((y.double().abs() == 1).all()):
        raise ValueError(f"given labels {sorted({*y.tolist()})[:5]}; expected −1 and 1")
    rows = Rows(-y.double()[:, None] * x.double(), resolve(process_group))
    return descend(SampleHalfspace(rows, loss), steps, halvings, start)


def descend(problem: Halfspace, steps: int, halvings: int, start: Tensor | None = None) -> Descent:
    """The algorithm of `gdnp_halfspace`."""
    u = problem.u
    largest = _largest(problem.covariance, u)
    w, s_w = _normalized(_start(start, u), problem.covariance)
    bracket = bisect(problem.slope(w), halvings)
    path = [(w, bracket)]
    for _ in range(steps):
        if bracket is None:
            break
        gradient, first, second = problem.gradient(bracket.root * w)
        h = (first - second * bracket.root * (u @ w).item()) * (u @ w).item()
        if abs(h) > NOTHING and bracket.root != 0:
            by_w = bracket.root * (gradient - (w @ gradient) * s_w)
            w, s_w = _normalized(w + by_w / (largest * bracket.root * h), problem.covariance)
        bracket = bisect(problem.slope(w), halvings)
        path.append((w, bracket))
    return _told(path, u, largest)


def _told(path: list[tuple[Tensor, Bracket | None]], u: Tensor, largest: float) -> Descent:
    directions = torch.stack([w for w, _ in path])
    brackets = [bracket for _, bracket in path]
    lengths = u.new_tensor([math.inf if bracket is None else bracket.root for bracket in brackets])
    widths = u.new_tensor([math.inf if bracket is None else bracket.width for bracket in brackets])
    unbounded = brackets[-1] is None
    weight = directions[-1] if unbounded else lengths[-1] * directions[-1]
    return Descent(weight, directions, lengths, -(directions @ u).square(), largest, widths, unbounded)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """φ' of an elementwise function."""
    t = t.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(function(t).sum(), t)[0]


def derivatives(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """φ' and φ'' of an elementwise function."""
    t = t.detach().clone().requires_grad_()
    with torch.enable_grad():
        (first,) = torch.autograd.grad(function(t).sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), t) if first.requires_grad else (torch.zeros_like(t),)
    return first.detach(), second


def _check(x: Tensor, y: Tensor, steps: int) -> None:
    if x.dim() != 2 or y.dim() != 1 or len(x) != len(y) or x.shape[1] == 0:
        raise ValueError(f"given x {tuple(x.shape)} and y {tuple(y.shape)}; expected (n, d) and (n,)")
    if steps < 0:
        raise ValueError(f"given steps={steps}; expected 0 or more")


def _start(start: Tensor | None, u: Tensor) -> Tensor:
    w = u if start is None else start.detach().to(u)
    if w.shape != u.shape:
        raise ValueError(f"given start {tuple(w.shape)}; expected ({len(u)},)")
    if not bool(u.isfinite().all()):
        raise ValueError("given x or y with values that are not finite; expected numbers")
    if not bool(w.isfinite().all()):
        raise ValueError(f"given start={start} with values that are not finite; expected numbers")
    if not abs((u @ w).item()) > 0:
        raise ValueError(f"given start={start} at a right angle to u; expected u·w_0 ≠ 0 (u = 0 where x tells nothing of y)")
    return w


def _normalized(w: Tensor, covariance: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """w/‖w‖_S, and S times that."""
    s_w = covariance(w)
    length = (w @ s_w).sqrt()
    return w / length, s_w / length


def _largest(covariance: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """An upper bound of L, to rounding: Lanczos from a vector that is the same on all ranks, and its residual."""
    start = torch.randn(len(like), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)
    ritz = lanczos(covariance, start, 60)
    return (ritz.values[0] + ritz.residuals[0]).item()
