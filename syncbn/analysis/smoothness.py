"""What each batch norm layer of a network does to the gradient and to the curvature of the loss.

Requirements
    - the layers as they are in the network, in its double backward; statistics are those that each layer normalizes by;
    - exact for every ε where the literature's forms are for ε = 0 alone;
    - over ranks: sums per channel over the layer's group first, sums over channels and ranks last.

Legend: y (N, C, *) the input of a layer, z its output, m values per channel, ŷ = (y − μ)·r, r = (v + ε)^(−1/2); L the loss,
g = ∂L/∂z, which is the gradient of the network without this layer where it is fed the same z; u = ∂L/∂y; H the Hessian by z and
Ĥ that by y. P takes the mean and the part along ŷ out of a vector: Pu = u − ū − ŷ·⟨ŷ, u⟩/m. Per channel (Santurkar et al. 2018,
arXiv:1805.11604, theorems 4.1 and 4.2; here with equality, and for every ε)

    ‖u‖² = γ²r²·(‖g‖² − ⟨1, g⟩²/m − ⟨g, ŷ⟩²/m·(2 − v·r²))
    uᵀĤu = γ²r²·(Pu)ᵀH(Pu) − 2aγr²·⟨g, Pu⟩ − γr²/m·⟨g, ŷ⟩·⟨u, Pu⟩        a = ⟨ŷ, u⟩/m

For ε = 0: v·r² = 1, a = 0, Pu = u, and the second is γ²r²·uᵀHu − γr²/m·⟨g, ŷ⟩·‖u‖².
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import equations
from ..collectives import GroupLike
from ..module import SyncBatchNormReLU, _Synchronized
from .layers import normalizes_by_its_batch
from .objective import Loss, Objective, objective
from .ranks import resolve, size_of, sum_over_ranks


class LayerSmoothness(NamedTuple):
    """Sums over all channels and ranks; L is the mean loss of all ranks."""

    name: str  # path of the layer
    gradient_sq: float  # ‖u‖²
    without_sq: float  # ‖g‖²
    scaled_sq: float  # Σγ²r²‖g‖²: what scaling alone would leave of it
    slack_sq: float  # Σγ²r²(⟨1, g⟩² + ⟨g, ŷ⟩²)/m: what batch norm takes out; ‖u‖² ≤ scaled_sq − slack_sq, equal for ε = 0
    gradient_error: float  # of the first equation, relative to scaled_sq
    curvature: float  # uᵀĤu
    curvature_rest: float  # γ²r²·(Pu)ᵀH(Pu), of the network behind the layer
    curvature_error: float  # of the second equation, relative to its largest term


class _Call(NamedTuple):
    """A forward of a layer."""

    name: str
    layer: Any
    y: Tensor  # (N, C, *), used by nothing else
    z: Tensor  # (N, C, *)


def batch_norm_smoothness(
    model: nn.Module, loss: Loss, batch: Any, process_group: GroupLike = None
) -> tuple[LayerSmoothness, ...]:
    """The two equations of the module for each call of a batch norm layer that normalizes by its batch.

    One forward and backward with its graph, then two Hessian-vector products a layer. The published bounds have equality for
    ε = 0; the one on the gradient stays a bound for ε > 0, the one on the curvature does not. The relative errors are those
    of the dtype's rounding where layer and network do what is said above.

    Args:
        model, loss, batch, process_group: as for `syncbn.analysis.objective.objective`; the model twice
            differentiable where it is.

    Returns:
        Layers in the order of their calls; those in eval mode, SyncBatchNormReLU, and calls that are masked or run under
        torch.no_grad() are left out.

    Raises:
        ValueError: as `objective`; no batch norm layer normalizes by its batch, or one is a torch.nn.SyncBatchNorm over ranks.
    """
    calls: list[_Call] = []
    with objective(model, loss, batch, process_group) as goal:
        for name, layer in goal.model.named_modules():
            if isinstance(layer, nn.SyncBatchNorm) and layer.training and (size := size_of(resolve(layer.process_group))) > 1:
                raise ValueError(
                    f"given layer {name!r}, a torch.nn.SyncBatchNorm of {size} ranks; expected layers of syncbn, which can be "
                    "differentiated twice: syncbn.convert(model) before"
                )
        handles = [
            handle
            for name, layer in goal.model.named_modules()
            if normalizes_by_its_batch(layer)
            if not isinstance(layer, SyncBatchNormReLU)  # whose output is not that of batch norm
            for handle in _watch(name or type(layer).__name__, layer, calls)
        ]
        try:
            part = goal.local()
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise ValueError(
                f"given a {type(goal.model).__name__} in which no batch norm layer normalizes by its batch; "
                "expected one or more, in training mode"
            )
        wanted = [tensor for call in calls for tensor in (call.y, call.z)]
        found = torch.autograd.grad(part, wanted, create_graph=True, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
        return tuple(_terms(goal, call, filled[2 * i], filled[2 * i + 1]) for i, call in enumerate(calls))


def _watch(name: str, layer: nn.Module, calls: list[_Call]) -> list[Any]:
    """Hooks that give each call an input and an output of its own: neither is used beside it or written to."""
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        inputs.clear()
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        first = 0 if args else "input"
        if any(value is not None for key, value in given.items() if key != first):  # a mask
            return None
        y = given[first].clone()
        inputs.append(y if y.requires_grad else y.requires_grad_())
        return (inputs[0],), {}

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if inputs and output.requires_grad:  # it does not under no_grad
            calls.append(_Call(name, module, inputs.pop(), output))
        return output.clone()

    return [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]


def _terms(goal: Objective, call: _Call, u: Tensor, g: Tensor) -> LayerSmoothness:
    layer, group = call.layer, call.layer._syncbn.group.resolve() if isinstance(call.layer, _Synchronized) else None

    def reduced(*tensors: Tensor) -> list[Tensor]:
        return sum_over_ranks(tensors, group, "batch_norm_smoothness")

    def per_channel(x: Tensor) -> Tensor:
        return x.sum(equations.channel_dims(x))

    def spread(x: Tensor) -> Tensor:
        return equations.per_channel(x, y)

    y, du, dg = call.y.detach().double(), u.detach().double(), g.detach().double()
    local = equations.moments(y)
    mean, var, m = equations.statistics(reduced(local)[0])
    r = (var + layer.eps).rsqrt()
    gamma = torch.ones_like(r) if layer.weight is None else layer.weight.detach().double()
    yhat = (y - spread(mean)) * spread(r)
    sum_g, sum_gy, sum_u, sum_uy = reduced(per_channel(dg), per_channel(dg * yhat), per_channel(du), per_channel(du * yhat))
    pu = du - spread(sum_u / m) - yhat * spread(sum_uy / m)
    scale, share = (gamma * r).square(), local[-1] / m  # of the sums over the group, this rank's part
    scaled = (scale * per_channel(dg.square())).sum()
    slack = (scale * (sum_g.square() + sum_gy.square()) / m).sum() * share
    left = (scale * sum_gy.square() / m * (1 - var * r.square())).sum() * share
    removed = -2 * sum_uy / m * gamma * r.square() * per_channel(dg * pu)
    removed = removed - gamma * r.square() / m * sum_gy * per_channel(du * pu)
    products = _quadratic(u, call.y, du), _quadratic(g, call.z, spread(gamma * r) * pu)
    values = [du.square().sum(), dg.square().sum(), scaled, slack, left, removed.sum(), *products]
    squared, without, scaled, slack, left, taken, curvature, rest = goal.sum([torch.stack(values)])[0].tolist()
    gradient_error = abs(squared - (scaled - slack - left)) / max(scaled, 1e-300)
    largest = max(abs(curvature), abs(rest), abs(taken), 1e-300)
    error = abs(curvature - rest - taken) / largest
    return LayerSmoothness(call.name, squared, without, scaled, slack, gradient_error, curvature, rest, error)


def _quadratic(gradient: Tensor, variable: Tensor, direction: Tensor) -> Tensor:
    """directionᵀ·∂gradient/∂variable·direction, this rank's part of it, () float64."""
    if not gradient.requires_grad:
        return direction.new_zeros(())
    along = (gradient * direction.to(gradient.dtype)).sum()
    (product,) = torch.autograd.grad(along, variable, retain_graph=True, allow_unused=True)
    return direction.new_zeros(()) if product is None else (product.double() * direction).sum()
