"""Residual networks (He et al. 2015, arXiv:1512.03385): a ResNet-18 with 20 batch norm layers, for 64×64 images, and a
ResNet-50 with 53, for 224×224.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CLASSES = 100
SIZE = 64  # pixels
DAMPED = 0.2


class Residual(nn.Module):
    """Two 3×3 convolutions, each with batch norm, around which the input passes; a stride halves height and width."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class FusedResidual(Residual):
    """The same, where batch norm, addition and ReLU are one layer: bn1, and bn2."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), self.shortcut(x))
        return y


def fuse(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A `network`, in place, with what `make` makes of each batch norm that a ReLU follows: that layer and the ReLU in one."""
    assert isinstance(model, nn.Sequential), "a network"
    model[1], model[2] = make(model[1]), nn.Identity()
    for block in model:
        if isinstance(block, Residual):
            block.bn1, block.bn2 = make(block.bn1), make(block.bn2)  # type: ignore[assignment]
            block.__class__ = FusedResidual
    return model


def network(width: int = 64) -> nn.Sequential:
    """(N, 3, 64, 64) → (N, 100); stages of width, 2·, 4· and 8·width channels on 32×32 to 4×4 positions."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [Residual(inputs, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Bottleneck(nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1, each with batch norm, around which the input passes; the second has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn3.weight, DAMPED)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50(width: int = 64) -> nn.Sequential:
    """(N, 3, H, W) → (N, 1000); branches start at DAMPED of their size, lest rounding explode through 16 of them."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and block == 0 else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Every nn.BatchNorm2d inside by what `make` makes of it, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            replace(child, make)
    return module


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Without the broadcast of buffers, which synchronized layers do not need and local ones would pay for."""
    torchs = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in torchs else "broadcast_buffers"  # the older one
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
