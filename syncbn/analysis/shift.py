"""Internal covariate shift: how much the gradient of a layer changes when the layers before it are updated.

Requirements
    - the protocol to the letter: all gradients at step t first; then layer by layer, each measured with the layers before it
      updated and the rest not, on the same batch; the update of a layer uses its gradient of step t;
    - gradients are averaged over the ranks first and compared then; all ranks run all passes.
"""

import copy
import inspect
import math
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..collectives import GroupLike
from .layers import layers_run
from .objective import Loss, Objective, cosine, norm, objective


class LayerShift(NamedTuple):
    """Of the weights W_i of a layer: G_i at step t, G'_i with the layers before it at step t + 1."""

    name: str  # path of the module
    cosine: float  # ⟨G, G'⟩/(‖G‖·‖G'‖); NaN where one is zero
    l2: float  # ‖G − G'‖
    relative: float  # ‖G − G'‖/‖G‖


class Shift(NamedTuple):
    """No shift: cosines 1, distances 0."""

    layers: tuple[LayerShift, ...]  # in the order in which forward runs them; the first is (1, 0) by definition
    cosine: float  # mean over the layers but the first and those without a gradient; NaN where one is not finite
    relative: float


def gradient_correlation(
    model: nn.Module, loss: Loss, batch: Any, optimizer_or_lr: Optimizer | float, process_group: GroupLike = None
) -> Shift:
    """The internal covariate shift of the layers of a network in the step that an optimizer would take now.

        G_i  = ∇_{W_i} L(W_1ᵗ, …, W_kᵗ)          G'_i = ∇_{W_i} L(W_1ᵗ⁺¹, …, W_{i−1}ᵗ⁺¹, W_iᵗ, …, W_kᵗ)          on one batch

    (Santurkar et al. 2018, arXiv:1805.11604, definition 2.1.) k + 1 passes for k layers: one for their order, one for all G_i,
    one for each G'_i but the first. A layer is a weight with the parameters that run with it (bias, batch norm affine): see
    `layers_run`. Neither model nor optimizer is changed. Which of two networks has the larger shift depends on the learning
    rate and on how long they have trained: compare them early, at the same rate.

    Args:
        model, loss, batch, process_group: as for `syncbn.analysis.objective.objective`: `loss(model, batch)` is
            the mean loss of this rank's share.
        optimizer_or_lr: an optimizer of the model's parameters, whose next step is taken on a copy, with its hooks on steps, as
            clipping may be; or the learning rate of plain gradient descent. 0 is a control: cosines 1, distances exactly 0.

    Raises:
        ValueError: as `objective`; a learning rate that is no number of 0 or more; an optimizer of none of the parameters,
            or one whose step needs a closure, as LBFGS; no layer with weights.
    """
    with objective(model, loss, batch, process_group) as goal:
        layers = layers_run(goal.model, goal.local)
        _, gradients = goal.gradients()
        updated = dict(zip(goal.parameters, _updated(goal, gradients, optimizer_or_lr), strict=True))
        at_start = dict(zip(goal.parameters, gradients, strict=True))
        found = []
        for number, layer in enumerate(layers):
            before = [at_start[parameter] for parameter in layer.weights]
            after = before if number == 0 else goal.gradients(layer.weights)[1]
            found.append(_compared(layer.name, before, after))
            with torch.no_grad():
                for parameter in layer.parameters:
                    parameter.copy_(updated[parameter])
    # A layer whose gradient is zero has no angle, and does not count; one whose gradient is not finite does.
    rest = [one for one in found[1:] if not (math.isnan(one.cosine) and math.isfinite(one.l2))]
    moved = [one.relative for one in found[1:] if not (math.isnan(one.relative) and math.isfinite(one.l2))]
    return Shift(tuple(found), _mean([one.cosine for one in rest]), _mean(moved))


def _compared(name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> LayerShift:
    distance, length = norm([a - b for a, b in zip(before, after, strict=True)]), norm(before)
    return LayerShift(name, cosine(before, after), distance, distance / length if length > 0 else math.nan)


def _updated(goal: Objective, gradients: Sequence[Tensor], optimizer_or_lr: Optimizer | float) -> list[Tensor]:
    """What the parameters would be after the step."""
    if not isinstance(optimizer_or_lr, Optimizer):
        rate = optimizer_or_lr
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
            raise ValueError(f"given optimizer_or_lr={rate!r}; expected an Optimizer or a learning rate of 0 or more")
        return [p.detach() - rate * g.to(p.dtype) for p, g in zip(goal.parameters, gradients, strict=True)]
    return _stepped(goal, gradients, optimizer_or_lr)


def _stepped(goal: Objective, gradients: Sequence[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """What the parameters would be after a step of a copy of the optimizer."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for p in held if not any(p is mine for mine in goal.parameters)]
    given = type(optimizer).__name__
    if len(others) == len(held):
        raise ValueError(f"given a {given} that holds no parameter of the model; expected the model's own")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"given a {given}, whose step calls a closure, several times perhaps; expected an optimizer that steps by the "
            "gradients it is given, or a learning rate"
        )
    stepped = _copied(optimizer, held)
    kept = [p.detach().clone() for p in goal.parameters]
    absent = [(p, p.grad) for p in others]
    try:
        for parameter, gradient in zip(goal.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype, copy=True)  # an optimizer may write to it
        for parameter in others:
            parameter.grad = None
        type(stepped).step(stepped)
        return [parameter.detach().clone() for parameter in goal.parameters]
    finally:
        with torch.no_grad():
            for parameter, value in zip(goal.parameters, kept, strict=True):
                parameter.copy_(value)
        for parameter, gradient_or_none in absent:
            parameter.grad = gradient_or_none


def _copied(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Optimizer:
    """A copy of the optimizer and all that it has, of the same parameters."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in parameters}
    copied = copy.deepcopy(optimizer, memo)  # of what it pickles: state, groups and defaults
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    for name, value in vars(optimizer).items():
        if name in hooks:
            vars(copied)[name] = type(value)((key, _rebound(hook, optimizer, copied)) for key, hook in value.items())
        elif name not in vars(copied) and name != "step":  # which a schedule of learning rates has put around the class's
            try:
                vars(copied)[name] = copy.deepcopy(value, memo)
            except TypeError:  # what has no copy, as a process group or a lock, is shared
                vars(copied)[name] = value
    return copied


def _rebound(hook: Any, old: Optimizer, new: Optimizer) -> Any:
    """A hook that is a method of the one optimizer, of the other; another as it is."""
    return types.MethodType(hook.__func__, new) if getattr(hook, "__self__", None) is old else hook


def _mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return sum(values) / len(values) if values else math.nan
