"""The measures of syncbn.analysis on the whole batch in one process, by plain autograd of torch; imports nothing of syncbn."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


def layer_norms(model: nn.Module, layers: list[nn.Module], loss: Loss, batch: Any) -> tuple[list[float], list[float]]:
    """‖∂L/∂W‖ and ‖∂L/∂h‖ of the layers, h being their outputs."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs[module] = output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    norms = [layer.weight.grad.norm().item() for layer in layers], [outputs[layer].grad.norm().item() for layer in layers]
    model.zero_grad()
    return norms


def gradients(model: nn.Module, loss: Loss, batch: Any) -> dict[str, Tensor]:
    """By parameter, on a copy of the model."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def line(x: list[float], y: list[float]) -> float:
    """The slope of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def growth(norms: list[float], first: int, last: int) -> float:
    """exp(−slope) of log norm² by depth, over depths first to last."""
    return growth_over(list(range(first, last + 1)), norms[first - 1 : last])


def growth_over(depths: list[int], norms: list[float]) -> float:
    """The same of norms at any depths."""
    return math.exp(-line(depths, [2 * math.log(norm) for norm in norms]))


def growth_by_sampling(values: int, phi: Callable[[Tensor], Tensor], samples: int, seed: int) -> float:
    """λ² of a layer by Monte Carlo over the sphere of normalized values: the second moments, and the backward of batch norm.

    Gram matrices of the layer before are (q − c)·I + c·11ᵀ, of the gradient behind ∝ I − 11ᵀ/B.
    """
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(samples, values, dtype=torch.float64, generator=generator)
    centred = h - h.mean(1, keepdim=True)
    xhat = (centred / centred.square().mean(1, keepdim=True).sqrt()).requires_grad_()
    z = phi(xhat)
    (slope,) = torch.autograd.grad(z.sum(), xhat)
    z = z.detach()
    q = z.square().mean().item()
    c = ((z.sum(1).square() - z.square().sum(1)).mean() / (values * (values - 1))).item()
    delta = torch.randn(samples, values, dtype=torch.float64, generator=generator)
    delta = delta - delta.mean(1, keepdim=True)
    g = slope * delta
    through = g - g.mean(1, keepdim=True) - xhat.detach() * (g * xhat.detach()).mean(1, keepdim=True)
    kept = (through.square().sum(1).mean() / delta.square().sum(1).mean()).item()
    return values / ((q - c) * (values - 3)) * kept


def growth_without_end(phi: Callable[[Tensor], Tensor]) -> float:
    """λ² for B → ∞, E φ'²/Var φ of a standard Gaussian, by two million cells of which the density and φ' are summed."""
    a = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64).requires_grad_()
    density = (-a.detach().square() / 2).exp()
    density = density / density.sum()
    z = phi(a)
    (slope,) = torch.autograd.grad(z.sum(), a)
    z = z.detach()
    mean = (density * z).sum()
    return ((density * slope.square()).sum() / (density * (z - mean).square()).sum()).item()


def normalized_step(f: Callable[[Tensor], Tensor], s: Tensor, w: Tensor, g: float, step: float) -> Tensor:
    """w − step·∂/∂w f(g·w/‖w‖_S), by autograd."""
    w = w.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(g * w / (w @ s @ w).sqrt()), w)
    return (w - step * gradient).detach()


def minimum(f: Callable[[float], float], low: float, high: float, points: int = 41, rounds: int = 12) -> float:
    """Where f is least in [low, high], by finer and finer grids."""
    for _ in range(rounds):
        at = [low + (high - low) * i / (points - 1) for i in range(points)]
        best = min(range(points), key=lambda i: f(at[i]))
        low, high = at[max(best - 1, 0)], at[min(best + 1, points - 1)]
    return (low + high) / 2


def finite_difference(f: Callable[[Tensor], float], x: Tensor, step: float = 1e-5) -> Tensor:
    """∇f by central differences."""
    gradient = torch.zeros_like(x)
    for i in range(len(x)):
        e = torch.zeros_like(x)
        e[i] = step
        gradient[i] = (f(x + e) - f(x - e)) / (2 * step)
    return gradient


def shifted_gradients(
    model: nn.Module, groups: list[list[str]], measured: list[str], loss: Loss, batch: Any, updated: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """G and G' of the measured parameter of each group: on copies whose groups before it are updated."""
    start = gradients(model, loss, batch)
    before, after = [], []
    for number, name in enumerate(measured):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for path in itertools.chain(*groups[:number]):
                moved.get_parameter(path).copy_(updated[path])
        before.append(start[name])
        after.append(gradients(moved, loss, batch)[name])
    return before, after


class Around(NamedTuple):
    """A batch norm layer: ‖∂L/∂y‖², ‖∂L/∂z‖², γ²/(v+ε)-weighted ‖∂L/∂z‖², uᵀĤu and (Ju)ᵀH(Ju), J = ∂z/∂y."""

    gradient_sq: float
    without_sq: float
    scaled_sq: float
    curvature: float
    curvature_rest: float


def around(layer: nn.Module, behind: Callable[[Tensor], Tensor], y: Tensor) -> Around:
    """L = behind(layer(y)); by dense Jacobian and Hessians."""
    layer = copy.deepcopy(layer)

    def norm(y: Tensor) -> Tensor:
        return nn.functional.batch_norm(y, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

    y = y.detach()
    z = norm(y).detach()
    u = torch.autograd.functional.jacobian(lambda y: behind(norm(y)), y).flatten()
    g = torch.autograd.functional.jacobian(behind, z)
    size = y.numel()
    by_y = torch.autograd.functional.hessian(lambda y: behind(norm(y)), y).reshape(size, size)
    by_z = torch.autograd.functional.hessian(behind, z).reshape(size, size)
    ju = torch.autograd.functional.jacobian(norm, y).reshape(size, size) @ u
    dims = [0, *range(2, y.dim())]
    scale = layer.weight.detach().square() / (y.var(dims, correction=0) + layer.eps)
    scaled = (scale * g.square().sum(dims)).sum()
    values = (u @ u, g.square().sum(), scaled, u @ by_y @ u, ju @ by_z @ ju)
    return Around(*(value.item() for value in values))


def along_the_gradient(model: nn.Module, loss: Loss, batch: Any, step: float) -> tuple[float, Tensor, Tensor]:
    """L(W − ηG), G and the gradient there, flat."""
    start = gradients(model, loss, batch)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= step * start[name]
    there = gradients(moved, loss, batch)
    flat, flat_there = (torch.cat([value.flatten() for value in each.values()]) for each in (start, there))
    return loss(moved, batch).item(), flat, flat_there


def hessian(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    """By all parameters, dense."""
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def value(flat: Tensor) -> Tensor:
        parts = {name: part.view(shape) for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)}
        return loss(lambda x: torch.func.functional_call(model, parts, (x,)), batch)

    return torch.autograd.functional.hessian(value, torch.cat([p.detach().flatten() for p in model.parameters()]))
