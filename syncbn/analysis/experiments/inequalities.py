"""The inequalities of Santurkar et al. 2018 (arXiv:1805.11604, theorem 4.4 and lemma 4.5), and scale invariance, as numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..claims import Claim, at_most
from ..extremes import greatest
from ..networks import NO_EPS, Data, classification
from ..smoothness import batch_norm_smoothness


def claims(seeds: tuple[int, ...], trials: int) -> list[Claim]:
    """All of them, the worst of the trials."""
    minimax = [minimax_gap(1000 * seed + trial) for seed in seeds for trial in range(trials)]
    starts = [start_gap(1000 * seed + trial) for seed in seeds for trial in range(trials)]
    exact, small, large = (worst_errors(seeds, trials, eps) for eps in (NO_EPS, 1e-5, 0.1))
    by_gradient, by_curvature = (greatest(one[i] for one in (exact, small, large)) for i in (0, 1))
    by_random, by_rank_one = (greatest(one[i] for one in minimax) for i in (0, 1))
    invariance = greatest(invariance_error(seed) for seed in seeds)
    return [
        at_most("gradient identity of a layer, ε = 0, 10⁻⁵, 0.1: relative error", by_gradient, 1e-11),
        at_most("curvature identity of a layer, same ε: relative error", by_curvature, 1e-10),
        at_most("gradient bound, ε = 0.1: largest violation over scale", large[2], 1e-12),
        at_most("minimax: ‖∂L/∂W‖² with batch norm over the bound, random X", by_random, 1 + 1e-12),
        at_most("minimax: X of rank one attains it, relative difference", by_rank_one, 1e-12),
        at_most("initialization: ‖W0 − Ŵ*‖² over the bound, ⟨W0, W*⟩ ≥ 0", greatest(starts), 1 + 1e-12),
        at_most("scale invariance: relative error of f(kW), ∇f(kW)·k, ⟨∇f, W⟩", invariance, 1e-11),
    ]


def small_network(seed: int, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, x, labels), float64: two batch norm layers between tanh and linear layers, with affine of either sign."""
    generator = torch.Generator().manual_seed(seed)
    m = int(torch.randint(4, 20, (), generator=generator))

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.normal_(std=inputs**-0.5, generator=generator)
            layer.bias.normal_(generator=generator)
        return layer

    def norm(features: int) -> nn.BatchNorm1d:
        layer = nn.BatchNorm1d(features, eps=eps).double()
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
            layer.bias.normal_(generator=generator)
        return layer

    model = nn.Sequential(linear(5, 4), norm(4), nn.Tanh(), linear(4, 6), norm(6), nn.Tanh(), linear(6, 3))
    x = torch.randn(m, 5, dtype=torch.float64, generator=generator)
    return model, x, torch.randint(3, (m,), generator=generator)


def worst_errors(seeds: tuple[int, ...], trials: int, eps: float) -> tuple[float, float, float]:
    """Of both identities, and the largest violation of the gradient bound."""
    found: list[tuple[float, float, float]] = []
    for seed in seeds:
        for trial in range(trials):
            model, x, labels = small_network(1000 * seed + trial, eps)
            for layer in batch_norm_smoothness(model, classification, Data(x, labels)):
                over = (layer.gradient_sq - layer.scaled_sq + layer.slack_sq) / layer.scaled_sq
                found.append((layer.gradient_error, layer.curvature_error, over))
    gradient, curvature, violation = (greatest(errors) for errors in zip(*found, strict=True))
    return gradient, curvature, violation


def minimax_gap(seed: int, m: int = 7, d: int = 3) -> tuple[float, float]:
    """y = XW over ‖X‖₂ ≤ λ: ‖∂L̂/∂W‖² of a random X over the bound, and how near X = λ·v·eᵀ/‖v‖ comes to it, v = ∂L̂/∂y.

    ĝ = max ‖∂L̂/∂W‖² = (γ²/s²)·(g − λ²·m·µ_g² − λ²/m·⟨g, ŷ⟩²), g = λ²‖∂L/∂z‖², with equality for ε = 0.
    """
    generator = torch.Generator().manual_seed(seed)
    y, g = torch.randn(2, m, dtype=torch.float64, generator=generator)
    gamma, largest = 1.3, 2.0
    y = y.requires_grad_()
    z = gamma * F.batch_norm(y[:, None], None, None, training=True, eps=NO_EPS)[:, 0]
    (v,) = torch.autograd.grad((z * g).sum(), y)
    y = y.detach()
    yhat, var = (y - y.mean()) / y.var(correction=0).sqrt(), y.var(correction=0)
    bound = gamma**2 / var * largest**2 * (g @ g - m * g.mean() ** 2 - (g @ yhat) ** 2 / m)
    x = torch.randn(m, d, dtype=torch.float64, generator=generator)
    x = largest * x / torch.linalg.matrix_norm(x, 2)
    best = largest * torch.outer(v / v.norm(), F.one_hot(torch.tensor(0), d).double())
    return ((x.T @ v).square().sum() / bound).item(), ((best.T @ v).square().sum() / bound - 1).abs().item()


def start_gap(seed: int, d: int = 6) -> float:
    """‖W0 − kW*‖² at its nearest k > 0 over ‖W0 − W*‖² − (‖W*‖² − ⟨W*, W0⟩)²/‖W*‖², turned so that ⟨W0, W*⟩ ≥ 0.

    With batch norm every kW*, k > 0, is optimal; with ⟨W0, W*⟩ < 0 none of them is nearest.
    """
    generator = torch.Generator().manual_seed(seed)
    start, goal = torch.randn(2, d, dtype=torch.float64, generator=generator)
    start = start * (start @ goal).sign()
    bound = (start - goal).square().sum() - (goal @ goal - goal @ start).square() / (goal @ goal)
    k = (goal @ start) / (goal @ goal)
    return ((start - k * goal).square().sum() / bound).item()


def invariance_error(seed: int, k: float = 3.7) -> float:
    """Of f(kW) = f(W), ∇f(kW) = ∇f(W)/k and ⟨∇f, W⟩ = 0 by rows, for a weight before batch norm."""
    model, x, labels = small_network(seed, NO_EPS)
    weight = model.get_parameter("0.weight")

    def at() -> tuple[Tensor, Tensor]:
        value = F.cross_entropy(model(x), labels)
        return value.detach(), torch.autograd.grad(value, weight)[0]

    value, gradient = at()
    along = (gradient * weight).sum(1).abs().max() / gradient.norm() / weight.norm()
    with torch.no_grad():
        weight.mul_(k)
        model.get_parameter("0.bias").mul_(k)
    other, there = at()
    errors = (other / value - 1).abs(), (k * there - gradient).norm() / gradient.norm(), along
    return greatest(error.item() for error in errors)
