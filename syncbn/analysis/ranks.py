"""Sums over the ranks of a group, for what is measured: float64, one all_reduce for all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import collectives
from ..collectives import Call, Group, GroupLike, ProcessGroup


def resolve(process_group: GroupLike) -> ProcessGroup | None:
    """The group of those who measure together; None for a process that is alone."""
    return Group(process_group).resolve()


def size_of(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def dense(tensor: Tensor) -> Tensor:
    """A sparse gradient, of nn.Embedding(sparse=True) say, with its zeros; others as they are."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def sum_over_ranks(tensors: Sequence[Tensor], group: ProcessGroup | None, name: str) -> list[Tensor]:
    """The sums over the group, dense float64, each of the shape of its tensor and on its device; `name` is for error messages.

    Raises:
        CollectiveError: a rank is gone, or did not come.
    """
    message = torch.cat([dense(tensor.detach()).double().flatten().to(tensors[0].device) for tensor in tensors])
    sums = collectives.all_reduce(message, Call(name, "control", len(message), message.dtype, group)).message
    parts = sums.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]
