"""Claims on noise after batch norm (Santurkar et al. 2018, arXiv:1805.11604, section 2.1), and on mini-batches.

Three regimes of the VGG-like network on digits: without batch norm, with it, and with it and noise behind every layer.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...population import update_bn_stats
from ..claims import Claim, Outcome, Settings, at_least, at_most
from ..extremes import greatest
from ..layers import calls_seen
from ..minibatch import Bias, cross_sample_energy, gradient_bias
from ..networks import NO_EPS, Data, accuracy, batches, classification, digits, vgg
from ..noise import BatchNoise
from ..plots import BLUE, GRAY, ORANGE, RED, legend, panels, powers_of_two
from ..training import train, training_accuracy

EPOCHS, EPOCH = 10, 22
WATCHED = 4  # the ReLU whose input is watched, from 0
REGIMES = {"without batch norm": RED, "batch norm": BLUE, "batch norm and noise": ORANGE}
SIZES = (2, 4, 8, 16, 32, 64)

NOTES = [
    '"similar accuracy" of the noisy network is that of training mode, or of statistics estimated again without noise: by '
    "the running statistics alone, collected under noise, it may be anything",
    "without batch norm the network catches up by epoch 10 at this learning rate: the claim is on speed; the variance of its "
    "channels is not stable either: loss and accuracy are compared, not stability",
    "the bias of mini-batch gradients falls as 1/m for smooth activations; with ReLU and few samples about as m^(−1/2)",
]


class Result(NamedTuple):
    """A training run."""

    accuracy: list[float]  # of training mode, after each epoch
    held_out: float  # with statistics estimated again, noise off
    means: Tensor  # (steps, C) channel means of the input of the watched ReLU

    @property
    def shift(self) -> float:
        """The standard deviation over the steps of the mean of a channel, the mean over channels."""
        return self.means.std(0).mean().item()


def run(settings: Settings) -> Outcome:
    """One process."""
    seeds = settings.seeds[:1] if settings.quick else settings.seeds
    pairs = [(seed, regime) for seed in seeds for regime in REGIMES]
    results = {pair: result(*pair) for pair in settings.track(pairs, "noise: VGG")}
    claims = []
    for seed in seeds:
        plain, normed, noisy = (results[seed, regime] for regime in REGIMES)
        text = f"lr 0.03, seed {seed}: "
        claims += [
            at_least(text + "training accuracy after epoch 3, batch norm", normed.accuracy[2], 0.95),
            at_least(text + "training accuracy after epoch 3, batch norm and noise", noisy.accuracy[2], 0.9),
            at_least(text + "that of batch norm − without", normed.accuracy[2] - plain.accuracy[2], 0.25),
            at_most(text + "held-out accuracy after epoch 10, |noise − none|", abs(noisy.held_out - normed.held_out), 0.02),
            at_least(text + "standard deviation over steps of channel means, noise over none", noisy.shift / normed.shift, 20),
        ]
    drawings = 60 if settings.quick else 200
    biases = {m: bias(seeds[0], m, True, drawings) for m in settings.track(SIZES[1:], "noise: mini-batches")}
    variances = {m: variance_ratio(seeds[0], m) for m in SIZES}
    claims += _minibatch_claims(seeds, biases, variances)

    def draw(figure: Any) -> None:
        _draw(figure, {regime: results[seeds[0], regime] for regime in REGIMES}, biases, variances)

    return Outcome(claims, NOTES, draw)


def result(seed: int, regime: str, lr: float = 0.03, epochs: int = EPOCHS) -> Result:
    """Train in a regime."""
    noise = (lambda layer: BatchNoise(seed, layer)) if regime == "batch norm and noise" else None
    model, data = vgg(seed, regime != "without batch norm", after=noise), digits(seed)
    watched = [module for module in model if isinstance(module, nn.ReLU)][WATCHED]
    means: list[Tensor] = []

    def see(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        means.append(args[0].detach().mean((0, 2, 3)))

    order = batches(data.train, 64, seed)
    accuracies = []
    for _ in range(epochs):
        with calls_seen(model, see, lambda module: module is watched):
            train(model, order, EPOCH, lr)
        accuracies.append(training_accuracy(model, data.train))
    model.eval()  # noise off; batch norm alone trains inside
    update_bn_stats(model, data.train.x.split(64), progress=False)
    return Result(accuracies, accuracy(model, data.held_out), torch.stack(means))


def mlp(seed: int, norm: bool) -> nn.Sequential:
    """(N, 1, 8, 8) → (N, 10), two hidden layers of 32 with tanh, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(32) if norm else nn.Identity() for _ in range(2)]
        layers = [nn.Linear(64, 32), norms[0], nn.Tanh(), nn.Linear(32, 32), norms[1], nn.Tanh(), nn.Linear(32, 10)]
        return nn.Sequential(nn.Flatten(), *layers).double()


