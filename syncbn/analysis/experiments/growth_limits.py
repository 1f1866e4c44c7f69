"""Claims beside those of growth.py: what growth does not depend on, what does not cure it, and what it costs in training."""

from collections.abc import Sequence

import torch
from torch import nn

from ..claims import Claim, Settings, at_least, at_most
from ..networks import FixedBatchNorm, SplitBatchNorm, batches, classifier, digits, growth_network, skip_network
from ..training import train, training_accuracy

SIDE, EPOCHS, BATCH = 64, 5, 64
RATES = (1e-1, 1e-2, 1e-3, 1e-4)


def scaled(seed: int, depth: int, width: int, gain: float) -> nn.Module:
    """The network of ReLU and batch norm with all weights times `gain`."""
    model = growth_network(seed, depth, width, nn.ReLU, SplitBatchNorm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def detached(seed: int, depth: int, width: int) -> nn.Module:
    return growth_network(seed, depth, width, nn.ReLU, FixedBatchNorm)


def trained(body: nn.Module, seed: int, rate: float) -> float:
    """Training accuracy of a classifier of digits after five epochs of SGD, momentum 0.9."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classifier(body, SIDE)
    data = digits().train
    train(model, batches(data, BATCH, seed), EPOCHS * (len(data.x) // BATCH), rate)
    return training_accuracy(model, data)


def best(residual: bool, depth: int, seed: int, rates: Sequence[float]) -> float:
    """The accuracy of the best learning rate."""
    found = []
    for rate in rates:
        body = skip_network(seed, depth, SIDE) if residual else growth_network(seed, depth, SIDE, nn.ReLU, SplitBatchNorm)
        found.append(trained(body, seed, rate))
    return max(found)


def trainability(settings: Settings) -> list[Claim]:
    """A network whose gradients explode does not train; with skip connections it does."""
    depths, rates, seed = (10, 80), RATES[1:3] if settings.quick else RATES, settings.seeds[0]
    plain, skips = (
        {depth: best(residual, depth, seed, rates) for depth in settings.track(depths, f"growth: training {name}")}
        for residual, name in ((False, "batch norm"), (True, "skip connections"))
    )
    text = "digits, 64 units, 5 epochs, best learning rate, training accuracy: "
    return [
        at_least(f"{text}batch norm, {depths[0]} layers", plain[depths[0]], 0.85),
        at_most(f"{text}batch norm, {depths[1]} layers", plain[depths[1]], 0.5),
        at_least(f"{text}skip connections, {depths[1]} layers", skips[depths[1]], 0.9),
    ]
