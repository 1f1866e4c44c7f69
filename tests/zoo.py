"""Small networks with batch norm, one for each family of architectures in use, to convert and compare.

Requirements
    - a sample's output depends on that sample and on batch statistics alone, so that splitting a batch is exact;
    - no bias, β neither, with nothing but linear layers between it and the next batch norm: its gradient would be zero in
      exact arithmetic, so that there is nothing to compare;
    - the first axis of inputs and outputs is the sample, and there may be no sample at all.

Shapes: N samples, C channels, H W D sizes in space, L points or time steps, K nodes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = Callable[[int, torch.Generator], tuple[Tensor, ...]]


class Family(NamedTuple):
    """A family of architectures by a small member."""

    build: Callable[[], nn.Module]
    inputs: Inputs  # (N, generator) → inputs of N samples, float64 or integer


def make(family: str, seed: int = 0) -> nn.Module:
    """A network of the family in training mode, float64, the same for the same seed.

    γ, β and running statistics are not those of a new layer.
    """
    torch.manual_seed(seed)
    model = FAMILIES[family].build().double().train()
    for norm in batch_norms(model):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Each batch norm layer once."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


# Inputs


def normal(*shapes: tuple[int, ...]) -> Inputs:
    """Inputs of these shapes behind the sample."""

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(torch.randn(samples, *shape, generator=generator, dtype=torch.float64) + 0.3 for shape in shapes)

    return draw


def records(samples: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Five numbers and two categories."""
    return *normal((5,))(samples, generator), torch.randint(4, (samples, 2), generator=generator)


def graphs(samples: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random graphs of 2 to 6 nodes, padded to 6: nodes (N, 6, 4) and adjacency (N, 6, 6)."""
    real = torch.arange(6) < torch.randint(2, 7, (samples, 1), generator=generator)
    linked = torch.rand(samples, 6, 6, generator=generator) < 0.4
    adjacency = (linked | linked.mT | torch.eye(6).bool()) & real[:, None] & real[:, :, None]
    return *normal((6, 4))(samples, generator), adjacency


IMAGES = normal((3, 8, 8))
PAIRS = normal((3, 8, 8), (3, 8, 8))

# Parts


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Module:
    return nn.Conv2d(before, after, kernel, stride, dilation * (kernel // 2), dilation, groups, bias=False)


def unit(before: int, after: int, *where: int, act: type[nn.Module] = nn.ReLU, **norm: float) -> nn.Module:
    """Convolution, batch norm, activation."""
    return nn.Sequential(conv(before, after, *where), nn.BatchNorm2d(after, **norm), act())


def points(before: int, after: int) -> nn.Module:
    """Linear at each point of (N, C, L), batch norm, ReLU."""
    return nn.Sequential(nn.Conv1d(before, after, 1, bias=False), nn.BatchNorm1d(after), nn.ReLU())


def linear(before: int, after: int) -> nn.Module:
    """Linear, batch norm of (N, C), ReLU."""
    return nn.Sequential(nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU())


def pooled(*stages: nn.Module, channels: int) -> nn.Module:
    """The stages, the mean over space, a classifier."""
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 5))


class Branches(nn.Module):
    """Several layers of one input, joined."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.join, self.branches = join, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join([branch(x) for branch in self.branches])


def concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1)


def residual(*body: nn.Module) -> nn.Module:
    return Branches(sum, nn.Identity(), nn.Sequential(*body))


# Image classification


def resnet(block: Callable[..., nn.Module]) -> nn.Module:
    """A block that keeps the shape, and one that does not and projects its shortcut (arXiv:1512.03385)."""
    projection = nn.Sequential(conv(6, 8, 1, 2), nn.BatchNorm2d(8))
    keep, change = residual(block(6, 6)), Branches(sum, projection, block(6, 8, 2))
    return pooled(unit(3, 6), keep, nn.ReLU(), change, nn.ReLU(), channels=8)


def basic(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(unit(before, after, 3, stride), conv(after, after), nn.BatchNorm2d(after))


def bottleneck(before: int, after: int, stride: int = 1) -> nn.Module:
    """With a grouped convolution (arXiv:1611.05431)."""
    return nn.Sequential(unit(before, 4, 1), unit(4, 4, 3, stride, 2), conv(4, after, 1), nn.BatchNorm2d(after))


def preactivation() -> nn.Module:
    """Batch norm and ReLU before each convolution, nothing after the sum (arXiv:1603.05027)."""

    def block() -> nn.Module:
        return residual(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6))

    return pooled(conv(3, 6), block(), block(), nn.BatchNorm2d(6), nn.ReLU(), channels=6)


