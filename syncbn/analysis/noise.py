"""Noise after batch norm: covariate shift made on purpose, another in every step."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import collectives
from ..function import in_backward


class NoiseRange(NamedTuple):
    """Santurkar et al. 2018, arXiv:1805.11604, appendix; the constants as they are recalled there."""

    mean: float = 0.5  # n_µ
    scale: float = 1.25  # n_σ, 1 or more
    mean_radius: float = 0.1  # r_µ
    scale_radius: float = 0.1  # r_σ


class BatchNoise(nn.Module):
    """Noise with a mean and a scale that change with every step: between batch norm and what follows it.

    In training, for every unit j, sample and position i

        µ_j ~ U(−n_µ, n_µ)      σ_j ~ U(1, n_σ)      m_ij ~ U(µ_j − r_µ, µ_j + r_µ)      s_ij ~ N(σ_j, r_σ²)
        x_ij ← s_ij·x_ij + m_ij

    with new µ_j, σ_j in every forward. In eval mode nothing. Statistics that batch norm layers collect behind it are those of
    noisy input: before eval, `syncbn.update_bn_stats` in eval mode gives them those of clean input.

    Over ranks: µ_j, σ_j are drawn from (seed, layer, step), alike on all ranks, or they would average out over the batch; m_ij,
    s_ij from (seed, layer, step, rank). The random state of torch is not touched. A forward inside a backward, as activation
    checkpointing recomputes, has the noise of the last one: call the layer once between a forward and its backward.
    """

    step: Tensor

    def __init__(self, seed: int, layer: int, noise: NoiseRange | None = None, per_unit: bool = False) -> None:
        """
        Args:
            seed, layer: 0 or more; the layers of a network have numbers of their own.
            noise: the ranges; None: the paper's.
            per_unit: a unit is a single activation (C, *) rather than a channel.

        Raises:
            ValueError: a seed or layer below 0, a negative range, or a scale below 1.
        """
        super().__init__()
        noise = NoiseRange() if noise is None else noise
        if seed < 0 or layer < 0:
            raise ValueError(f"given seed={seed}, layer={layer}; expected 0 or more")
        if min(noise) < 0 or noise.scale < 1:
            raise ValueError(f"given {noise}; expected ranges of 0 or more, and a scale of 1 or more")
        self.seed, self.layer, self.noise, self.per_unit = seed, layer, noise, per_unit
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) → (N, C, *). ValueError of another shape, in training."""
        if not self.training:
            return x
        if x.dim() < 2:
            raise ValueError(f"given an input of shape {tuple(x.shape)}; expected (N, C, *)")
        if not in_backward():
            self.step += 1
        shared, own = self._generator(0), self._generator(1 + collectives.rank_and_size()[0])
        unit = x.shape[1:] if self.per_unit else (x.shape[1], *[1] * (x.dim() - 2))
        mean = _uniform(unit, -self.noise.mean, self.noise.mean, shared)
        scale = _uniform(unit, 1.0, self.noise.scale, shared)
        means = mean + _uniform(x.shape, -self.noise.mean_radius, self.noise.mean_radius, own)
        scales = scale + self.noise.scale_radius * torch.randn(x.shape, generator=own)
        return scales.to(x) * x + means.to(x)

    def _generator(self, stream: int) -> torch.Generator:
        key = repr((self.seed, self.layer, int(self.step.item()), stream))
        bits = hashlib.blake2b(key.encode(), digest_size=4).digest()  # as many as torch's generator of the CPU takes
        return torch.Generator().manual_seed(int.from_bytes(bits, "big"))


def _uniform(shape: tuple[int, ...] | torch.Size, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
