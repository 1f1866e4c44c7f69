"""Whether the gradients of a network grow from layer to layer at initialization, and what synchronizing does about it.

Requirements
    - norms of the real forward graph: depth is counted along it, not by registration;
    - the same figures for any number of ranks: one pass, and one all_reduce of the gradients and of one scalar a layer.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..collectives import GroupLike
from .factor import Activation, GrowthFactor, growth_factor
from .layers import weights_of
from .objective import Loss, Objective, norm, objective
from .tape import Tape

SKIPPED = 3  # layers next to the loss, whose gradients have not settled
LITTLE = 1.01  # λ² below which nothing grows


class LayerGradient(NamedTuple):
    name: str  # path of the module
    depth: int  # layers that call no other on the longest path from the input to its output, itself included if it is one
    weight_norm: float  # ‖∂L/∂W‖
    output_norm: float  # ‖∂L/∂h‖, of its outputs in all calls


class NormLayer(NamedTuple):
    name: str
    local: float  # values per channel of this rank's share, in its first call; under a mask those that count
    total: float  # of the shares of all ranks
    samples: int  # N of this rank's share


class Growth(NamedTuple):
    """L is the mean loss of all ranks."""

    layers: tuple[LayerGradient, ...]  # in the order in which their first calls begin
    norms: tuple[NormLayer, ...]  # batch norm layers that normalize by their batch, likewise
    lambda_sq: float  # growth of ‖∂L/∂W‖² per layer, towards the input, as fitted; NaN for fewer than two depths
    lambda_norm: float  # of ‖∂L/∂W‖
    lambda_sq_output: float  # of ‖∂L/∂h‖²
    first_over_last: float  # ‖∂L/∂W‖ of the first layer over that of the last, of those that call no other


def gradient_growth(model: nn.Module, loss: Loss, batch: Any, process_group: GroupLike = None) -> Growth:
    """The norms of the gradients of each layer, and their growth per layer towards the input.

        growth = gradient_growth(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (x, target))
        print(advice(growth))

    1. One forward and backward of the model as it is, in its mode. 2. The gradients of the weights are averaged over the
    ranks, Σ over ranks ‖∂L/∂h‖² is added. 3. λ² = exp(−slope) of a line through log ‖∂L/∂W‖² by depth, over depths 2 to
    (last − 3) where the network has 8 or more, over all otherwise (Yang et al. 2019, arXiv:1902.08129). Layers of
    different widths have norms of different size whatever their depth: λ describes networks of like layers.

    A layer is a module with a weight of its own. One that calls other layers (a model that adds a positional embedding, a block
    with a scale of its own) is listed, but the fits, the depths and the ratio are of those that call no other. The gradients
    of a parametrized layer are by what is trained in the place of its weight.

    Args:
        model, loss, batch, process_group: as for `syncbn.analysis.objective.objective`: `loss(model, batch)` is
            the mean loss of this rank's share.

    Raises:
        ValueError: as `objective`; no module with a weight was run.
    """
    with objective(model, loss, batch, process_group) as goal:
        tape = Tape()
        with tape.recording(goal.model):
            part = goal.local()
        if not tape.modules:
            raise ValueError(
                f"given a {type(goal.model).__name__} whose forward runs no module with a weight that requires a gradient; "
                "expected one or more"
            )
        return _measured(goal, tape, part)


def _measured(goal: Objective, tape: Tape, part: Tensor) -> Growth:
    depths = tape.depths(part.grad_fn)
    parameters = [parameter for module in tape.modules.values() for parameter in weights_of(module)]
    found = torch.autograd.grad(part, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    zero = part.detach().double() * 0
    squares = torch.stack([sum((square.to(zero.device) for square in tape.squares[path]), zero) for path in tape.modules])
    counts = torch.tensor([float(n) for n, _ in tape.values.values()], dtype=torch.float64, device=zero.device)
    squares, counts, *summed = goal.sum([squares, counts, *gradients])
    of = dict(zip(parameters, summed, strict=True))
    layers = tuple(
        LayerGradient(path, depths[path], norm([of[p] for p in weights_of(module)]), square**0.5)
        for (path, module), square in zip(tape.modules.items(), squares.tolist(), strict=True)
    )
    totals = zip(tape.values.items(), counts.tolist(), strict=True)
    norms = tuple(NormLayer(path, n, total, samples) for (path, (n, samples)), total in totals)
    counted = [layer for layer in layers if layer.name not in tape.callers]
    by_depth = [layer.depth for layer in counted]
    weights = fitted(by_depth, [layer.weight_norm**2 for layer in counted])
    outputs = fitted(by_depth, [layer.output_norm**2 for layer in counted])
    first, last = counted[0].weight_norm, counted[-1].weight_norm
    ratio = first / last if last > 0 else math.nan
    return Growth(layers, norms, weights.lambda_sq, weights.lambda_norm, outputs.lambda_sq, ratio)


def fitted(depths: Sequence[int], squares: Sequence[float]) -> GrowthFactor:
    """λ of squared norms by depth: exp(−slope) of the line of least squares through their logarithms.

    Over depths 2 to (last − 3) where there are 8 or more; without norms that are zero or not finite.
    """
    last = max(depths)
    within = range(2, last - SKIPPED + 1) if last >= 8 else range(0, last + 1)
    points = [
        (depth, math.log(square))
        for depth, square in zip(depths, squares, strict=True)
        if depth in within and 0 < square < math.inf
    ]
    if len({depth for depth, _ in points}) < 2:
        return GrowthFactor(math.nan, math.nan)
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    lambda_sq = math.exp(-((x * y).sum() / x.square().sum()).item())
    return GrowthFactor(lambda_sq, math.sqrt(lambda_sq))


def advice(growth: Growth, activation: str | Activation = "relu", ranks: Sequence[int] = (2, 4, 8, 16)) -> str:
    """What the growth is, what theory gives for these numbers of values, and what to do.

    Args:
        activation: what follows the batch norm layers, as for `growth_factor`.
        ranks: in a process that is alone: numbers of ranks over which this batch might be split, of which those count that are
            no more than its samples; the values are those of the smallest share.

    Raises:
        ValueError: a number of ranks below 1.
    """
    if min(ranks, default=1) < 1:
        raise ValueError(f"given ranks={tuple(ranks)}; expected numbers of 1 or more")
    lines = [
        f"fitted: the squared norm of weight gradients grows by lambda_sq {growth.lambda_sq:.3f} per layer, the norm by "
        f"lambda_norm {growth.lambda_norm:.3f}; first layer over last: {growth.first_over_last:.3g}"
    ]
    if not growth.norms:
        return "\n".join([*lines, "no batch norm layer: nothing to synchronize"])
    worst = min(growth.norms, key=lambda layer: layer.local)
    if worst.total > worst.local:
        lines.append(f"{worst.name}, per layer of its kind: {_compared(worst.local, worst.total, activation)}")
        return "\n".join(lines)
    told = said_of(worst.local, activation)
    splits = [size for size in ranks if size <= worst.samples]
    smallest = [worst.local * (worst.samples // size) / worst.samples for size in splits]
    split = "; this batch split over" if splits else ""
    lines.append(f"{worst.name}, the layer of the fewest values, per layer of its kind: {told}{split}")
    lines += [
        f"  {size} ranks: {_compared(local, worst.local, activation)}" for size, local in zip(splits, smallest, strict=True)
    ]
    return "\n".join(lines)


def said_of(values: float, activation: str | Activation = "relu") -> str:
    """`4 values per channel: lambda_sq 3.08`."""
    count = f"{values:g} value{'s' * (values != 1)} per channel: "
    if values < 2:
        return f"{count}no batch norm"
    factor = growth_factor(values, activation).lambda_sq
    return count + (f"lambda_sq {factor:.2f}" if factor < math.inf else "diverges")


def _compared(local: float, total: float, activation: str | Activation) -> str:
    mine, theirs = (growth_factor(n, activation).lambda_sq if n >= 2 else math.inf for n in (local, total))
    do = "synchronize" if local < 2 or mine > LITTLE * theirs else "synchronizing changes little"
    return f"unsynchronized, {said_of(local, activation)}; synchronized, {said_of(total, activation)}: {do}"