def dense() -> nn.Module:
    """Every layer sees the outputs of all before it (arXiv:1608.06993)."""

    def layer(before: int) -> nn.Module:
        return Branches(concatenate, nn.Identity(), nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), conv(before, 3)))

    transition = nn.BatchNorm2d(10), nn.ReLU(), conv(10, 5, 1), nn.AvgPool2d(2)
    return pooled(conv(3, 4), layer(4), layer(7), *transition, layer(5), layer(8), channels=11)


def inverted_residual() -> nn.Module:
    """Expand, depthwise, squeeze and excite, project (arXiv:1801.04381, 1709.01507, 1905.02244)."""
    norm = {"eps": 1e-3, "momentum": 0.01}

    def block(inner: int, kernel: int) -> nn.Module:
        depthwise = unit(4, inner, 1, act=nn.Hardswish, **norm), unit(inner, inner, kernel, 1, inner, act=nn.SiLU, **norm)
        gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 3, 1), nn.ReLU(), nn.Conv2d(3, inner, 1), nn.Hardsigmoid()
        excite = Branches(math.prod, nn.Identity(), nn.Sequential(*gate))
        return residual(*depthwise, excite, conv(inner, 4, 1), nn.BatchNorm2d(4, **norm))

    return pooled(unit(3, 4, 3, 2), block(8, 3), block(12, 5), channels=4)


def vgg() -> nn.Module:
    """A chain of convolutions and maxima, a fully connected head (arXiv:1409.1556)."""
    features = unit(3, 6), nn.MaxPool2d(2), unit(6, 8), nn.MaxPool2d(2)
    return nn.Sequential(*features, nn.Flatten(1), linear(32, 12), nn.Linear(12, 5))


def inception() -> nn.Module:
    """Branches of several depths side by side (arXiv:1512.00567)."""

    def block(before: int) -> nn.Module:
        two = nn.Sequential(unit(before, 3, 1, eps=1e-3), unit(3, 3, eps=1e-3))
        three = nn.Sequential(unit(before, 2, 1, eps=1e-3), unit(2, 3, eps=1e-3), unit(3, 3, eps=1e-3))
        averaged = nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(before, 2, 1, eps=1e-3))
        return Branches(concatenate, unit(before, 2, 1, eps=1e-3), two, three, averaged)

    return pooled(unit(3, 4), block(4), nn.MaxPool2d(2), block(10), channels=10)


def reparametrizable() -> nn.Module:
    """A 3×3, a 1×1 and an identity branch, each with its batch norm (arXiv:2101.03697)."""

    def block(channels: int) -> nn.Module:
        branches = (nn.Sequential(conv(channels, channels, k), nn.BatchNorm2d(channels)) for k in (3, 1))
        return nn.Sequential(Branches(sum, nn.BatchNorm2d(channels), *branches), nn.ReLU())

    return pooled(block(3), conv(3, 6, 3, 2), block(6), channels=6)


def separable() -> nn.Module:
    """Depthwise convolutions, each before a pointwise one (arXiv:1610.02357, 1704.04861)."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        return nn.Sequential(unit(before, before, 3, stride, before), unit(before, after, 1))

    return pooled(unit(3, 6), block(6, 8, 2), block(8, 8, 1), channels=8)


class Shuffle(nn.Module):
    """Half of the channels pass by, half are convolved, then the halves interleave (arXiv:1807.11164)."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(half, half, 1), unit(half, half, 3, 1, half), unit(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, taken = x.chunk(2, 1)
        return torch.stack([kept, self.body(taken)], 2).flatten(1, 2)


