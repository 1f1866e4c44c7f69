"""A world of several ranks in one process, on which nothing is communicated: torch's fake process group.

Requirements
    - a collective costs the host what its call costs, and the device one launch over the message, whoever calls it;
    - nothing is added for the wire: what a collective takes between GPUs is no part of what is measured here.

As torch's fake group is, an all_gather issues W copies and an all_reduce none, where NCCL launches one kernel for each. That
would flatter the layer that reduces. So here an all_gather is for the host the call of an all_reduce, which leaves its message
alone, and for the device one copy into all W rows; an all_reduce is the call and one kernel that adds nothing to the message.

A reduced message is the sum of one share, a gathered one W copies of it: values are right in a world of one only. Layers are
checked there, and timed in a larger one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

RANKS = 8  # of the world that times are taken in
GATHERS = (
    "all_gather_single",
    "all_gather_into_tensor",
)  # what torch.nn.SyncBatchNorm calls: the last in older releases


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    """The default process group of this process, its rank 0; there must be none."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    device = _Device(dist.ProcessGroup.allreduce)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(dist.ProcessGroup, "allreduce", lambda *given: device.all_reduce(*given)))
            for name in GATHERS:
                if hasattr(dist, name):
                    stack.enter_context(mock.patch.object(dist, name, device.all_gather))
            yield
    finally:
        dist.destroy_process_group()


def gather_name() -> str:
    """Of the function that gathers into one tensor, as this torch calls it."""
    return next(name for name in GATHERS if hasattr(dist, name))


class _Device:
    """The part of a device in collectives."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call  # torch's own method of a group
        self.into: Tensor | None = None  # what an all_gather that is being called fills

    def all_reduce(self, group: Any, messages: list[Tensor], options: Any) -> Any:
        work = self.call(group, messages, options)
        if self.into is None:
            messages[0].add_(0.0)
        else:
            self.into.view(group.size(), -1).copy_(messages[0].view(1, -1))
        return work

    def all_gather(self, into: Tensor, message: Tensor, group: Any = None, async_op: bool = False) -> Any:
        self.into = into
        try:
            return dist.all_reduce(message, group=group, async_op=async_op)
        finally:
            self.into = None
