"""Statistics for inference: of the population, estimated by the network as it is, and of ranks that trained apart.

Requirements
    - the same values for any number of ranks and any shares, ranks that run out of batches and empty batches included;
    - all sums in float64, read from the messages that layers reduce anyway;
    - whatever happens, the model gets back its modes, hooks and classes; its statistics change at the end, or not at all;
    - every rank issues the same collectives: who has a batch is agreed on before each forward.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from . import equations, observing
from .accumulation import Calls, eagerly, unwrapped
from .collectives import Group, ProcessGroup, reduce_together
from .convert import convert, revert
from .lockstep import inputs_in_step
from .module import _Synchronized
from .progress import bar_over

# The names of the collectives in error messages.
UPDATE, POOL = "update_bn_stats", "pool_running_stats"


@torch.no_grad()
def update_bn_stats(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int | None = None,
    pooled: bool = False,
    progress: bool = True,
) -> None:
    """Give batch norm layers the statistics of the population, estimated by the network as it is now.

    E[x] = E[μ_B] and Var[x] = E[m/(m − 1)·v_B] over the mini-batches B of `loader` (Ioffe & Szegedy 2015, arXiv:1502.03167,
    section 3.1 and algorithm 2), where m, μ_B and v_B are those of the global mini-batch; batches of different m weigh by m.
    They take the place of the moving average, which remembers older weights; num_batches_tracked becomes the number of
    mini-batches.

    Each rank brings its own loader. A rank with fewer batches than others goes on with empty ones, its last without the
    samples, which the model has to take: tensors in lists, tuples, named tuples, dict, UserDict and dataclasses. A layer called
    twice in a forward has two mini-batches. Batches of m = 1 have no variance and count for the mean alone; a layer that sees
    no value keeps its statistics. Every rank of the layers' groups calls this, with the same model, and every rank of the job
    where a layer has a group_size: groups of a size run forwards together to the end of the longest loader, so that fully_shard
    may gather over all of them. Layers whose groups were given as such go on with their own group only: under fully_shard over
    more ranks than these, bring as many batches to each. What torch.compile has compiled before
    runs eagerly.

    **Which layers.** Those in training mode; all of them if no module of the model is in training mode. So layers in eval mode
    in a training model are frozen: they normalize by their statistics and keep them, as do modules that are no nn.BatchNorm*.
    Other modules stay in the mode they are in: dropout is on in a model in training mode, off after model.eval().

    **Layers of torch** (nn.BatchNorm*, not converted) normalize each rank's share by itself, as they train: their mini-batches
    are the shares, and their statistics become the mean over the mini-batches of all ranks of the job. torch.nn.SyncBatchNorm
    is as ours.

    Args:
        model: any model, in DistributedDataParallel, AveragedModel, whose running statistics are those of other weights, or
            nn.DataParallel of one device, or in none; such a wrapper's own mode does not matter.
        loader: batches on the model's device: a tensor, a list or tuple whose first element is the input, or a mapping of
            keyword arguments.
        num_batches: take at most so many batches of each rank.
        pooled: take the mean and the unbiased variance of all samples together, m/(m − 1)·v with the m of all batches, rather
            than the mean over mini-batches of their variances; the variance of the μ_B is then part of it.
        progress: show a progress bar on rank 0, if tqdm is installed.

    Raises:
        ValueError: num_batches is below 1; a rank has no batch (raised on all ranks); a batch is a list or tuple of nothing;
            nn.DataParallel over several devices.
        TypeError: a rank has run out of batches that hold tensors in something else (raised on all ranks).
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"given num_batches={num_batches}; expected 1 or more, or None for all")
    sums: dict[Any, Tensor] = {}

    def add(layer: _BatchNorm, message: Tensor) -> None:
        terms = _terms(message, pooled)
        sums[layer] = sums[layer] + terms if layer in sums else terms

    with _others_kept(model), contextlib.ExitStack() as stack:
        layers = stack.enter_context(_training(model))
        if not any(_tracks(layer) for layer in layers):
            return
        local = stack.enter_context(_synchronized(layers))
        groups = _groups(layers)
        stack.enter_context(observing.forwards_apart(layers))
        stack.enter_context(Calls([layer for layer in layers if _tracks(layer)], add).watch())
        bar = stack.enter_context(bar_over(loader, num_batches, "population statistics", progress))
        for inputs in inputs_in_step(loader, num_batches, groups, _device(layers), UPDATE):
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            bar.update()
    _combine([layer for layer in local if _tracks(layer)], sums)
    for layer, total in sums.items():
        _write(layer, total, pooled)


@torch.no_grad()
def pool_running_stats(model: nn.Module) -> None:
    """Pool the running statistics of ranks that trained with local batch norm: every rank gets those of all together.

    The ranks' distributions are mixed: μ = Σ w·μ_r and v = Σ w·(v_r + (μ_r − μ)²), in float64 by two all_reduces for all
    layers of a group. A rank weighs by its num_batches_tracked, so that one that never trained does not count; all weigh alike
    where it is not kept, or 0 on all. It stays each rank's own, and doing it all twice changes nothing more.

    Args:
        model: any model; layers of ours and torch.nn.SyncBatchNorm are pooled over their group, nn.BatchNorm* over all ranks
            of the job. As in `update_bn_stats`, layers in eval mode in a training model are frozen and left alone. Every rank
            calls this, with the same model.
    """
    by_group: dict[ProcessGroup, list[Any]] = {}
    for layer in _layers(model):
        theirs = layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None
        group = layer._syncbn.group.resolve() if isinstance(layer, _Synchronized) else Group(theirs).resolve()
        if group is not None and group.size() > 1 and _tracks(layer):
            by_group.setdefault(group, []).append(layer)
    for group, layers in by_group.items():
        _mix(layers, group)


