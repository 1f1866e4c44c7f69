"""What syncbn is compared with: layers made from one and the same torch.nn.BatchNorm layer, each a copy of its state.

Requirements
    - a peer computes what its own users get: torch's layer as it is, and the layer of many papers as they write it;
    - ours takes the synchronized path in a process that is alone too, with ATen kernels as where none are built, and on a GPU
      with those in Triton, however small the input, launched by Python or by the library that `python -m syncbn build` makes.
"""

import contextlib
import copy
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import kernels
from ..convert import convert
from ..kernels import extension
from ..module import SyncBatchNormReLU, _Synchronized
from . import agreement, sync_operators

TORCH = "torch"  # the name of the base of all ratios
TORCH_SYNC = "torch-sync"  # that of the second base, on GPUs
MEMORY = "memory"  # no peer, but what the memory allows one in float32 on a CPU: see `memory_passes`
PASSES = (3, 5)  # over the tensor, at least, forward and backward: x twice and y; dy and x twice and dx


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


def forced(layer: nn.Module) -> nn.Module:
    """The layers of a copy, as ours."""
    made = convert(copy.deepcopy(layer))
    for each in made.modules():
        if isinstance(each, _Synchronized):
            each._force_sync = True
    return made


def fused(layer: Any) -> SyncBatchNormReLU:
    """Ours with the ReLU in it, from torch's layer or ours."""
    made = SyncBatchNormReLU(layer.num_features, layer.eps, layer.momentum).to(layer.weight.device)
    made.load_state_dict(layer.state_dict())
    made._force_sync = True
    return made


def memory_passes(x: Tensor, dy: Tensor) -> Callable[[], None]:
    """As many passes over memory as batch norm needs, with next to nothing computed, by ATen.

    x is summed, then 1 added to it; x and dy are summed, then added. x and dy (N, C, *) lie alike, in one piece. A layer that
    writes past the caches, as ATen does not, can be faster where results are large.
    """
    flat_x, flat_dy = (torch.as_strided(each, (each.numel(),), (1,)) for each in (x.detach(), dy))

    def run() -> None:
        flat_x.sum()
        y = flat_x + 1
        flat_x.sum(), flat_dy.sum()
        dx = flat_x + flat_dy
        del y, dx

    return run


class Peer(NamedTuple):
    """One way to run a layer."""

    what: str
    make: Callable[[nn.Module], nn.Module]  # from torch's layer
    compiled: bool = False  # by torch.compile, which takes seconds a shape
    kernels: str | None = None  # of ours: "compiled", "host" or "aten"
    of_torch_sync: bool = False  # by operators that CUDA alone has


PEERS = {
    TORCH: Peer("torch.nn.BatchNorm, local", copy.deepcopy),
    "torch-inductor": Peer("torch.nn.BatchNorm under torch.compile", copy.deepcopy, compiled=True),
    TORCH_SYNC: Peer("the operators of torch.nn.SyncBatchNorm", sync_operators.TorchSync, of_torch_sync=True),
    "torch-sync-unmasked": Peer("the same without the mask of empty ranks", sync_operators.Unmasked, of_torch_sync=True),
    "plain": Peer("autograd through an all_reduce of E[x], E[x²]", PlainSyncBatchNorm),
    "plain-inductor": Peer("the same under torch.compile", PlainSyncBatchNorm, compiled=True),
    "syncbn": Peer("syncbn, compiled kernels; on a GPU in Triton", forced, kernels="compiled"),
    "syncbn-host": Peer("the same by what `python -m syncbn build` makes", forced, kernels="host"),
    "syncbn-aten": Peer("syncbn, ATen kernels", forced, kernels="aten"),
    "syncbn-inductor": Peer("syncbn under torch.compile", forced, compiled=True),
}


def available(name: str, device: torch.device) -> str | None:
    """Why a peer cannot be run on the device; None if it can."""
    peer, on_cpu = PEERS[name], device.type == "cpu"
    if peer.of_torch_sync and sync_operators.missing(device):
        return sync_operators.missing(device)
    if peer.compiled and on_cpu and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler"
    if peer.compiled and not on_cpu and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton"
    if peer.kernels == "host" and extension.library is None:
        return "`python -m syncbn build` did not build it here"
    if peer.kernels in ("compiled", "host"):
        with using(name):
            if kernels.pick(torch.empty(2, 2, 2, 2, device=device)) is kernels.composed():
                return "the compiled kernels were not built here" if on_cpu else "Triton is not installed, or does not work"
    return None


def runnable(names: Sequence[str], device: torch.device) -> list[str]:
    """Those that can be run on the device, torch's own first; what cannot is said."""
    kept = [TORCH]
    for name in dict.fromkeys(names):
        reason = available(name, device)
        if reason is not None:
            print(f"syncbn bench: {name} ({PEERS[name].what}) is skipped: {reason}", file=sys.stderr)
        elif name != TORCH:
            kept.append(name)
    return kept


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Take the kernels of a peer: ATen's, as where no others were built; those in Triton from the first byte on."""
    wanted, compiled, from_bytes = PEERS[name].kernels, kernels.compiled, kernels.TRITON_FROM_BYTES
    library = extension.library
    if wanted is not None:  # inside of what is timed: as little as for another peer
        kernels.compiled = _nothing if wanted == "aten" else compiled  # type: ignore[assignment]
        kernels.TRITON_FROM_BYTES = math.inf if wanted == "aten" else 0
        extension.library = library if wanted == "host" else None
    try:
        yield
    finally:
        kernels.compiled, kernels.TRITON_FROM_BYTES, extension.library = compiled, from_bytes, library


def _nothing() -> None:
    """As where the kernels were not built."""


def outputs_of(name: str, x: Tensor, dy: Tensor, layer: nn.Module) -> agreement.Outputs:
    """One step of the peer's layer made from `layer`."""
    with using(name):
        if PEERS[name].kernels is not None:
            is_composed = kernels.pick(x) is kernels.composed()
            assert is_composed == (PEERS[name].kernels == "aten"), "the kernels are those of the peer"
        return agreement.outputs(make(name, layer), x, dy)


def make(name: str, *layers: nn.Module) -> nn.Module:
    """The layer of a peer, with the state of torch's that is given; of several, a row, which a compiler is given as a whole."""
    peer = PEERS[name]
    made = peer.make(layers[0]) if len(layers) == 1 else nn.Sequential(*map(peer.make, layers))
    if not peer.compiled:
        return made
    compiled: Any = torch.compile(made, fullgraph=True, dynamic=False)
    return compiled
