"""What syncbn is compared with: layers made from one and the same torch.nn.BatchNorm layer, each a copy of its state.

Requirements
    - a peer computes what its own users get: torch's layer as it is, and the layer of many papers as they write it;
    - ours takes the synchronized path in a process that is alone too, and with ATen kernels as where none are built.
"""

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import kernels
from ..convert import convert
from ..module import _Synchronized

TORCH = "torch"  # the name of the base of all ratios


class PlainSyncBatchNorm(nn.Module):
    """Mean and mean of squares in float32 through a differentiable all_reduce, the rest by autograd; shares must be equal."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
        self.eps, self.momentum = layer.eps, layer.momentum
        self.running_mean: Tensor
        self.running_var: Tensor
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name).clone())

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        dims = [0, *range(2, x.dim())]
        message = torch.cat([wide.mean(dims), wide.square().mean(dims)])
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            message = _Sum.apply(message) / world_size
        mean, mean_of_squares = message.chunk(2)
        var = mean_of_squares - mean * mean
        with torch.no_grad():
            n = world_size * (x.numel() // x.shape[1])
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = self.weight * (var + self.eps).rsqrt()
        return (wide * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _TorchSync(nn.Module):
    """The operators of torch.nn.SyncBatchNorm, which takes torch's own batch norm in a group of one, on such a group."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        of, group = self.layer, dist.group.WORLD
        apply = torch.nn.modules._functions.SyncBatchNorm.apply
        y: Tensor = apply(x, of.weight, of.bias, of.running_mean, of.running_var, of.eps, of.momentum, group, 1)
        return y


def forced(layer: nn.Module) -> nn.Module:
    """The layers of a copy, as ours."""
    made = convert(copy.deepcopy(layer))
    for each in made.modules():
        if isinstance(each, _Synchronized):
            each._force_sync = True
    return made


class Peer(NamedTuple):
    """One way to run a layer."""

    what: str
    make: Callable[[nn.Module], nn.Module]  # from torch's layer
    compiled: bool = False  # by torch.compile, which takes seconds a shape
    kernels: str | None = None  # of ours: "compiled" or "aten"
    cuda_only: bool = False


PEERS = {
    TORCH: Peer("torch.nn.BatchNorm, local", copy.deepcopy),
    "torch-inductor": Peer("torch.nn.BatchNorm under torch.compile", copy.deepcopy, compiled=True),
    "torch-sync": Peer("the operators of torch.nn.SyncBatchNorm", _TorchSync, cuda_only=True),
    "plain": Peer("autograd through an all_reduce of E[x], E[x²]", PlainSyncBatchNorm),
    "plain-inductor": Peer("the same under torch.compile", PlainSyncBatchNorm, compiled=True),
    "syncbn": Peer("syncbn, compiled kernels", forced, kernels="compiled"),
    "syncbn-aten": Peer("syncbn, ATen kernels", forced, kernels="aten"),
    "syncbn-inductor": Peer("syncbn under torch.compile", forced, compiled=True),
}


def available(name: str, device: torch.device) -> str | None:
    """Why a peer cannot be run on the device; None if it can."""
    peer = PEERS[name]
    if peer.cuda_only and device.type != "cuda":
        return "torch.nn.SyncBatchNorm has no CPU implementation"
    if peer.compiled and device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler"
    if peer.kernels == "compiled" and kernels.pick(torch.empty(2, 2, 2, 2, device=device)) is kernels.composed():
        return "the compiled kernels were not built here"
    return None


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Take the kernels of a peer: ATen's, as where the compiled ones were not built; any other changes nothing."""
    hidden: Any = contextlib.nullcontext()
    if PEERS[name].kernels == "aten":
        hidden = mock.patch.object(kernels, "compiled", return_value=None)
    with hidden:
        yield


def make(name: str, layer: nn.Module) -> nn.Module:
    """The layer of a peer, with the state of `layer`."""
    peer = PEERS[name]
    made = peer.make(layer)
    if not peer.compiled:
        return made
    compiled: Any = torch.compile(made, fullgraph=True, dynamic=False)
    return compiled
