"""What hooks see of a forward: the layers by their first calls, where each ends in the graph, the values of batch norm.

Requirements
    - what is recorded is what a layer gave, whatever is written to it afterwards;
    - a layer that calls others is known as such: its output is theirs, or a sum with theirs.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import calls_seen, mask_of, normalizes_by_its_batch, weights_of


class Tape:
    """Of one forward, the layers being modules with weights."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}  # in the order in which their first calls begin
        self.callers: set[str] = set()  # those inside of whose calls another's is
        self.ends: dict[str, list[Any]] = {}  # nodes of the graph, of each call
        self.squares: dict[str, list[Tensor]] = {}  # ‖∂/∂h‖² of each call, once backward has run
        self.values: dict[str, tuple[int, int]] = {}  # per channel, and samples, of the first call of each batch norm layer
        self._begun = 0  # calls
        self._first: dict[str, int] = {}  # the number of the first call that gave something
        self._inside: list[tuple[str, int]] = []  # the calls that run, innermost last

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record what the model does inside."""
        with (
            calls_seen(model, self._layer, lambda module: bool(weights_of(module)), self._begins),
            calls_seen(model, self._norm, lambda module: isinstance(module, _BatchNorm)),
        ):
            yield
        self.modules = {path: self.modules[path] for path in sorted(self.modules, key=lambda path: self._first[path])}

    def depths(self, root: Any) -> dict[str, int]:
        """The layers that call no other on the longest path from a leaf of the graph to the first output of each layer."""
        counted = {node for path, nodes in self.ends.items() if path not in self.callers for node in nodes}
        depth = _depths(root, counted)
        return {path: depth.get(nodes[0], 0) for path, nodes in self.ends.items()}

    def _begins(self, path: str) -> None:
        self._inside.append((path, self._begun))
        self._begun += 1

    def _layer(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What the caller gets: a copy, for writing to a view would put another node in place of the layer's."""
        _, number = self._inside.pop()
        h = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(h, Tensor) or h.grad_fn is None:
            return None
        self.modules.setdefault(path, module)
        self._first.setdefault(path, number)
        self.callers.update(outer for outer, _ in self._inside if outer != path)
        self.ends.setdefault(path, []).append(h.grad_fn)
        squares = self.squares.setdefault(path, [])
        h.register_hook(lambda gradient: squares.append(gradient.double().square().sum()))
        if h is output:
            return h.clone()
        return type(output)((h.clone(), *output[1:])) if type(output) in (tuple, list) else None

    def _norm(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and normalizes_by_its_batch(module):
            mask = mask_of(module, args, kwargs)
            values = x.shape[0] * math.prod(x.shape[2:]) if mask is None else int(mask.sum().item())
            self.values.setdefault(path, (values, x.shape[0]))


def _depths(root: Any, ends: set[Any]) -> dict[Any, int]:
    """The largest number of `ends` on a path from a leaf to each node of the graph, itself included."""
    depth: dict[Any, int] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        before = [child for child, _ in node.next_functions if child is not None]
        missing = [child for child in before if child not in depth]
        if missing:
            stack += missing
            continue
        stack.pop()
        depth.setdefault(node, max((depth[child] for child in before), default=0) + (node in ends))
    return depth
