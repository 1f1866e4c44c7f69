"""Synchronized batch normalization as a function: what is checked before the collective, and the public form.

Requirements
    - what can be checked is checked before the collective, and the error names the layer and the rank;
    - alone, without an observer, it is torch.nn.functional.batch_norm to the bit, errors included.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import differentiable, kernels, observing
from .arguments import as_number, eager_problem, half_tracked, mask_problem, problem_of, residual_problem, where
from .collectives import Group, GroupLike
from .eager import Rest, normalize, strided_as
from .kernels import Affine, Running, extension
from .observing import Call


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: GroupLike = None,
    mask: Tensor | None = None,
    *,
    _force_sync: bool = False,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the statistics of the batch of all processes (Ioffe & Szegedy 2015, algorithm 1).

    In training one all_reduce of 2C+1 float64 values forward and one of 2C backward, whatever the ranks' shares of the batch;
    without `training`, and in a process that is alone, it is F.batch_norm itself.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64, any strides; N and * may be empty, and differ between ranks.
        running_mean, running_var: (C,) moved in place in training by `momentum`, the variance by v·n/(n − 1) of the global n;
            both or neither. No value in the whole batch leaves both; a single one moves the mean and leaves the variance.
        weight, bias: (C,) γ and β, in any floating dtype. Their gradients are the sums over this rank's share: see
            `syncbn.SyncBatchNorm` on what data-parallel averaging makes of them.
        training: normalize by the batch, not by the running statistics.
        momentum: the step of the running statistics.
        eps: ε, added to the variance.
        process_group: the ranks that share statistics: None (all), a ProcessGroup or a 1-D DeviceMesh.
        mask: (N, *) or (N, 1, *) bool, true at the positions that count, as padding does not. Elsewhere y and the gradient of
            the input are 0, whatever the input is there, NaN too, in training and without.

    Returns:
        (N, C, *) in the dtype of `input`, in training with the strides of torch.empty_like(input).

    Raises:
        ValueError: fewer than 2 dimensions, channels or a mask that do not fit, one running statistic of the two, negative eps,
            tensors on several devices, a device without float64, a rank outside of the group; in training, an input or a mask
            that torch.func.vmap batches beside running statistics that it does not, or an input made in inference mode that
            is to be kept for backward.
        TypeError: a dtype that is not of the four, a mask that is not bool, a momentum that is no number, a group that is none.
        CollectiveError: a peer is gone, or did not come within the group's timeout.
    """
    if (running_mean is None) != (running_var is None):
        raise half_tracked("sync_batch_norm")
    if not training:
        return local(input, running_mean, running_var, Affine(weight, bias, eps), False, mask, "sync_batch_norm")
    momentum = as_number(momentum)
    if not isinstance(momentum, (int, float)):
        raise TypeError(
            f"given momentum={momentum!r}; expected a number: None is for layers, which count batches "
            f"({where('sync_batch_norm')})"
        )
    running = None if running_mean is None or running_var is None else Running(running_mean, running_var, None, momentum)
    site = Site("sync_batch_norm", Group(process_group), None, _force_sync)
    return train(input, Affine(weight, bias, eps), running, site, mask)


class Site(NamedTuple):
    """Where a batch is normalized: what the layer knows of itself, for the collective and for error messages."""

    layer: str
    group: Group
    channels: int | None  # what the layer was made for; None: as many as the input has
    force_sync: bool  # take the synchronized path in a process that is alone too
    module: Any = None  # the layer itself; None: a call of the function


class Forward:
    """One forward of a layer, observed: the same object in its call and in those of its backward."""

    __slots__ = ("__weakref__", "eps", "layer", "weight")

    def __init__(self, layer: Any, affine: Affine) -> None:
        self.layer = layer  # the module; None: a call of the function
        weight = affine.weight  # (C,) or None: what this call takes for γ, which a user's forward may have made of the layer's
        while weight is not None and torch._C._functorch.is_functorch_wrapped_tensor(weight):
            weight = torch._C._functorch.get_unwrapped(weight)
        self.weight, self.eps = None if weight is None else weight.detach(), affine.eps


