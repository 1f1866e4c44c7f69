"""The global batches of the tests, by seed, and their split into shares. Every rank makes all of them and takes its own."""

import itertools
from typing import NamedTuple

import oracle
import tolerance
import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 5

# Samples on each of up to four ranks.
SHARES = {
    "equal": (3, 3, 3, 3),
    "unequal": (1, 5, 2, 4),
    "empty": (4, 0, 3, 0),
    "empty first": (0, 0, 6, 1),
    "all empty": (0, 0, 0, 0),
    "single": (1, 1, 1, 1),
}

# Sizes behind (N, C); "ragged" ones differ between ranks.
SPACES: dict[str, tuple[tuple[int, ...], ...]] = {
    "0d": ((),) * 4,
    "1d": ((7,),) * 4,
    "2d": ((4, 6),) * 4,
    "3d": ((2, 3, 4),) * 4,
    "4d": ((2, 1, 3, 2),) * 4,
    "one": ((1, 1),) * 4,
    "ragged": ((3, 5), (1, 1), (2, 7), (4, 0)),
}

LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded")

FUSED = ("none", "relu", "add relu")  # what a layer does with the normalized values

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """One batch over all ranks, and the layer that it goes through."""

    world: int = 2
    shares: str = "unequal"
    space: str = "2d"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    ratio: float = 1.0  # mean/std of the channels
    affine: str = "both"  # "both", "weight", "bias" or "none"
    param_dtype: torch.dtype | None = None  # None: that of the input
    momentum: float | None = 0.1
    eps: float = 1e-5
    fused: str = "none"


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # (C, *, N) in memory
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":  # every second element of a larger tensor
        out = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))[..., : 2 * x.shape[-1] : 2]
        return out.copy_(x)
    if layout == "expanded":  # all samples of a share are one in memory
        return x[:1].expand_as(x)
    return x.contiguous()