class Frozen(nn.Module):
    """A first stage that keeps its statistics and parameters while the rest trains, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(unit(3, 6), basic(6, 6)).requires_grad_(False)
        self.rest = pooled(unit(6, 8, 3, 2), unit(8, 8), channels=8)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


# Detection, segmentation, generation


class Tower(nn.Module):
    """One kind of output of a detection head, with a batch norm that others use too."""

    def __init__(self, norm: nn.BatchNorm2d, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(norm.num_features, norm.num_features), norm, nn.ReLU())
        self.last = nn.Conv2d(norm.num_features, outputs, 1)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.last(self.body(level)) for level in levels]


class Pyramid(nn.Module):
    """Features of three sizes, joined from the top down, and one head for all of them (arXiv:1612.03144, 1708.02002).

    The head's batch norm runs six times in a forward, on three sizes, and is registered twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([unit(3, 4, 3, 2), unit(4, 5, 3, 2), unit(5, 6, 3, 2)])
        self.lateral = nn.ModuleList([unit(4, 4, 1), unit(5, 4, 1), unit(6, 4, 1)])
        shared = nn.BatchNorm2d(4)
        self.label, self.box = Tower(shared, 3), Tower(shared, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for low in (1, 0):
            levels[low] = levels[low] + F.interpolate(levels[low + 1], scale_factor=2)
        return *self.label(levels), *self.box(levels)


def atrous() -> nn.Module:
    """Dilated convolutions beside the mean over space, for segmentation (arXiv:1706.05587).

    The mean goes through batch norm as (N, C, 1, 1), which torch refuses for a rank with one sample.
    """
    image = nn.Sequential(nn.AdaptiveAvgPool2d(1), unit(6, 4, 1), nn.Upsample(size=4))
    dilated = (unit(6, 4, 3, 1, 1, dilation) for dilation in (1, 2, 3))
    return nn.Sequential(unit(3, 6, 3, 2), Branches(concatenate, image, *dilated), unit(16, 4, 1), nn.Conv2d(4, 2, 1))


def unet() -> nn.Module:
    """Down and up again in three dimensions, joined at each size (arXiv:1606.06650). Input (N, 2, D, H, W)."""

    def step(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU())

    def level(before: int, after: int, below: nn.Module, channels: int) -> nn.Module:
        below = nn.Sequential(nn.MaxPool3d(2), below, nn.ConvTranspose3d(channels, after, 2, 2))
        return nn.Sequential(step(before, after), Branches(concatenate, nn.Identity(), below), step(2 * after, after))

    return nn.Sequential(level(2, 3, level(3, 4, step(4, 6), 6), 4), nn.Conv3d(3, 2, 1))


def generator() -> nn.Module:
    """Transposed convolutions from a latent vector to an image (arXiv:1511.06434). Input (N, 6)."""

    def rise(before: int, after: int, *where: int) -> nn.Module:
        layer = nn.ConvTranspose2d(before, after, 4, *where, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())

    last = nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()
    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), rise(6, 8), rise(8, 4, 2, 1), *last)


# Two inputs


class Siamese(nn.Module):
    """Two inputs through one network, compared: each batch norm runs twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(unit(3, 4, 3, 2), unit(4, 6, 3, 2), nn.Flatten(1), linear(24, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.embed(a) - self.embed(b)).square())


class SelfSupervised(nn.Module):
    """Two views, each projected and predicted, and projected by a target without gradient (arXiv:2002.05709, 2006.07733).

    A projection ends in a batch norm without γ and β (arXiv:2011.10566). The target moves its running statistics alone: its
    batch norm has a collective in forward and none in backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = self.encoder(), self.encoder().requires_grad_(False)
        self.predictor = nn.Sequential(linear(8, 4), nn.Linear(4, 8))

    @staticmethod
    def encoder() -> nn.Module:
        features = unit(3, 6, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        return nn.Sequential(*features, linear(6, 10), nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8, affine=False))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            targets = self.target(b), self.target(a)
        projections = self.online(a), self.online(b)
        return *(self.predictor(p) for p in projections), *projections, *targets


# Points, sequences, tables, graphs


