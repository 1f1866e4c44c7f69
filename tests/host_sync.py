"""Raises where code waits for the device: at torch's dispatcher, on any device, the CPU too."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,  # item, int, float
    aten.is_nonzero,  # if t
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.repeat_interleave,
}


class HostSyncError(AssertionError):
    """An operator that has to wait for values."""


class NoHostSync(TorchDispatchMode):
    """Every operator run inside must be one that a device can be left alone with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in WAITING:
            raise HostSyncError(f"{func} waits for the device")
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    raise HostSyncError(f"{func} with a boolean mask waits for the device")
        return func(*args, **(kwargs or {}))
