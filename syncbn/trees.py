"""Batches as trees of tensors whose first dimension counts samples.

Requirements
    - nothing is written to a batch of the user's;
    - a tensor that cannot be reached is an error where it matters, and not passed on with its samples.
"""

import copy
import dataclasses
import gc
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor


def count_samples(batch: Any) -> int:
    """The first dimension of the first tensor of `batch` that has one. ValueError if none has."""
    for _, tensor in tensors_of("batch", batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(
        f"given a batch of type {type(batch).__name__} without a tensor that has a dimension; "
        "expected one whose first dimension counts the samples, or the argument count"
    )


def emptied(batch: Any) -> Any:
    """`batch` without its samples: tensors (0, *shape[1:]), lists and tuples without a tensor empty, all else as it is.

    Raises:
        TypeError: a tensor in what is no container, and would stay as it is.
    """
    _refuse_hidden(batch)
    return changed(batch, lambda tensor: tensor.new_empty((0, *tensor.shape[1:])) if tensor.dim() else tensor, empty_lists=True)


def changed(node: Any, change: Callable[[Tensor], Tensor], empty_lists: bool = False) -> Any:
    """The tree with its tensors changed, in new containers."""
    if isinstance(node, Tensor):
        return change(node)
    children = children_of(node)
    if children is None:
        return node
    if empty_lists and type(node) in (list, tuple) and not any(True for _ in tensors_of("", node)):
        return type(node)()
    return rebuilt(node, {key: changed(child, change, empty_lists) for key, child in children.items()})


def tensors_of(path: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree with their paths, in order; those of a mapping that cannot be rebuilt too."""
    if isinstance(node, Tensor):
        yield path, node
    for key, child in (dict(node) if isinstance(node, Mapping) else children_of(node) or {}).items():
        yield from tensors_of(f"{path}[{key!r}]", child)


def _refuse_hidden(node: Any) -> None:
    children = children_of(node)
    for child in (children or {}).values():
        _refuse_hidden(child)
    kept = [node] if children is None else []  # as it is, in the empty form
    if isinstance(node, (dict, UserDict)):
        data = "data" if isinstance(node, UserDict) else None
        kept = [value for name, value in getattr(node, "__dict__", {}).items() if name != data]
    if not isinstance(node, Tensor) and _hold_tensors(kept):
        raise TypeError(
            f"given a batch with a {type(node).__name__} that holds tensors; expected tensors in lists, tuples, named tuples, "
            "dict, UserDict and dataclasses, or the arguments count and empty"
        )


def _hold_tensors(objects: list[Any]) -> bool:
    """Whether there is a tensor in what the objects refer to, short of functions, classes and modules."""
    seen: set[int] = set()
    while objects:
        if isinstance(one := objects.pop(), Tensor):
            return True
        if id(one) not in seen and not isinstance(one, (FunctionType, type, ModuleType)):
            seen.add(id(one))
            objects.extend(filter(gc.is_tracked, gc.get_referents(one)))
    return False


def children_of(node: Any) -> dict[Any, Any] | None:
    """What a container holds that `rebuilt` can make anew; None for all else."""
    if type(node) in (list, tuple) or (isinstance(node, tuple) and hasattr(node, "_fields")):
        return dict(enumerate(node))
    if isinstance(node, (dict, UserDict)):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.init}
    return None


def rebuilt(node: Any, children: dict[Any, Any]) -> Any:
    """A container of the kind of `node` that holds `children`."""
    if type(node) in (list, tuple):
        return type(node)(children.values())
    if isinstance(node, tuple):
        return type(node)._make(children.values())  # type: ignore[attr-defined]
    if isinstance(node, (dict, UserDict)):
        new = copy.copy(node)
        new.update(children)
        return new
    return dataclasses.replace(node, **children)