class PointNet(nn.Module):
    """The same layers at each point, a learned alignment, the maximum over points (arXiv:1612.00593). Input (N, 3, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(points(3, 6), points(6, 8), nn.AdaptiveMaxPool1d(1), nn.Flatten(1), linear(8, 8))
        self.matrix = nn.Linear(8, 9)
        self.body = nn.Sequential(points(3, 6), points(6, 8), points(8, 12))
        self.head = nn.Sequential(linear(12, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.align(x)).unflatten(1, (3, 3))  # (N, 3, 3)
        return self.head(self.body(x + matrix @ x).amax(2))


def temporal() -> nn.Module:
    """Residual blocks of dilated convolutions that see the past alone (arXiv:1803.01271). Input (N, 3, L)."""

    def layer(dilation: int) -> nn.Module:
        causal = nn.ConstantPad1d((2 * dilation, 0), 0.0), nn.Conv1d(6, 6, 3, dilation=dilation, bias=False)
        return nn.Sequential(*causal, nn.BatchNorm1d(6, momentum=None), nn.ReLU())

    return nn.Sequential(nn.Conv1d(3, 6, 1), *(residual(layer(d), layer(d)) for d in (1, 2, 4)), nn.Conv1d(6, 2, 1))


class Conformer(nn.Module):
    """Attention, then gates, a depthwise convolution and batch norm over time (arXiv:2005.08100). Input (N, L, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.attend = nn.Linear(channels, 3 * channels)
        gate = nn.Conv1d(channels, 2 * channels, 1), nn.GLU(1)
        depthwise = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm1d(channels)
        self.convolve = nn.Sequential(*gate, *depthwise, nn.SiLU(), nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attend(self.norms[0](x)).chunk(3, 2)
        x = x + (query @ key.mT).softmax(2) @ value
        return x + self.convolve(self.norms[1](x).mT).mT


class ConvRecurrent(nn.Module):
    """A convolutional state with one batch norm for all time steps. Input (N, L, 2, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(conv(6, 4), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4, *x.shape[3:])
        for now in x.unbind(1):
            state = self.step(torch.cat([now, state], 1))
        return state


class Recurrent(nn.Module):
    """Batch norm of all time steps as one batch, between recurrent layers (arXiv:1512.02595). Input (N, L, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(3, 5, batch_first=True), nn.LSTM(5, 4, batch_first=True)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(5), nn.BatchNorm1d(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)[0]
            x = norm(x.flatten(0, 1)).view_as(x)
        return x


class Tabular(nn.Module):
    """Batch norm directly on the numbers, beside embeddings of categories. Input (N, 5) and (N, 2) integers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.categories = nn.BatchNorm1d(5), nn.Embedding(4, 3)
        self.body = nn.Sequential(nn.Linear(11, 16), nn.ReLU(), linear(16, 8), nn.Linear(8, 2))

    def forward(self, x: Tensor, category: Tensor) -> Tensor:
        return self.body(torch.cat([self.numbers(x), self.categories(category).flatten(1)], 1))


class Graph(nn.Module):
    """A node adds its neighbours and goes through layers (arXiv:1810.00826). Input (N, K, 4) and adjacency (N, K, K).

    A node that is not its own neighbour is padding. Batch norm sees (nodes of all graphs, C): their number is not N times some
    constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(linear(4, 8), linear(8, 6)), nn.Sequential(linear(6, 8), linear(8, 6))])
        self.last = nn.Linear(6, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        real = adjacency.diagonal(dim1=1, dim2=2)  # (N, K)
        for layer in self.layers:
            met = layer((adjacency.to(nodes.dtype) @ nodes)[real])  # (nodes of all graphs, C)
            nodes = met.new_zeros(*real.shape, met.shape[1]).masked_scatter(real[..., None], met)
        return self.last(nodes.sum(1))


FAMILIES = {
    "residual": Family(lambda: resnet(basic), IMAGES),
    "bottleneck": Family(lambda: resnet(bottleneck), IMAGES),
    "preactivation": Family(preactivation, IMAGES),
    "dense": Family(dense, IMAGES),
    "inverted residual": Family(inverted_residual, IMAGES),
    "vgg": Family(vgg, IMAGES),
    "inception": Family(inception, IMAGES),
    "reparametrizable": Family(reparametrizable, IMAGES),
    "separable": Family(separable, IMAGES),
    "shuffle": Family(lambda: pooled(unit(3, 8, 3, 2), Shuffle(4), Shuffle(4), channels=8), IMAGES),
    "frozen": Family(Frozen, IMAGES),
    "pyramid": Family(Pyramid, normal((3, 16, 16))),
    "atrous": Family(atrous, IMAGES),
    "unet 3d": Family(unet, normal((2, 4, 8, 4))),
    "generator": Family(generator, normal((6,))),
    "siamese": Family(Siamese, PAIRS),
    "self-supervised": Family(SelfSupervised, PAIRS),
    "pointnet": Family(PointNet, normal((3, 12))),
    "temporal": Family(temporal, normal((3, 12))),
    "conformer": Family(lambda: nn.Sequential(Conformer(6), Conformer(6)), normal((7, 6))),
    "convolutional recurrent": Family(ConvRecurrent, normal((4, 2, 5, 5))),
    "recurrent": Family(Recurrent, normal((5, 3))),
    "tabular": Family(Tabular, records),
    "graph": Family(Graph, graphs),
}
