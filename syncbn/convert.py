"""Turn the batch norm layers of a model into synchronized ones, and back.

Requirements: in place and by class alone, so that parameters, buffers, hooks, attributes, flags, the identity of shared layers
and an optimizer already made all stay; everything is checked before anything changes; `revert` touches what `convert` made.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .collectives import Group, GroupLike, is_default_group
from .module import Binding, SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, _Synchronized

Model = TypeVar("Model", bound=nn.Module)

CLASSES: dict[type[nn.Module], type[_Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def convert(
    module: Model,
    process_group: GroupLike | Callable[[str, nn.Module], GroupLike] = None,
    *,
    group_size: int | None = None,
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Make every batch norm layer of `module`, itself included, a synchronized one, in place.

    Args:
        module: any model. Convert before DistributedDataParallel, `fully_shard` and accelerate's `prepare`.
        process_group: the ranks that share statistics: None (all; a layer that has a group keeps it), a ProcessGroup, a 1-D
            DeviceMesh, or a function (name, layer) → one of these. A second convert with another group changes the group.
        group_size: instead, contiguous groups of this many ranks.
        skip: (name, layer) → True for a layer to leave as it is.

    Returns:
        `module` itself: same object, same layers, other classes.

    Raises:
        TypeError, ValueError: a group that is none, or both kinds of group.
        ValueError: a batch norm layer of a class that is not torch's own.
    """
    groups = process_group if callable(process_group) else lambda name, layer: process_group
    todo: list[tuple[_BatchNorm, type[_Synchronized], Binding]] = []
    for path, layer in _batch_norms(module):
        if skip is not None and skip(path, layer):
            continue
        bound = layer._syncbn if isinstance(layer, _Synchronized) else Binding(Group(_group_of(layer)), path, type(layer))
        target = type(layer) if isinstance(layer, _Synchronized) else CLASSES.get(type(layer))
        if target is None:
            raise ValueError(
                f"given layer {path!r} of class {type(layer).__qualname__}, a batch norm that is not torch's own; "
                "expected nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm: leave it out with skip="
            )
        group = Group(groups(path, layer), group_size)
        if group == Group():
            group = bound.group
        todo.append((layer, target, bound._replace(group=group, path=bound.path or path)))
    for layer, target, binding in todo:
        _become(layer, target, binding)
    return module


def revert(module: Model) -> Model:
    """Give every layer that `convert` changed its class of before, in place; layers made as ours stay. Returns `module`."""
    for _, layer in _batch_norms(module):
        if isinstance(layer, _Synchronized) and layer._syncbn.origin is not None:
            layer.__class__ = layer._syncbn.origin
            del layer._syncbn
    return module


def _become(layer: Any, target: type[_Synchronized], binding: Binding) -> None:
    layer.__class__ = target
    layer._syncbn = binding


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Each batch norm layer once, with its first path."""
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            yield path, layer


def _group_of(layer: nn.Module) -> GroupLike:
    """The group that a torch.nn.SyncBatchNorm has; None for the default group, so that the layer outlives it."""
    group = getattr(layer, "process_group", None)
    return None if is_default_group(group) else group
