"""Claims on the growth of gradients at initialization (Yang et al. 2019, arXiv:1902.08129).

Squared norms are averaged over seeds first, then fitted: at 4 values the fits of single seeds scatter by 10 %.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import collectives
from ...convert import convert
from ..claims import Claim, Outcome, Settings, at_least, at_most, near
from ..factor import Activation, GrowthFactor, growth_factor
from ..growth import fitted, gradient_growth
from ..networks import (
    NO_EPS,
    Projection,
    SplitBatchNorm,
    convolutions,
    growth_network,
    image_data,
    projection,
    projection_data,
    skip_network,
)
from ..plots import BLUE, COLORS, GRAY, RED, legend, panels, powers_of_two
from . import growth_limits

WIDTH, DEPTH = 512, 30
BATCHES = (4, 8, 16, 32, 64, 128, 256)
SPLIT = 64  # the global batch that is split over ranks
RANKS = (1, 2, 4, 8, 16)
LIMITS = {4: 0.12, 8: 0.03}  # relative; 2 % from 16 values on. Heavy tails at 4
Build = Callable[[int], nn.Module]

NOTES = [
    "π/(π−1) = 1.467, of which the literature speaks as the growth of the norm, is that of the SQUARED norm (lambda_sq); "
    "the norm itself grows by 1.211 per layer (lambda_norm)",
    'explosion "no matter what nonlinearity": for the identity at finite batch alone, (B−2)/(B−3) → 1; for any other '
    "activation lambda_sq > 1 at every batch size",
    "skip connections make the growth polynomial, not absent; statistics taken as constants in backward do not cure it",
]


def run(settings: Settings) -> Outcome:
    """One process simulates ranks; several ranks measure themselves."""
    if collectives.rank_and_size()[1] > 1:
        return over_ranks(settings)
    seeds = settings.seeds[:3] if settings.quick else settings.seeds
    batches = (4, 8, 16, 64, 256) if settings.quick else BATCHES
    relu = {B: factor_of(nn.ReLU, B, seeds) for B in settings.track(batches, "growth: batch sizes, ReLU")}
    linear = {B: factor_of(nn.Identity, B, seeds) for B in settings.track(batches, "growth: batch sizes, identity")}
    split = {W: split_factor(W, seeds) for W in settings.track(RANKS, "growth: ranks that do not synchronize")}
    depths = (5, 20, 80) if settings.quick else (5, 10, 20, 40, 80)
    ratios = {name: [ratio(build, depth, seeds) for depth in settings.track(depths, name)] for name, build in KINDS.items()}
    plain = fitted(range(1, DEPTH + 1), squares(lambda seed: growth_network(seed, DEPTH, WIDTH), 64, seeds)).lambda_sq
    claims = [
        *(_near("ReLU", "relu", B, found) for B, found in relu.items()),
        *(_near("identity", "identity", B, found) for B, found in linear.items()),
        *others(seeds, settings),
        *(convolutional(*sizes, seeds) for sizes in ((2, 4), (4, 8))),
        Claim("no batch norm, He initialization: lambda_sq", "1 ± 0.03", f"{plain:.4g}", abs(plain - 1) <= 0.03),
        at_most("skip connections, 80 layers: squared first/last ratio", ratios["skip connections"][-1], 1e3),
        at_least("plain batch norm, 80 layers: squared first/last ratio", ratios["batch norm"][-1], 1e10),
        *_split_claims(split),
        *limits(relu, seeds),
        *growth_limits.trainability(settings),
    ]

    def draw(figure: Any) -> None:
        by_batch, by_depth, by_ranks = panels(figure, PANELS)
        for name, found, activation, color in (("ReLU", relu, "relu", BLUE), ("identity", linear, "identity", RED)):
            _draw_factors(by_batch, name, found, activation, color)
        for (name, values), color in zip(ratios.items(), COLORS, strict=False):
            by_depth.plot(depths, values, "o-", color=color, label=name)
        by_depth.set_yscale("log")
        legend(by_depth)
        _draw_split(by_ranks, split)

    return Outcome(claims, NOTES, draw)


PANELS = [
    ("Growth by batch size", "values per channel B", "growth of the squared gradient norm per layer"),
    ("Growth over depth, B = 64", "layers", "squared gradient norm, first over last layer"),
    (f"Global batch of {SPLIT} split over ranks", "ranks", "growth of the squared gradient norm per layer"),
]


def squares(build: Build, values: int, seeds: Sequence[int], width: int = WIDTH) -> list[float]:
    """‖∂L/∂W‖² by layer, the mean over seeds."""
    total: Tensor = torch.zeros(())
    for seed in seeds:
        growth = gradient_growth(build(seed), projection, projection_data(seed, values, width))
        total = total + torch.tensor([layer.weight_norm**2 for layer in growth.layers], dtype=torch.float64)
    return (total / len(seeds)).tolist()


def factor_of(
    activation: Callable[[], nn.Module], values: int, seeds: Sequence[int], norm: Callable[[], nn.Module] = SplitBatchNorm
) -> GrowthFactor:
    """λ of the network of that activation, fitted to the mean over seeds."""
    found = squares(lambda seed: growth_network(seed, DEPTH, WIDTH, activation, norm), values, seeds)
    return fitted(range(1, DEPTH + 1), found)


def split_factor(ranks: int, seeds: Sequence[int]) -> GrowthFactor:
    """λ where each of the ranks normalizes its part of a batch of `SPLIT` values."""
    return factor_of(nn.ReLU, SPLIT, seeds, functools.partial(SplitBatchNorm, ranks))


def ratio(build: Callable[[int, int], nn.Module], depth: int, seeds: Sequence[int]) -> float:
    """Squared norm of the first layer's gradient over that of the last, width 256, 64 values."""
    found = squares(lambda seed: build(seed, depth), 64, seeds, 256)
    return found[0] / found[-1]


