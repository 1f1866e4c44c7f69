"""Turn the batch norm layers of a model into synchronized ones, and back.

Requirements: in place and by class alone, so that parameters, buffers, hooks, attributes, flags, the identity of shared layers
and an optimizer already made all stay; everything is checked before anything changes; `revert` touches what `convert` made.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .collectives import Group, GroupLike, is_default_group
from .module import Binding, _Synchronized
from .subclass import class_of, same_parametrizations, synchronized_class, wrapped_anew

Model = TypeVar("Model", bound=nn.Module)


def convert(
    module: Model,
    process_group: GroupLike | Callable[[str, nn.Module], GroupLike] = None,
    *,
    group_size: int | None = None,
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Make every batch norm layer of `module`, itself included, a synchronized one, in place.

    Takes nn.BatchNorm1d/2d/3d, torch.nn.SyncBatchNorm, their lazy forms (which stay lazy), parametrized layers, and users'
    subclasses whose forward ends in super().forward or calls F.batch_norm once: what else such a forward does, stays. What
    looks for torch's own classes, as fuse_modules and preparing for quantization do, comes before it, or behind `revert`.

    **The size of a group.** What counts is the number of values per channel, N·H·W over the group, not N. Gradients of a plain
    ReLU network grow per layer, in squared norm, by λ² = 3.08 at 4 values, 1.79 at 8, 1.59 at 16, 1.52 at 32, 1.49 at 64, and
    1.467 without end; with 3 and fewer nothing bounds them (Yang et al. 2019, arXiv:1902.08129; residual networks grow far
    less). So take the smallest group that brings the layer with the fewest values, mostly the last, to about 32. Past that
    growth is no reason to synchronize: what is left is the noise of the statistics, about 1/√(values), and the bias of
    mini-batch gradients, about 0.45/values. The cost is two all_reduces a layer and step, which are latency: measure yours, and
    what a smaller group saves, with `torchrun … -m syncbn doctor`, and keep a group inside a node where nodes are far apart.

    Args:
        module: any model. Convert before DistributedDataParallel, `fully_shard` and accelerate's `prepare`.
        process_group: the ranks that share statistics: None (all; a layer that has a group keeps it), a ProcessGroup, a 1-D
            DeviceMesh, or a function (name, layer) → one of these. A second convert with another group changes the group.
        group_size: instead, contiguous groups of this many ranks, which must divide the world size. What torch.compile has
            compiled with it is of one job: torch._dynamo.reset() where the process joins another.
        skip: (name, layer) → True for a layer to leave as it is.

    Returns:
        `module` itself: same object, same layers, other classes.

    Raises:
        TypeError, ValueError: no module, a group that is none, or both kinds of group.
        ValueError: a layer that is scripted, of a subclass of torch.nn.SyncBatchNorm, or whose forward was replaced in the
            instance, as the offload hooks of accelerate do: convert first.
    """
    _check_module(module)
    groups = process_group if callable(process_group) else lambda name, layer: process_group
    todo: list[tuple[Any, type[nn.Module], Binding]] = []
    for path, layer in _batch_norms(module):
        if skip is not None and skip(path, layer):
            continue
        target = type(layer)
        if isinstance(layer, _Synchronized):
            bound = layer._syncbn
        else:
            origin, parametrized = class_of(layer)
            left: Binding | None = vars(layer).get("_syncbn")  # by a copy of its attributes, or another class given to it
            theirs = layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None
            group = Group(None if is_default_group(theirs) else theirs) if left is None else left.group  # outlives the default
            bound = Binding(group, path, origin, parametrized, None if theirs is None else Group(theirs))
            target = _target(path, layer, origin, parametrized)
            _check_forward(path, layer)
        group = Group(groups(path, layer), group_size)
        if group == Group():
            group = bound.group
        todo.append((layer, target, bound._replace(group=group, path=bound.path or path)))
    for each, target, binding in todo:
        if type(each) is not target:
            _become(each, target)
        if binding.theirs is not None:  # it would keep the layer from being copied
            vars(each).pop("process_group", None)
        each._syncbn = binding
    return module


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        given = module.__name__ if isinstance(module, type) else type(module).__name__
        raise TypeError(f"given {'the class' if isinstance(module, type) else 'a'} {given}; expected a torch.nn.Module")


