"""By what messages and errors name the layers of a model, while it is checked or monitored."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .module import ALL_RANKS, _Synchronized

# The names of a layer in the contexts of `named` that it is in, by context, after the one that it had before.
_names: weakref.WeakKeyDictionary[nn.Module, dict[object, str | None]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def named(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The layers of ours in a model by their paths in it, or in what it wraps, which messages and calls name them by inside.

    A layer that is the model itself goes by its class. Such contexts may be left in another order than they were entered.

    Raises:
        ValueError: there is none.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    layers = {path or type(layer).__name__: layer for path, layer in inner.named_modules() if isinstance(layer, _Synchronized)}
    if not layers:
        raise ValueError(
            f"given a {type(inner).__name__} without layers of syncbn; expected some: call syncbn.convert(model) first"
        )
    context = object()
    for path, layer in layers.items():
        _names.setdefault(layer, {None: layer._syncbn.path})[context] = path
        layer._syncbn = layer._syncbn._replace(path=path)
    try:
        yield layers
    finally:
        for layer in layers.values():
            names = _names[layer]
            *_, shown = names.values()
            del names[context]
            *_, path = names.values()
            if len(names) == 1:
                del _names[layer]
            if isinstance(layer, _Synchronized) and layer._syncbn.path == shown:  # neither reverted nor converted inside
                layer._syncbn = layer._syncbn._replace(path=path)
                if layer._syncbn == ALL_RANKS:
                    del layer._syncbn
