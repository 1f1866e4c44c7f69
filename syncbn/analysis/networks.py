"""The networks and data of the experiments: digits, a VGG-like network, the deep linear network, the MLP of growth.

Requirements: small enough for two cores; the same for a seed on any number of ranks; batch norm is of torch's classes, so that
`syncbn.convert` makes it that of all ranks.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS: tuple[int | None, ...] = (16, 16, None, 32, 32, None, 32, 32, 32, 32)  # None: 2×2 maximum
HELD_OUT = 360
NO_EPS = 1e-30  # ε = 0, which torch refuses


class Data(NamedTuple):
    x: Tensor  # (N, *) float32
    labels: Tensor  # (N,) int64


class Digits(NamedTuple):
    train: Data  # x (1437, 1, 8, 8), standardized
    held_out: Data  # x (360, 1, 8, 8)


@functools.cache
def digits(seed: int = 0) -> Digits:
    """scikit-learn's 1797 digits, shuffled by the seed, standardized by the training images."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    x = (x - x[train].mean()) / x[train].std()
    return Digits(Data(x[train], y[train]), Data(x[held_out], y[held_out]))


def vgg(
    seed: int,
    norm: bool = True,
    gain: float = 1.0,
    after: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """(N, 1, 8, 8) → (N, 10): eight 3×3 convolutions with batch norm (or without), ReLU, and a linear layer.

    After Simonyan & Zisserman (2014, arXiv:1409.1556), narrow. He initialization, times `gain`. `after(i)` makes what comes
    between the i-th batch norm and its ReLU.
    """
    modules: list[nn.Module] = []
    inputs, number = 1, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for channels in CHANNELS:
            if channels is None:
                modules.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=not norm)
            nn.init.normal_(conv.weight, std=gain * math.sqrt(2 / (9 * inputs)))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            modules += [conv, *([nn.BatchNorm2d(channels)] if norm else []), *([after(number)] if after else []), nn.ReLU()]
            inputs, number = channels, number + 1
        return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def classification(model: nn.Module, batch: Data) -> Tensor:
    """The mean cross entropy."""
    return F.cross_entropy(model(batch.x), batch.labels)


def batches(data: Data, size: int, seed: int) -> Iterator[Data]:
    """Mini-batches without end: every epoch in another order, without its incomplete last."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(data.x), generator=generator).split(size):
            if len(chosen) == size:
                yield Data(data.x[chosen], data.labels[chosen])


def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images that the model, in the mode it is in, labels rightly."""
    with torch.no_grad():
        return (model(data.x).argmax(1) == data.labels).double().mean().item()


def linear_network(seed: int, norm: bool, depth: int = 25, width: int = 32, outputs: int = 4) -> nn.Sequential:
    """(N, width) → (N, outputs): `depth` linear layers without bias, batch norm after each but the last; W ~ N(0, 1/width)."""
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(depth):
            layer = nn.Linear(width, outputs if number == depth - 1 else width, bias=False)
            nn.init.normal_(layer.weight, std=1 / math.sqrt(width))
            modules += [layer, *([nn.BatchNorm1d(width)] if norm and number < depth - 1 else [])]
    return nn.Sequential(*modules)


class Regression(NamedTuple):
    x: Tensor  # (N, width)
    y: Tensor  # (N, outputs)


def regression_data(seed: int, samples: int = 256, width: int = 32, outputs: int = 4) -> Regression:
    """X Gaussian, Y = XA."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = torch.randn(samples, width, generator=generator)
    return Regression(x, x @ torch.randn(width, outputs, generator=generator) / math.sqrt(width))


def regression(model: nn.Module, batch: Regression) -> Tensor:
    """½ of the mean over samples of ‖f(x) − y‖²."""
    return (model(batch.x) - batch.y).square().sum(1).mean() / 2


class SplitBatchNorm(nn.Module):
    """Batch norm without affine and ε of each of `ranks` equal parts of the batch by itself: ranks that do not synchronize."""

    def __init__(self, ranks: int = 1) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.batch_norm(part, None, None, training=True, eps=NO_EPS) for part in x.chunk(self.ranks)]
        return torch.cat(parts)


class FixedBatchNorm(nn.Module):
    """Batch norm (N, C) without affine whose statistics are constants in backward."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.detach(), 0, correction=0)
        return (x - mean) * (var + NO_EPS).rsqrt()


class Skip(nn.Module):
    """z + body(z)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.body(z)


def growth_network(
    seed: int,
    depth: int,
    width: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """`depth` layers z → φ(norm(Wz)), W ~ N(0, 1/width); without norm N(0, 2/width), as He et al. have it for ReLU."""
    modules: list[nn.Module] = []
    for weight in _weights(seed, depth, width, 1.0 if norm else 2.0):
        modules += [weight, *([norm()] if norm else []), activation()]
    return nn.Sequential(*modules)


def skip_network(seed: int, depth: int, width: int) -> nn.Sequential:
    """`depth` layers z → z + W·relu(batch norm(z))."""
    return nn.Sequential(*(Skip(SplitBatchNorm(), nn.ReLU(), weight) for weight in _weights(seed, depth, width, 1.0)))


def _weights(seed: int, depth: int, width: int, variance: float) -> Iterator[nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(std=math.sqrt(variance / width), generator=generator)
        yield layer


def classifier(body: nn.Module, width: int) -> nn.Sequential:
    """(N, 1, 8, 8) → (N, 10): digits as `width` = 64 values through a body (N, width) → (N, width)."""
    return nn.Sequential(nn.Flatten(), body, nn.Linear(width, 10))


def convolutions(seed: int, depth: int, channels: int) -> nn.Sequential:
    """`depth` layers z → relu(batch norm(W∗z)), 3×3 with circular padding, W ~ N(0, 1/(9·channels))."""
    generator, modules = torch.Generator().manual_seed(seed), list[nn.Module]()
    for _ in range(depth):
        made = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False, device="meta")
        layer = made.to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(std=(9 * channels) ** -0.5, generator=generator)
        modules += [layer, SplitBatchNorm(), nn.ReLU()]
    return nn.Sequential(*modules)


class Projection(NamedTuple):
    x: Tensor  # (B, width), or images (N, C, H, W)
    direction: Tensor  # likewise


def projection_data(seed: int, samples: int, width: int) -> Projection:
    """Gaussian input and direction V."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    return Projection(torch.randn(samples, width, generator=generator), torch.randn(samples, width, generator=generator))


def image_data(seed: int, samples: int, channels: int, side: int) -> Projection:
    """Gaussian images and direction."""
    generator = torch.Generator().manual_seed(30_000 + seed)
    return Projection(*torch.randn(2, samples, channels, side, side, generator=generator))


def projection(model: nn.Module, batch: Projection) -> Tensor:
    """⟨z_L, V⟩."""
    return (model(batch.x) * batch.direction).sum()
