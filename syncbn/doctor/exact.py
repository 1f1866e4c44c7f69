"""Whether the layer is batch norm of the whole batch here, in every dtype: against the definition, in float64.

Written without anything of syncbn but the layer that is examined. Two splits of a batch: into shares that are unequal, and into
shares of which some are empty.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..control import listed
from ..module import SyncBatchNorm
from .finding import Finding

CHANNELS = 6
SPLITS = ((3, 5, 1, 4), (7, 0, 3, 2))  # samples of rank 0, 1, 2, 3, and so on from the beginning
EPS, MOMENTUM = 1e-5, 0.1
# Units in the last place of the result's dtype, of the largest value of the tensor.
ALLOWED = {torch.float32: 8, torch.float64: 100, torch.bfloat16: 2, torch.float16: 2}

Errors = dict[str, dict[str, float]]  # dtype → tensor → the largest error in units


class Batch(NamedTuple):
    """All ranks' shares."""

    x: list[Tensor]  # (n, C, 3, 2) of each rank
    dy: list[Tensor]


def batch(size: int, split: Sequence[int], dtype: torch.dtype) -> Batch:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(sum(split))
    shapes = [(split[rank % len(split)], CHANNELS, 3, 2) for rank in range(size)]
    x = [(3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]
    return Batch(x, [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes])


class Result(NamedTuple):
    """Of one rank's share."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    running_mean: Tensor
    running_var: Tensor


def affine() -> tuple[Tensor, Tensor]:
    """γ and β, (C,) float64; float32 holds them."""
    return torch.linspace(0.5, 3.0, CHANNELS, dtype=torch.float64), torch.linspace(-1.0, 1.5, CHANNELS, dtype=torch.float64)


def expected(given: Batch, rank: int) -> tuple[Result, Result]:
    """What the definition gives a rank, in float64; and the size that its errors are measured by, one number each."""
    x = torch.cat(given.x).double().requires_grad_()
    dy = torch.cat(given.dy).double()
    weight, bias = (value[:, None, None] for value in affine())
    n = x.numel() // CHANNELS
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    normal = (x - mean) / (var + EPS).sqrt()
    y = weight * normal + bias
    (dx,) = torch.autograd.grad(y, x, dy)
    normal = normal.detach()
    first = sum(len(share) for share in given.x[:rank])
    mine = slice(first, first + len(given.x[rank]))
    sums = (dy * normal)[mine].sum((0, 2, 3)), dy[mine].sum((0, 2, 3))
    moved = MOMENTUM * mean.flatten(), 1 - MOMENTUM + MOMENTUM * var.flatten() * n / (n - 1)
    scales = (y, dx, (dy * normal).abs().sum((0, 2, 3)), dy.abs().sum((0, 2, 3)), *moved)
    result = Result(y[mine].detach(), dx[mine], *sums, *(value.detach() for value in moved))
    return result, Result(*(value.detach().abs().max() for value in scales))


def computed(given: Batch, rank: int, device: torch.device) -> Result:
    """What the layer gives this rank."""
    dtype = given.x[rank].dtype
    layer = SyncBatchNorm(CHANNELS, EPS, MOMENTUM, device=device, dtype=torch.promote_types(dtype, torch.float32))
    layer._force_sync = True  # a process that is alone is examined too
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), affine(), strict=True):
            parameter.copy_(value)
    x = given.x[rank].to(device).requires_grad_()
    y = layer(x)
    y.backward(given.dy[rank].to(device))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    values = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
    return Result(*(value.cpu() for value in values))


def errors(rank: int, size: int, device: torch.device) -> Errors:
    """This rank's, in each dtype, over the splits. Every rank of the default group comes."""
    found: Errors = {}
    for dtype in ALLOWED:
        worst = found.setdefault(_name(dtype), dict.fromkeys(Result._fields, 0.0))
        for split in SPLITS:
            given = batch(size, split, dtype)
            right, scales = expected(given, rank)
            result = computed(given, rank, device)
            for name, value, wanted, scale in zip(Result._fields, result, right, scales, strict=True):
                worst[name] = max(worst[name], _units(value, wanted, scale.item()))
    return found


def _units(value: Tensor, wanted: Tensor, scale: float) -> float:
    if value.shape != wanted.shape:
        return math.inf
    if value.numel() == 0:
        return 0.0
    off = (value.double() - wanted).abs().nan_to_num(nan=math.inf).max().item()
    return off / (scale * torch.finfo(value.dtype).eps)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judge(ranks: Sequence[Errors]) -> list[Finding]:
    """A finding for each dtype."""
    found = []
    for dtype, allowed in ALLOWED.items():
        by_tensor = [(units, name, rank) for rank, of in enumerate(ranks) for name, units in of[_name(dtype)].items()]
        units, name, _ = max(by_tensor)
        told = f"largest error {units:.3g} units of rounding, {allowed} allowed"
        if units <= allowed:
            found.append(Finding(f"{_name(dtype)} is batch norm of the whole batch, {told}"))
            continue
        wrong = sorted({rank for off, _, rank in by_tensor if off > allowed})
        tensors = sorted({tensor for off, tensor, _ in by_tensor if off > allowed}, key=Result._fields.index)
        advice = "do not train with it here; see whether the test suite passes on this machine, with another version of torch"
        where = f"{', '.join(tensors)} on {listed(wrong)}, {told} ({name})"
        found.append(Finding(f"{_name(dtype)} is not batch norm of the whole batch, wrong in {where}", advice))
    return found
