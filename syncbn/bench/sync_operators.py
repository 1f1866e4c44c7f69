"""torch.nn.SyncBatchNorm's own operators as layers to compare with, as its function calls them and without the mask.

They exist for CUDA only. Its module takes local batch norm in a group of one, so the function is called.

x (N, C, *); combined (2C+1,) [mean, invstd, count] of a rank; gathered (W, 2C+1).
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fake_world import gather_name


def missing(device: torch.device) -> str | None:
    """Why the operators cannot be called on the device; None if they can."""
    try:
        torch.batch_norm_stats(torch.zeros(2, 2, 2, device=device), 1e-5)
    except NotImplementedError:
        return f"torch.nn.SyncBatchNorm has no {device.type.upper()} implementation"
    return None


class _OnTheWorld(nn.Module):
    """A copy of torch's layer that counts batches as torch.nn.SyncBatchNorm does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        of = self.layer
        of.num_batches_tracked.add_(1)
        return self.apply_to(x, of.weight, of.bias, of.running_mean, of.running_var, of.eps, of.momentum, dist.group.WORLD)

    def apply_to(self, x: Tensor, *arguments: Any) -> Tensor:
        raise NotImplementedError


class TorchSync(_OnTheWorld):
    """The function as it is: boolean masks of the counts wait for the device three times."""

    def apply_to(self, x: Tensor, *arguments: Any) -> Tensor:
        y: Tensor = torch.nn.modules._functions.SyncBatchNorm.apply(x, *arguments, dist.get_world_size())
        return y


class Unmasked(_OnTheWorld):
    """The same operators, called directly: every rank is taken to have a share, and nothing waits."""

    def apply_to(self, x: Tensor, *arguments: Any) -> Tensor:
        y: Tensor = _Unmasked.apply(x, *arguments)
        return y


def contiguous(x: Tensor) -> Tensor:
    """As the operators read it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return x
    return x.contiguous()


class _Unmasked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        running_mean: Tensor,  # (C,)
        running_var: Tensor,  # (C,)
        eps: float,
        momentum: float,
        group: Any,
    ) -> Tensor:
        x, c = contiguous(x), x.shape[1]
        mean, invstd = torch.batch_norm_stats(x, eps)
        combined = torch.cat([mean, invstd, mean.new_full((1,), x.numel() // c)])
        gathered = combined.new_empty(dist.get_world_size(group), len(combined))
        getattr(dist, gather_name())(gathered.view(-1), combined, group)
        mean_all, invstd_all, count_all = gathered.split(c, dim=1)
        counts = count_all.view(-1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, mean_all, invstd_all, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        ctx.group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        dy = contiguous(dy)
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
        combined = torch.cat(sums)
        dist.all_reduce(combined, group=ctx.group)
        sum_dy, sum_dy_xmu = combined.chunk(2)
        dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        return dx, dweight, dbias, None, None, None, None, None