def _mix(layers: list[Any], group: ProcessGroup) -> None:
    """Set each layer's statistics to those of the group's mixture, by one all_reduce of means and one of variances."""
    means = [layer.running_mean.double() for layer in layers]  # (C,) each
    weights = [_weight(layer) for layer in layers]  # () each
    packed = [torch.cat([w * mean, mean, w.view(1)]) for w, mean in zip(weights, means, strict=True)]
    pooled, spreads = [], []
    for layer, mean, weight, total in zip(layers, means, weights, reduce_together(packed, POOL, group), strict=True):
        weighted, plain, (all_weights,) = total.split([len(mean), len(mean), 1])
        counted = all_weights > 0
        pooled.append(torch.where(counted, weighted / all_weights, plain / group.size()))
        share = torch.where(counted, weight / all_weights, 1 / group.size())
        spreads.append(share * (layer.running_var.double() + (mean - pooled[-1]).square()))
    for layer, mean, var in zip(layers, pooled, reduce_together(spreads, POOL, group), strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _layers(model: nn.Module) -> list[Any]:
    """The batch norm layers that are not frozen: in training mode, or all if no module of the model is in training mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not any(module.training for module in unwrapped(model).modules()):
        return norms
    return [layer for layer in norms if layer.training]


def _tracks(layer: Any) -> bool:
    return layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None


def _device(layers: list[Any]) -> torch.device:
    return next(layer.running_mean.device for layer in layers if _tracks(layer))


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[list[Any]]:
    """The layers that are not frozen, in training mode inside; uncompiled, DistributedDataParallel not broadcasting buffers."""
    modes = [(module, module.training) for module in model.modules()]
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise ValueError("given nn.DataParallel over several devices, in whose copies no call is seen; expected its module")
    wrappers = [(m, m.broadcast_buffers) for m in model.modules() if isinstance(m, DistributedDataParallel)]
    layers = _layers(model)
    try:
        for layer in layers:
            layer.train()
        for wrapper, _ in wrappers:
            wrapper.broadcast_buffers = False
        with eagerly():
            yield [layer for layer in layers if layer.training]  # a class may refuse to train
    finally:
        for wrapper, broadcasts in wrappers:
            wrapper.broadcast_buffers = broadcasts
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _others_kept(model: nn.Module) -> Iterator[None]:
    """Normalizing layers that are no nn.BatchNorm*, as nn.InstanceNorm*, have their statistics again afterwards."""
    others = [module for module in model.modules() if isinstance(module, _NormBase) and not isinstance(module, _BatchNorm)]
    buffers = [buffer for module in others for buffer in module.buffers(recurse=False) if not is_lazy(buffer)]
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextlib.contextmanager
def _synchronized(layers: list[Any]) -> Iterator[list[Any]]:
    """Layers of torch are of our class inside, each rank a group of its own; these layers, torch.nn.SyncBatchNorm aside."""
    foreign = [layer for layer in layers if not isinstance(layer, _Synchronized)]
    local = [layer for layer in foreign if not isinstance(layer, nn.SyncBatchNorm)]
    try:
        for layer in foreign:
            convert(layer, group_size=1 if layer in local else None)
        yield local
    finally:
        for layer in foreign:
            revert(layer)


def _groups(layers: list[Any]) -> list[ProcessGroup]:
    """The groups of more than one rank whose ranks run forwards together, in the order of the layers.

    All ranks of the job, where groups are given by size, as those of torch's layers are: fully_shard gathers over all of them.
    """
    found = [Group().resolve() if layer._syncbn.group.group_size else layer._syncbn.group.resolve() for layer in layers]
    return [group for group in dict.fromkeys(found) if group is not None and group.size() > 1]


def _terms(message: Tensor, pooled: bool) -> Tensor:
    """What a mini-batch adds to the sums: (2C+3,) of means, variances (second moments if pooled), their weights, batches."""
    mean, var, n = equations.statistics(message)
    several = n > 1
    second = message[len(mean) : -1] if pooled else torch.where(several, var * n.square() / (n - 1).clamp(min=1), 0)
    return torch.cat([message[: len(mean)], second, torch.stack([n, n * several, (n > 0).double()])])


def _combine(layers: list[Any], sums: dict[Any, Tensor]) -> None:
    """Add up the sums of layers that normalized each rank by itself."""
    group = Group().resolve()
    if layers and group is not None and group.size() > 1:
        nothing = [layer.running_mean.new_zeros(2 * layer.num_features + 3, dtype=torch.float64) for layer in layers]
        mine = [sums.get(layer, zeros) for layer, zeros in zip(layers, nothing, strict=True)]
        sums.update(zip(layers, reduce_together(mine, UPDATE, group), strict=True))


def _write(layer: Any, sums: Tensor, pooled: bool) -> None:
    """Set the layer's statistics from its sums (2C+3,), as far as it has seen values."""
    channels = len(sums) // 2 - 1
    first, second, n, n_of_several, batches = sums.split([channels, channels, 1, 1, 1])
    if pooled:
        mean, var, _ = equations.statistics(torch.cat([first, second, n]))
        var, known = var * n / (n - 1).clamp(min=1), n > 1
    else:
        mean, var, known = first / n.clamp(min=1), second / n_of_several.clamp(min=1), n_of_several > 0
    layer.running_mean.copy_(torch.where(n > 0, mean, layer.running_mean))
    layer.running_var.copy_(torch.where(known, var, layer.running_var))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(torch.where(n > 0, batches, layer.num_batches_tracked).squeeze())


def _weight(layer: Any) -> Tensor:
    """What a rank's statistics weigh, () float64: the batches it has seen."""
    counted = layer.num_batches_tracked
    return layer.running_mean.new_ones((), dtype=torch.float64) if counted is None else counted.double()