def bias(seed: int, m: int, norm: bool, drawings: int, samples: int = 128) -> Bias:
    """Of an MLP on digits, mini-batches of m."""
    x, labels = (part[:samples] for part in digits(seed).train)
    whole = Data(x.double(), labels)

    def draw(number: int) -> list[object]:
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(1000 * seed + number))
        return [Data(whole.x[chosen], whole.labels[chosen]) for chosen in order.split(m)]

    return gradient_bias(mlp(seed, norm), classification, draw, whole, drawings)


def variance_ratio(seed: int, m: int, samples: int = 65536) -> tuple[float, float]:
    """E[v_B]·m/(m − 1) and E[v_B] over mini-batches of m, over the variance of independent normal values: 1 and 1 − 1/m."""
    x = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    layer = nn.BatchNorm1d(samples // m).double()  # a channel for each mini-batch
    update_bn_stats(layer, [x.view(samples // m, m).T], progress=False)
    assert layer.running_var is not None
    corrected = layer.running_var.mean().item()
    return corrected, corrected * (m - 1) / m


def energy_error(seed: int, m: int) -> float:
    """Of the closed form of the cross-sample energy, against the Jacobian by autograd."""
    x = torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def normalized(x: Tensor) -> Tensor:
        return F.batch_norm(x[:, None], None, None, training=True, eps=NO_EPS)[:, 0]

    jacobian = torch.autograd.functional.jacobian(normalized, x).square()
    expected = 1 - (jacobian.diagonal().sum() / jacobian.sum()).item()
    return abs(cross_sample_energy(normalized(x)) - expected)


def _minibatch_claims(
    seeds: tuple[int, ...], biases: dict[int, Bias], variances: dict[int, tuple[float, float]]
) -> list[Claim]:
    plain = bias(seeds[0], 4, False, 2).relative
    energy = greatest(energy_error(seed, 8) for seed in seeds)
    claims = [
        at_least("bias of the mean mini-batch gradient, batch norm, m = 4 (relative)", biases[4].relative, 0.05),
        at_least("that bias, m = 4 over m = 32: it falls about as 1/m", biases[4].relative / biases[32].relative, 4),
        at_most("that bias without batch norm, m = 4", plain, 1e-12),
        at_most("cross-sample energy of the Jacobian: error of the closed form", energy, 1e-12),
    ]
    for m, (corrected, raw) in variances.items():
        four = 4 * (2 / 65536 / (1 - 1 / m)) ** 0.5  # standard errors
        holds = abs(corrected - 1) <= four
        claims.append(
            Claim(f"E[v]·m/(m−1) over the variance, m = {m}", f"1 ± {four:.3f}", f"{corrected:.4f}; v alone {raw:.4f}", holds)
        )
    return claims


PANELS = [
    ("VGG-like network, digits, learning rate 0.03", "epoch", "training accuracy, training mode"),
    (f"Input of ReLU {WATCHED + 1}, channel 0", "step", "mean over the mini-batch"),
    ("Mean gradient of mini-batches against all samples", "mini-batch size m", "relative bias"),
    ("Variance of mini-batches", "mini-batch size m", "E[v] over the variance"),
]


def _draw(figure: Any, results: dict[str, Result], biases: dict[int, Bias], variances: dict[int, tuple[float, float]]) -> None:
    accuracies, means, bias_axes, variance_axes = panels(figure, PANELS, rows=2)
    for regime, found in results.items():
        accuracies.plot(range(1, len(found.accuracy) + 1), found.accuracy, "o-", color=REGIMES[regime], label=regime)
        if regime != "without batch norm":
            means.plot(found.means[:, 0], color=REGIMES[regime], label=regime, linewidth=1)
    values = [one.relative for one in biases.values()]
    bias_axes.errorbar(list(biases), values, [one.error for one in biases.values()], fmt="o-", color=BLUE, label="measured")
    bias_axes.plot(list(biases), [values[0] * 4 / m for m in biases], color=GRAY, linestyle=":", label="∝ 1/m")
    bias_axes.set_yscale("log")
    for place, (name, color) in enumerate({"times m/(m−1)": BLUE, "as it is": RED}.items()):
        variance_axes.plot(list(variances), [one[place] for one in variances.values()], "o-", color=color, label=name)
    variance_axes.plot(SIZES, [1 - 1 / m for m in SIZES], color=GRAY, linestyle=":", label="1 − 1/m")
    powers_of_two(bias_axes, list(biases))
    powers_of_two(variance_axes, SIZES)
    for axes in (accuracies, means, bias_axes, variance_axes):
        legend(axes)
