"""Claims on the smoothness of the loss (Santurkar et al. 2018, arXiv:1805.11604, sections 3 and 4).

The VGG-like network on digits, plain SGD with mini-batches of 64 for the landscape, momentum 0.9 for the grid.
"""

import itertools
from typing import Any, NamedTuple

from ..claims import Claim, Outcome, Settings, at_least, at_most
from ..extremes import greatest
from ..landscape import gradient_landscape, hessian_spectrum
from ..networks import Data, batches, classification, digits, vgg
from ..plots import BLUE, RED, legend, panels
from ..training import descend, train, training_accuracy
from . import inequalities

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GAINS = (0.5, 1.0, 2.0)
EPOCH = 22  # mini-batches of 64 in 1437 images
HIGH = 0.9  # training accuracy of a cell that counts

NOTES = [
    'the published "bounds" on gradient and curvature are equalities for ε = 0; with ε > 0 that on the gradient stays a bound, '
    "that on the curvature is violated: take the exact form",
    "the published minimax bound g² − mµ² − λ²⟨∂L/∂y, ŷ⟩² is violated; λ²(‖g‖² − mµ_g² − ⟨g, ŷ⟩²/m) holds, with equality",
    "the lemma on initialization needs ⟨W0, W*⟩ ≥ 0, and affine parameters that are free",
    "maxima over training are compared, at learning rate 0.1: means at small rates favour the network that sits on a plateau",
    "effective β is along one direction; eigenvalues are drawn beside it",
]


Grid = dict[tuple[int, bool, float, float], float]  # accuracies by seed, batch norm, gain, learning rate


class Run(NamedTuple):
    """A training run, measured every few steps."""

    steps: list[int]
    ranges: list[tuple[float, float]]  # least and largest loss along the gradient
    distances: list[float]  # the largest ‖ΔG‖
    betas: list[float]  # effective
    eigenvalues: list[float]  # the Hessian's largest, at some of the steps


def run(settings: Settings) -> Outcome:
    """One process."""
    seeds = settings.seeds[:2] if settings.quick else settings.seeds
    runs = {
        (seed, norm): landscape(seed, norm, 5) for seed in settings.track(seeds, "smoothness: VGG") for norm in (False, True)
    }
    chosen = seeds[:1] if settings.quick else seeds
    cells = list(itertools.product(chosen, (False, True), GAINS, RATES))
    grid = {cell: cell_accuracy(*cell) for cell in settings.track(cells, "smoothness: learning rates")}
    claims = inequalities.claims(settings.seeds, 5 if settings.quick else 60)
    for seed in seeds:
        claims += _landscape_claims(seed, runs[seed, False], runs[seed, True])
    for seed in chosen:
        claims += _grid_claims(seed, grid)

    def draw(figure: Any) -> None:
        _draw(figure, seeds[0], runs[seeds[0], False], runs[seeds[0], True], grid)

    return Outcome(claims, NOTES, draw)


def landscape(seed: int, norm: bool, every: int, lr: float = 0.1, steps: int = 150, spectrum: bool = True) -> Run:
    """Train with plain SGD and look along the gradient every so many steps."""
    model, data = vgg(seed, norm), batches(digits(seed).train, 64, seed)
    found = Run([], [], [], [], [])
    for step in range(steps):
        batch = next(data)
        if step % every == 0:
            seen = gradient_landscape(model, classification, batch, lr)
            found.steps.append(step)
            found.ranges.append((min(seen.losses), greatest(seen.losses)))
            found.distances.append(seen.predictiveness)
            found.betas.append(seen.effective_beta)
            if spectrum and step % (6 * every) == 0:
                found.eigenvalues.append(hessian_spectrum(model, classification, batch, 8).values[0].item())
        descend(model, classification, batch, lr)
    return found


def _landscape_claims(seed: int, plain: Run, normed: Run) -> list[Claim]:
    ranges = [greatest(high - low for low, high in one.ranges) for one in (plain, normed)]
    distances = [sum(one.distances) / len(one.distances) for one in (plain, normed)]
    text = f"VGG, learning rate 0.1, seed {seed}, without batch norm over with: "
    return [
        at_least(text + "largest loss range", ranges[0] / ranges[1], 5),
        at_least(text + "mean ‖ΔG‖", distances[0] / distances[1], 3),
        at_least(text + "largest effective β", greatest(plain.betas) / greatest(normed.betas), 1.5),
    ]


def cell_accuracy(seed: int, norm: bool, gain: float, lr: float) -> float:
    """Training accuracy after three epochs."""
    model = vgg(seed, norm, gain)
    data: Data = digits(seed).train
    train(model, batches(data, 64, seed), 3 * EPOCH, lr)
    return training_accuracy(model, data)


def _grid_claims(seed: int, grid: Grid) -> list[Claim]:
    good = {norm: sum(grid[seed, norm, gain, rate] >= HIGH for gain in GAINS for rate in RATES) for norm in (False, True)}
    text = f"18 learning rates × initializations, seed {seed}: accuracy ≥ {HIGH} after 3 epochs, cells "
    return [at_least(text + "with batch norm", good[True], 12), at_most(text + "without", good[False], 0)]


def _draw(figure: Any, seed: int, plain: Run, normed: Run, grid: Grid) -> None:
    losses, distances, betas, accuracies = panels(figure, PANELS, rows=2)
    for one, color, name in ((plain, RED, "without batch norm"), (normed, BLUE, "with batch norm")):
        low, high = zip(*one.ranges, strict=True)
        losses.fill_between(one.steps, low, high, color=color, alpha=0.5, linewidth=0, label=name)
        distances.plot(one.steps, one.distances, color=color, label=name)
        betas.plot(one.steps, one.betas, color=color, label=f"effective β, {name}")
        some = one.steps[::6][: len(one.eigenvalues)]
        betas.plot(some, one.eigenvalues, "o", color=color, label=f"largest eigenvalue, {name}")
    for norm, color, name in ((False, RED, "without batch norm"), (True, BLUE, "with batch norm")):
        for gain, style in zip(GAINS, (":", "-", "--"), strict=False):
            values = [grid[seed, norm, gain, rate] for rate in RATES]
            accuracies.plot(RATES, values, style, marker="o", color=color, label=name if gain == 1 else None)
    accuracies.set_xscale("log")
    for axes in (losses, distances, betas):
        axes.set_yscale("log")
    for axes in (losses, distances, betas, accuracies):
        legend(axes)


PANELS = [
    ("Loss along the gradient, learning rate 0.1", "step", "loss from η = 0.05 to 0.4"),
    ("Gradient predictiveness", "step", "largest ‖G − ∇L(W − ηG)‖"),
    ("Smoothness", "step", "effective β; largest Hessian eigenvalue"),
    ("Initial weights × 0.5 (dotted), × 1, × 2 (dashed)", "learning rate", "training accuracy after 3 epochs"),
]