def make(case: Case, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and the output gradients of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    xs, dys = [], []
    std = torch.rand(CHANNELS, generator=generator) + 0.5
    for samples, space in itertools.islice(zip(SHARES[case.shares], SPACES[case.space], strict=True), case.world):
        shape = (samples, *space, CHANNELS)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * std + case.ratio * std
        dy = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        xs.append(lay_out(x.movedim(-1, 1).to(case.dtype), case.layout))
        dys.append(dy.movedim(-1, 1).contiguous().to(case.dtype))
    return xs, dys


def parameters(case: Case, seed: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """γ and β, none of them the identity."""
    generator = torch.Generator().manual_seed(seed + 1)
    dtype = case.param_dtype or case.dtype
    weight = (torch.rand(CHANNELS, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(CHANNELS, generator=generator).to(dtype)
    weight[1] *= -1
    return weight if case.affine in ("both", "weight") else None, bias if case.affine in ("both", "bias") else None


def buffers(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Running mean and variance that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed + 2)
    dtype = case.param_dtype or case.dtype
    mean = torch.randn(CHANNELS, generator=generator).to(dtype)
    return mean, (torch.rand(CHANNELS, generator=generator) + 0.5).to(dtype)


def residuals(case: Case, seed: int = 0) -> list[Tensor] | None:
    """What is added on each rank, in the layout of its gradients; None if nothing is."""
    if case.fused != "add relu":
        return None
    generator = torch.Generator().manual_seed(seed + 3)
    return [torch.randn(dy.shape, generator=generator).to(case.dtype) for dy in make(case, seed)[1]]


def place(x: Tensor, device: str) -> Tensor:
    """x without its history on a device, in the memory that it has, what lies between its values included."""
    memory = x.new_empty(0).set_(x.detach().untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


class Result(NamedTuple):
    """What one rank computed."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dresidual: Tensor | None = None

    def cpu(self) -> "Result":
        """The values on the CPU, without their history."""
        return Result(*(None if value is None else value.detach().cpu() for value in self))


NOTHING = oracle.Expected(*[None] * len(oracle.Expected._fields))


def momentum_of(case: Case, batches: int = 0) -> float:
    """The factor of the running statistics after so many batches."""
    return 1 / (batches + 1) if case.momentum is None else case.momentum


def plain(case: Case, xs: list[Tensor], dys: list[Tensor], seed: int = 0) -> oracle.Expected | None:
    """F.batch_norm on the whole batch in the case's dtype, the values of a channel in a row; None where it raises.

    None with a ReLU, which is fused: by itself it rounds twice, and passes other values in half precision.
    """
    weight, bias = (None if p is None else p.clone().requires_grad_() for p in parameters(case, seed))
    mean, var = buffers(case, seed)
    sizes = [x.numel() // CHANNELS for x in xs]
    whole = torch.cat([oracle.flat(x) for x in xs]).t().contiguous()[None].requires_grad_()
    dy = torch.cat([oracle.flat(g) for g in dys]).t().contiguous()[None]
    mixed = case.param_dtype not in (None, case.dtype)
    torch_has_none = mixed and (case.param_dtype != torch.float32 or case.dtype == torch.float64)
    if case.fused != "none" or sum(sizes) <= 1 or torch_has_none:
        return None
    y = F.batch_norm(whole, mean, var, weight, bias, True, momentum_of(case), case.eps)
    y.backward(dy)
    assert whole.grad is not None

    def split(t: Tensor) -> list[Tensor]:
        return [
            part.t().reshape(x.movedim(1, -1).shape).movedim(-1, 1)
            for part, x in zip(t.detach()[0].split(sizes, 1), xs, strict=True)
        ]

    return oracle.Expected(split(y), split(whole.grad), [], [], mean, var, mean, var)


Data = tuple[list[Tensor], list[Tensor]]


def check(case: Case, results: list[Result], seed: int = 0, data: Data | None = None) -> None:
    """Assert that the results of all ranks are the oracle's, within the tolerance table; `data` if not that of the case."""
    xs, dys = data or make(case, seed)
    weight, bias = parameters(case, seed)
    mean, var = buffers(case, seed)
    added = residuals(case, seed)
    expected = oracle.batch_norm(xs, dys, weight, bias, mean, var, momentum_of(case), case.eps)
    terms = expected.y
    if case.fused != "none":
        expected = oracle.batch_norm(xs, dys, weight, bias, mean, var, momentum_of(case), case.eps, True, added)
        terms = [y.abs() + (0 if added is None else added[rank].abs()) for rank, y in enumerate(terms)]
    torch_own = plain(case, xs, dys, seed)
    inv = (expected.var + case.eps).rsqrt()
    ratio = (expected.mean.abs() * inv).max().item()
    gain = inv if weight is None else inv * weight.double().abs()
    coarsest = torch.float64 if case.dtype == torch.float64 else torch.float32  # what sums are taken in
    for rank, (result, x, dy) in enumerate(zip(results, xs, dys, strict=True)):

        def near(name: str, value: Tensor, want: Tensor, scale: Tensor, own: Tensor | None = None, rank=rank) -> None:
            top = scale.abs().max().item() if scale.numel() else 0.0
            tolerance.check(f"{name} of rank {rank} in {case}", value, want, own, ratio, top, coarsest)

        own_y, own_dx, _, _, own_mean, own_var, *_ = torch_own or NOTHING
        size_of_dy = oracle.flat(dy.double()).abs()
        size_of_xhat = ((oracle.flat(x.double()) - expected.mean) * inv).abs().clamp(min=1)
        assert result.y.dtype == result.dx.dtype == case.dtype
        assert result.y.stride() == result.dx.stride() == torch.empty_like(x).stride(), (case, rank, x.stride())
        near("y", result.y, expected.y[rank], terms[rank], own_y and own_y[rank])
        near("dx", result.dx, expected.dx[rank], gain * size_of_dy, own_dx and own_dx[rank])
        assert (result.dresidual is None) == (added is None), "the residual's gradient"
        if result.dresidual is not None and expected.dresidual is not None:
            assert result.dresidual.dtype == case.dtype
            assert torch.equal(result.dresidual.double(), expected.dresidual[rank]), f"dresidual of rank {rank} in {case}"
        if result.dweight is not None:
            near("dweight", result.dweight, expected.dweight[rank], (size_of_dy * size_of_xhat).sum(0))
        if result.dbias is not None:
            near("dbias", result.dbias, expected.dbias[rank], size_of_dy.sum(0))
        if result.running_mean is not None and result.running_var is not None:
            near("running_mean", result.running_mean, expected.running_mean, expected.running_mean, own_mean)
            near("running_var", result.running_var, expected.running_var, expected.running_var, own_var)