def train(x: Tensor, affine: Affine, running: Running | None, site: Site, mask: Tensor | None = None) -> Tensor:
    """Normalize x (N, C, *) by the statistics of its batch over the site's group, and move `running` unless in a backward.

    Can be overridden as torch's functions can, by __torch_function__ and its modes.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(train, (x,), x, affine, running, site, mask)
    try:
        group = site.group.resolve()
    except ValueError as error:
        raise ValueError(f"{error} ({where(site.layer)})") from None
    compiling = torch.compiler.is_compiling()
    recomputing, observers = (False, ()) if compiling else (in_backward(), observing.observers())
    problem = residual_problem(x, affine.residual)  # torch's operators would broadcast it
    if problem is not None:
        raise type(problem)(f"{problem} ({where(site.layer)})")
    alone = group is None or group.size() == 1
    observed = bool(observers)
    if alone and not compiling:
        observed = observing.observed_in_forward(site.module, observed, recomputing)
    if alone and mask is None and not site.force_sync and not observed and not _has_kernels(x, affine):
        return _train_alone(x, affine, _spare(running) if recomputing else running)
    if recomputing:
        running = None
    elif running is not None and not isinstance(running.momentum, float):
        running = running._replace(momentum=as_number(running.momentum))
    library = None if compiling else extension.library
    in_order = library is not None and library.is_in_order(x, affine, running, site.channels)
    problem = (None if in_order else problem_of(x, affine, running, site.channels)) or mask_problem(x, mask)
    if problem is None and not compiling:
        problem = eager_problem(x, affine, running, mask, alone)
    if problem is not None:
        raise type(problem)(f"{problem} ({where(site.layer)})")
    forward = None if compiling or not observing.observed(group) else Forward(site.module, affine)
    call = Call(site.layer, "recompute" if recomputing else "forward", x.shape[1], x.dtype, group, True, forward)
    rest = Rest(affine, running, call, observers, None)
    return normalize(x, rest) if mask is None else _masked(x, rest, mask)


def _masked(x: Tensor, rest: Rest, mask: Tensor) -> Tensor:
    """y and dx are 0 where the mask (N, *) or (N, 1, *) is false, whatever x is there."""
    mask = _broadcast(mask, x)
    y = torch.where(mask, normalize(torch.where(mask, x, 0), rest._replace(mask=mask)), 0)
    return strided_as(x, y)


def _has_kernels(x: Tensor, affine: Affine) -> bool:
    """Whether x has kernels that are faster than several operators of torch, for what torch has no operator."""
    return affine.relu and not differentiable.wanted() and kernels.pick(x) is not kernels.composed()


def in_backward() -> bool:
    """Whether a backward is running: a forward inside it recomputes one that has moved the running statistics already.

    Compiled code cannot tell.
    """
    return torch._C._current_graph_task_id() != -1


def _spare(running: Running | None) -> Running | None:
    """Copies to be moved in place of the buffers: torch's operator saves what it is given, and has to save the same again."""
    if running is None:
        return None
    counted = running.num_batches_tracked
    return running._replace(
        mean=running.mean.clone(), var=running.var.clone(), num_batches_tracked=None if counted is None else counted.clone()
    )


def _train_alone(x: Tensor, affine: Affine, running: Running | None) -> Tensor:
    """F.batch_norm as torch.nn.BatchNorm calls it, but for momentum=None, whose factor stays on the device."""
    weight, bias, eps, _, _ = affine
    if running is None:
        return _activated(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), affine)
    mean, var, num_batches_tracked, momentum = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return _activated(F.batch_norm(x, mean, var, weight, bias, True, momentum, eps), affine)
    assert num_batches_tracked is not None, "momentum=None counts batches"
    batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
    y = F.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, eps)
    if x.numel():  # else torch's operator leaves statistics as they are
        factor = num_batches_tracked.double().reciprocal()
        mean.copy_(factor * batch_mean + (1 - factor) * mean)
        var.copy_(factor * batch_var + (1 - factor) * var)
    return _activated(y, affine)


def _activated(y: Tensor, affine: Affine) -> Tensor:
    """What is behind torch's batch norm."""
    if affine.residual is not None:
        y = y + affine.residual
    return y.relu() if affine.relu else y


def local(
    x: Tensor,  # (N, C, *)
    mean: Tensor | None,  # (C,)
    var: Tensor | None,  # (C,)
    affine: Affine,
    by_batch: bool,  # by the statistics of x, for want of others
    mask: Tensor | None,  # (N, *) or (N, 1, *)
    layer: str,
) -> Tensor:
    """F.batch_norm by the mean and variance given, or by those of x alone; 0 where the mask is false."""
    problem = residual_problem(x, affine.residual) or mask_problem(x, mask)
    if problem is None and by_batch and mask is not None:  # else it is for torch's operator to say
        problem = problem_of(x, affine, None, None)
    if problem is not None:
        raise type(problem)(f"{problem} ({where(layer)})")
    if mask is None:
        return _activated(F.batch_norm(x, mean, var, affine.weight, affine.bias, by_batch, 0.0, affine.eps), affine)
    mask = _broadcast(mask, x)
    if by_batch:
        call = Call(layer, "forward", x.shape[1], x.dtype, None)
        observers = () if torch.compiler.is_compiling() else observing.observers()
        return _masked(x, Rest(affine, None, call, observers, None), mask)
    y = F.batch_norm(torch.where(mask, x, 0), mean, var, affine.weight, affine.bias, False, 0.0, affine.eps)
    return torch.where(mask, _activated(y, affine), 0)


def _broadcast(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as (N, 1, *)."""
    return mask if mask.dim() == x.dim() else mask.unsqueeze(1)
