"""Claims on internal covariate shift (Santurkar et al. 2018, arXiv:1805.11604, section 2.2).

Plain gradient descent; the VGG-like network on digits in mini-batches of 64, the deep linear network on its full batch. Under
torchrun each rank has its share of the same batches, and batch norm is synchronized: the same claims.
"""

from typing import Any, NamedTuple

from torch import nn

from ... import collectives
from ...convert import convert
from ..claims import Claim, Outcome, Settings, at_least, at_most
from ..extremes import greatest, least, median
from ..networks import batches, classification, digits, linear_network, regression, regression_data, vgg
from ..plots import BLUE, RED, legend, panels
from ..shift import gradient_correlation
from ..training import descend, share

NOTES = [
    '"networks without batch norm have the higher gradient correlation" is a claim on equal learning rates early in training: '
    "it turns late at large rates, when the network without batch norm sits where the loss is sharp; 20 steps are judged",
    "the deep linear network scatters: of 12 seeds one had 0.99 with batch norm, and two 0.85 and 0.88 without; hence medians",
    "batch norm does not reduce the shift; the deep linear network trains faster with more of it",
]


class Path(NamedTuple):
    """A training run, measured every few steps."""

    steps: list[int]
    cosines: list[float]  # means over the layers but the first
    losses: list[float]  # of every step

    @property
    def cosine(self) -> float:
        return sum(self.cosines) / len(self.cosines)


def run(settings: Settings) -> Outcome:
    """On any number of ranks that divides 64."""
    seeds, every = settings.seeds[:3] if settings.quick else settings.seeds, 10 if settings.quick else 5
    convolutional: dict[int, dict[bool, Path]] = {}
    linear: dict[int, dict[bool, Path]] = {}
    for seed in settings.track(seeds, "shift"):
        convolutional[seed] = {norm: vgg_path(seed, norm) for norm in (False, True)}
        linear[seed] = {norm: linear_path(seed, norm, every=every) for norm in (False, True)}
    gaps = [convolutional[seed][False].cosine - convolutional[seed][True].cosine for seed in seeds]
    plain, normed = ([linear[seed][norm] for seed in seeds] for norm in (False, True))
    ends = [b.losses[-1] / a.losses[-1] for a, b in zip(plain, normed, strict=True)]
    claims = [
        at_least("VGG, first 20 steps: cosine without batch norm − with, least of the seeds", least(gaps), 0.02),
        at_least("deep linear network: cosine without batch norm, median", median(one.cosine for one in plain), 0.9),
        at_most("deep linear network: cosine with batch norm, median", median(one.cosine for one in normed), 0.7),
        at_most("  and yet its loss after 100 steps, with over without, most of the seeds", greatest(ends), 1.0),
    ]
    claims += _control(seeds[0])

    def draw(figure: Any) -> None:
        left, middle, right = panels(figure, PANELS)
        for norm, color, name in ((False, RED, "without batch norm"), (True, BLUE, "with batch norm")):
            for number, seed in enumerate(seeds):
                label = name if number == 0 else None
                left.plot(convolutional[seed][norm].steps, convolutional[seed][norm].cosines, "o-", color=color, label=label)
                middle.plot(linear[seed][norm].steps, linear[seed][norm].cosines, "o-", color=color, label=label)
                right.plot(linear[seed][norm].losses, color=color, label=label)
        for axes in (left, middle, right):
            legend(axes)
        right.set_yscale("log")

    return Outcome(claims, NOTES, draw)


PANELS = [
    ("VGG-like network, digits, learning rate 0.03", "step", "cosine of G and G', mean over layers"),
    ("Deep linear network, learning rate 0.003", "step", "cosine of G and G', mean over layers"),
    ("Deep linear network: it trains faster all the same", "step", "training loss"),
]


def _distributed(model: nn.Module) -> nn.Module:
    return convert(model) if collectives.rank_and_size()[1] > 1 else model


def vgg_path(seed: int, norm: bool, lr: float = 0.03, steps: int = 20, every: int = 4) -> Path:
    """Of the VGG-like network on digits."""
    model = _distributed(vgg(seed, norm))
    data = batches(digits(seed).train, 64, seed)
    path = Path([], [], [])
    for step in range(steps):
        batch = share(next(data))
        if step % every == 0:
            _measure(path, step, model, classification, batch, lr)
        path.losses.append(descend(model, classification, batch, lr))
    return path


def linear_path(seed: int, norm: bool, lr: float = 0.003, steps: int = 100, every: int = 5) -> Path:
    """Of the deep linear network, full-batch gradient descent."""
    model = _distributed(linear_network(seed, norm))
    batch = share(regression_data(seed))
    path = Path([], [], [])
    for step in range(steps):
        if step % every == 0:
            _measure(path, step, model, regression, batch, lr)
        path.losses.append(descend(model, regression, batch, lr))
    return path


def _measure(path: Path, step: int, model: nn.Module, loss: Any, batch: Any, lr: float) -> None:
    found = gradient_correlation(model, loss, batch, lr)
    path.steps.append(step)
    path.cosines.append(found.cosine)


def _control(seed: int) -> list[Claim]:
    """Nothing moves at learning rate 0."""
    batch = share(next(batches(digits(seed).train, 64, seed)))
    found = gradient_correlation(_distributed(vgg(seed)), classification, batch, 0.0)
    worst = greatest(abs(1 - layer.cosine) for layer in found.layers)
    return [
        at_most("control, learning rate 0: largest |cosine − 1|", worst, 1e-6),
        at_most("control, learning rate 0: largest l2 difference", greatest(layer.l2 for layer in found.layers), 0.0),
    ]
