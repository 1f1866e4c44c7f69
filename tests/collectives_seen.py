"""Counts collectives below syncbn: at torch's dispatcher, where every backend's collectives pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CollectivesSeen(TorchDispatchMode):
    """`seen` is a list of (operator, dtype, number of values) in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensor = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.seen.append((func.overloadpacket.__name__, tensor.dtype, tensor.numel()))
        return func(*args, **(kwargs or {}))
