"""The batch of a pass: tensors and containers of its own, for a loss may write to them."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..trees import children_of, rebuilt


def copied(batch: Any, kept: Sequence[Tensor] = ()) -> Any:
    """`batch` with its tensors copied, in new containers; what is no container that `syncbn.trees` knows stays as it is.

    A tensor that is there twice is one in the copy too. A leaf that requires a gradient is another that does; what has a graph
    keeps it. The tensors `kept`, those of the model, stay the same. Nothing is initialized: a dataclass has its fields, and
    not what its `__post_init__` would make of them.
    """
    return _copied(batch, {id(tensor): tensor for tensor in kept})


def _copied(node: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(node, Tensor):
        return copies[id(node)] if id(node) in copies else copies.setdefault(id(node), _clone(node))
    children = children_of(node)
    if children is None:
        return node
    if isinstance(node, (list, tuple)):
        return rebuilt(node, {key: _copied(child, copies) for key, child in children.items()})
    same = copy.copy(node)
    if isinstance(node, (dict, UserDict)):
        for key, child in children.items():
            same[key] = _copied(child, copies)
        return same
    for field in dataclasses.fields(node):
        if hasattr(node, field.name):
            object.__setattr__(same, field.name, _copied(getattr(node, field.name), copies))
    return same


def _clone(tensor: Tensor) -> Tensor:
    if tensor.is_leaf and tensor.requires_grad:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone()