def _batch_normalized(seed: int, depth: int) -> nn.Module:
    return growth_network(seed, depth, 256, nn.ReLU, SplitBatchNorm)


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch norm": _batch_normalized,
    "no batch norm, He initialization": lambda seed, depth: growth_network(seed, depth, 256),
    "skip connections": lambda seed, depth: skip_network(seed, depth, 256),
}


def others(seeds: Sequence[int], settings: Settings) -> list[Claim]:
    """Activations whose factor is by quadrature."""
    kinds: dict[str, tuple[Callable[[], nn.Module], Activation]] = {
        "tanh": (nn.Tanh, torch.tanh),
        "GELU": (nn.GELU, nn.functional.gelu),
        "sigmoid": (nn.Sigmoid, torch.sigmoid),
    }
    claims = []
    for name, (layer, function) in settings.track([*kinds.items()][: 1 if settings.quick else 3], "growth: activations"):
        found = factor_of(layer, 64, seeds).lambda_sq
        claims.append(near(f"{name}, 64 values: lambda_sq by quadrature", found, growth_factor(64, function).lambda_sq, 0.02))
    return claims


def limits(relu: dict[int, GrowthFactor], seeds: Sequence[int]) -> list[Claim]:
    """The size of the weights changes nothing; constant statistics make it worse."""

    def factor(build: Callable[..., nn.Module], values: int, *more: float) -> float:
        found = squares(lambda seed: build(seed, DEPTH, WIDTH, *more), values, seeds)
        return fitted(range(1, DEPTH + 1), found).lambda_sq

    constant = {B: factor(growth_limits.detached, B) / relu[B].lambda_sq for B in (8, 64)}
    five, one = factor(growth_limits.scaled, 64, 5.0), relu[64].lambda_sq
    text = "ReLU, statistics constant in backward: lambda_sq over that of batch norm, {} values"
    return [
        near("ReLU, 64 values, all weights × 5: lambda_sq is that of × 1", five, one, 1e-3),
        at_least(text.format(8), constant[8], 1.1),
        at_least(text.format(64), constant[64], 1.0),
    ]


