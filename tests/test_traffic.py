"""What a layer sends: the same collectives and bytes per rank for any number of ranks, counted at torch's dispatcher.

The ranks of the process group are not there ("fake" backend): so many of them fit in one process.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import syncbn
from syncbn import collectives

CHANNELS = (16, 64)


class Traffic(TorchDispatchMode):
    """`seen`: (operator, bytes of all the tensors that it was given) of every collective of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.seen.append((func.overloadpacket.__name__, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def world(size: int, rank: int = 0) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def traffic(size: int, rank: int = 0, samples: int = 4) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """That of forward and of backward of two layers."""
    model = syncbn.convert(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64)))
    model[1]._force_sync = model[3]._force_sync = True
    with world(size, rank):
        with Traffic() as forward:
            y = model(torch.randn(samples, 3, 5, 5))
        with Traffic() as backward:
            y.sum().backward()
    return forward.seen, backward.seen


def expected(phase: str) -> list[tuple[str, int]]:
    channels = CHANNELS if phase == "forward" else reversed(CHANNELS)
    return [("allreduce_", 8 * (2 * c + 1 if phase == "forward" else 2 * c)) for c in channels]


@pytest.mark.parametrize("size", range(2, 9))
def test_operations_and_bytes_of_a_rank_do_not_depend_on_the_number_of_ranks(size):
    for rank in {0, size - 1}:
        assert traffic(size, rank) == (expected("forward"), expected("backward"))


def test_nor_on_the_share_of_the_batch():
    assert traffic(8, samples=0) == traffic(8, samples=9) == (expected("forward"), expected("backward"))


def test_a_process_that_is_alone_sends_nothing():
    """Not on the synchronized path either."""
    assert traffic(1) == ([], [])


def test_traffic_that_grows_is_seen():
    """An all_gather in place of the all_reduce."""

    def gather(message, call):
        parts = [torch.empty_like(message) for _ in range(call.group.size())]
        dist.all_gather(parts, message, group=call.group)
        return message.copy_(torch.stack(parts).sum(0))

    with mock.patch.object(collectives, "_all_reduce", gather):
        sent = [sum(size for _, size in traffic(size)[0]) for size in (2, 4, 8)]
    assert sent == [sum(size for _, size in expected("forward")) * (world + 1) for world in (2, 4, 8)]