def revert(module: Model) -> Model:
    """Give every layer that `convert` changed its class of before, in place; layers made as ours stay. Returns `module`.

    What happened to a layer since is kept: a lazy one that has its parameters becomes what it would have become, and
    parametrizations registered or removed stay so.

    Raises:
        TypeError: no module.
        ValueError: the forward of a layer was replaced in the instance, as the offload hooks of accelerate do: remove
            them first.
    """
    _check_module(module)
    todo: list[tuple[nn.Module, type[nn.Module], Binding]] = []
    for path, layer in _batch_norms(module):
        bound: Binding | None = vars(layer).get("_syncbn")
        if bound is not None and bound.origin is not None:
            _check_forward(path, layer)
            is_ours = isinstance(layer, _Synchronized)
            todo.append((layer, _class_before(layer, bound.origin, bound.parametrized) if is_ours else type(layer), bound))
    for layer, before, bound in todo:
        _become(layer, before)
        del layer._syncbn
        if bound.theirs is not None:
            vars(layer)["process_group"] = bound.theirs.process_group
    return module


def _target(path: str, layer: nn.Module, origin: type[nn.Module], parametrized: type[nn.Module] | None) -> type[nn.Module]:
    """The class that a layer of class `origin` gets."""
    try:
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"given a scripted {layer.original_name}; expected a layer of Python: convert before torch.jit.trace; "
                "torch.jit.script takes none of ours"
            )
        target = synchronized_class(origin)
    except ValueError as error:
        raise ValueError(f"{error} (layer {path!r})") from None
    return target if parametrized is None else wrapped_anew(parametrized, target)


def _check_forward(path: str, layer: nn.Module) -> None:
    """ValueError if a forward of the instance hides that of the class, which is all that conversion changes."""
    replaced = vars(layer).get("forward")
    if replaced is None or getattr(replaced, "__func__", None) is type(layer).forward:
        return
    hooked = "_hf_hook" in vars(layer)
    what = "by an accelerate hook (offload)" if hooked else f"by {getattr(replaced, '__qualname__', replaced)!s}"
    todo = "accelerate.hooks.remove_hook_from_module(model, recurse=True)" if hooked else "delete the attribute"
    raise ValueError(
        f"given a {type(layer).__name__} whose forward was replaced {what} in the instance, where it hides that of the class; "
        f"expected the class's own: convert before it is replaced, or {todo} first (layer {path!r})"
    )


def _class_before(layer: nn.Module, origin: type[Any], parametrized: type[nn.Module] | None) -> type[nn.Module]:
    """The class that a layer would have now if it had not been converted."""
    if issubclass(origin, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        becomes: Any = origin.cls_to_become
        origin = becomes
    if not parametrize.is_parametrized(layer):
        is_wrapped = synchronized_class(origin) in type(layer).__bases__  # by fully_shard
        return wrapped_anew(type(layer), origin) if is_wrapped else origin
    if parametrized is not None and same_parametrizations(parametrized, type(layer)):
        return parametrized
    return wrapped_anew(type(layer), origin)


def _become(layer: Any, target: type[nn.Module]) -> None:
    """Change the class; a forward of the instance is that of the class before, which removed accelerate hooks leave behind."""
    vars(layer).pop("forward", None)
    layer.__class__ = target


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each batch norm layer once, with its first path, scripted ones included."""
    for path, layer in module.named_modules():
        scripted = isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name
        if isinstance(layer, _BatchNorm) or scripted:
            yield path, layer