def convolutional(samples: int, side: int, seeds: Sequence[int]) -> Claim:
    """A convolution's values per channel are N·H·W: 20 layers of 64 channels."""
    total: Tensor = torch.zeros(())
    for seed in seeds:
        growth = gradient_growth(convolutions(seed, 20, 64), projection, image_data(seed, samples, 64, side))
        total = total + torch.tensor([layer.weight_norm**2 for layer in growth.layers], dtype=torch.float64)
    values = samples * side**2
    text = f"3×3 convolutions, {samples}×{side}×{side} = {values} values per channel: lambda_sq"
    return near(text, fitted(range(1, 21), total.tolist()).lambda_sq, growth_factor(values).lambda_sq, 0.03)


def _near(name: str, activation: str, values: int, found: GrowthFactor) -> Claim:
    expected = growth_factor(values, activation).lambda_sq
    return near(f"{name}, {values} values per channel: lambda_sq", found.lambda_sq, expected, LIMITS.get(values, 0.02))


def _split_claims(split: dict[int, GrowthFactor]) -> list[Claim]:
    claims = []
    for ranks, found in split.items():
        local = SPLIT // ranks
        text = f"{SPLIT} values on {ranks} ranks, unsynchronized: lambda_sq of {local} values"
        claims.append(near(text, found.lambda_sq, growth_factor(local).lambda_sq, LIMITS.get(local, 0.02)))
    return claims


def _draw_factors(axes: Any, name: str, found: dict[int, GrowthFactor], activation: str, color: str) -> None:
    fine = [4 * 2 ** (step / 8) for step in range(49)]
    axes.plot(fine, [growth_factor(B, activation).lambda_sq for B in fine], color=color, label=f"{name}, closed form")
    axes.plot(list(found), [one.lambda_sq for one in found.values()], "o", color=color, label=f"{name}, measured")
    limit = growth_factor(math.inf, activation).lambda_sq
    axes.axhline(limit, color=color, linestyle=":", linewidth=1)
    powers_of_two(axes, BATCHES)
    legend(axes)


def _draw_split(axes: Any, split: dict[int, GrowthFactor]) -> None:
    axes.plot(list(split), [one.lambda_sq for one in split.values()], "o", color=RED, label="unsynchronized, measured")
    axes.plot(
        list(split), [growth_factor(SPLIT // W).lambda_sq for W in split], "-", color=RED, label="closed form at 64/ranks"
    )
    axes.axhline(growth_factor(SPLIT).lambda_sq, color=GRAY, label="synchronized: closed form at 64")
    powers_of_two(axes, list(split))
    legend(axes)


def torch_network(seed: int) -> nn.Module:
    """The network with nn.BatchNorm1d."""
    norm = functools.partial(nn.BatchNorm1d, WIDTH, eps=NO_EPS, affine=False)
    return growth_network(seed, DEPTH, WIDTH, nn.ReLU, norm)


def over_ranks(settings: Settings) -> Outcome:
    """The same global batch on these ranks, synchronized and not."""
    rank, size = collectives.rank_and_size()
    local = SPLIT // size

    def factor(build: Build) -> GrowthFactor:
        total: Tensor = torch.zeros(())
        for seed in settings.track(settings.seeds, "growth over ranks"):
            whole = projection_data(seed, local * size, WIDTH)
            share = Projection(*(part.tensor_split(size)[rank] for part in whole))
            found = gradient_growth(build(seed), projection, share)
            total = total + torch.tensor([layer.weight_norm**2 for layer in found.layers], dtype=torch.float64)
        return fitted(range(1, DEPTH + 1), total.tolist())

    together = factor(lambda seed: convert(torch_network(seed)))
    alone = factor(torch_network) if local > 1 else GrowthFactor(math.nan, math.nan)  # one value is no batch norm
    claims = []
    for name, found, values in (("synchronized", together, local * size), ("unsynchronized", alone, local)):
        text = f"{size} ranks of {local} values, {name}: lambda_sq of {values} values"
        if values > 3:
            claims.append(near(text, found.lambda_sq, growth_factor(values).lambda_sq, LIMITS.get(values, 0.02)))

    def draw(figure: Any) -> None:
        (axes,) = panels(figure, [PANELS[2]])
        axes.bar(["synchronized", "unsynchronized"], [together.lambda_sq, alone.lambda_sq], color=[BLUE, RED])
        axes.set_xlabel(f"{size} ranks of {local} values per channel")

    return Outcome(claims, NOTES, draw)
