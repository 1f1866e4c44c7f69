"""Population statistics: ours, torch's `swa_utils.update_bn` and fvcore's `update_bn_stats`, on ranks with shares of the data.

    python benchmarks/population.py [--world-size 4] [--batch-size 32] [--seeds 5] [--timeout 1800]
    (fvcore: pip install fvcore)

Trains a small network on scikit-learn's digits (one process, or rather every rank the same), then lets the ranks estimate the
population statistics in each way, every rank from its share of the training images: 1, 2, 3, ... parts of each mini-batch.
Peers synchronize nothing on the CPU, so their layers are nn.BatchNorm2d and every rank ends with statistics of its own.

Per way: the error against one process that sees the mini-batches whole (float64, E[μ_B] and E[m/(m − 1)·v_B]), as the largest
difference of a mean in standard deviations and of a variance in relative terms; how far ranks are from rank 0, alike; and the
accuracy on held-out images, of the worst and the best rank. Appends rows to results/population.csv.
"""

import argparse
import copy
import importlib.util
import logging
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import syncbn
from syncbn.bench import processes, rows
from syncbn.options import positive, whole

TRAINED = 1437  # images; the others are held out
State = dict[str, Tensor]


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def trained(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(TRAINED).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def definition(model: nn.Module, batches: list[Tensor]) -> State:
    """Mean and unbiased variance of each mini-batch in float64, weighted by the number of its values."""
    model = copy.deepcopy(model).double().train()
    sums: dict[str, list[Any]] = {name: [0, 0, 0] for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}

    def see(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            values = args[0].transpose(0, 1).flatten(1)
            m = values.shape[1]
            for place, term in enumerate((m * values.mean(1), m * values.var(1), m)):
                sums[name][place] += term

        return hook

    for name in sums:
        model.get_submodule(name).register_forward_hook(see(name))
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    return {f"{n}.running_mean": a / m for n, (a, b, m) in sums.items()} | {
        f"{n}.running_var": b / m for n, (a, b, m) in sums.items()
    }


def running(model: nn.Module) -> State:
    return {name: value.double() for name, value in model.named_buffers() if value.dim()}


def off(state: State, expected: State) -> float:
    """The largest difference of a mean in standard deviations, or of a variance in relative terms."""
    worst = 0.0
    for name, value in expected.items():
        unit = expected[name.replace("running_mean", "running_var")].sqrt() if "running_mean" in name else value
        worst = max(worst, ((state[name] - value) / unit).abs().max().item())
    return worst


def ways(shares: list[Tensor]) -> dict[str, Callable[[nn.Module], Any]]:
    import fvcore.nn.precise_bn as fvcore

    return {
        "running average of the training": lambda model: None,
        "torch.optim.swa_utils.update_bn": lambda model: update_bn(shares, model),
        "fvcore update_bn_stats": lambda model: fvcore.update_bn_stats(model.train(), shares, len(shares)),
        "syncbn.update_bn_stats": lambda model: syncbn.update_bn_stats(syncbn.convert(model), shares, progress=False),
        "syncbn.update_bn_stats, pooled": lambda model: syncbn.update_bn_stats(
            syncbn.convert(model), shares, pooled=True, progress=False
        ),
    }


def measure(rank: int, world_size: int, batch_size: int, seeds: int) -> dict[str, list[tuple[float, float, list[float]]]]:
    """For each way and seed: the error, the disagreement and the accuracies of the ranks."""
    logging.disable(logging.INFO)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    found: dict[str, list[tuple[float, float, list[float]]]] = {}
    for seed in range(seeds):
        model = trained(images, labels, batch_size, seed)
        batches = list(images[:TRAINED].split(batch_size))
        parts = world_size * (world_size + 1) // 2
        mine = slice(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2)
        shares = [torch.cat(batch.tensor_split(parts)[mine]) for batch in batches]
        expected = definition(model, batches)
        for name, estimate in ways(shares).items():
            copied = copy.deepcopy(model)
            estimate(copied)
            with torch.no_grad():
                right = (copied.eval()(images[TRAINED:]).argmax(1) == labels[TRAINED:]).double().mean().item()
            states: list[Any] = [None] * world_size
            dist.all_gather_object(states, (running(copied), right))
            error = max(off(state, expected) for state, _ in states)
            apart = max(off(state, states[0][0]) for state, _ in states)
            found.setdefault(name, []).append((error, apart, [accuracy for _, accuracy in states]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=whole(1), default=4)
    parser.add_argument("--batch-size", type=whole(1), default=32, help="images of all ranks in a mini-batch")
    parser.add_argument("--seeds", type=whole(1), default=5)
    parser.add_argument("--timeout", type=positive, default=1800.0, help="seconds")
    options = parser.parse_args()
    if importlib.util.find_spec("fvcore") is None:
        print("fvcore not installed; expected what ours is compared with: pip install fvcore", file=sys.stderr)
        return 1
    arguments = {"batch_size": options.batch_size, "seeds": options.seeds}
    try:
        answers = processes.run("population:measure", arguments, options.world_size, options.timeout)
    except processes.ProcessError as error:
        print(f"nothing is reported: {error}", file=sys.stderr)
        return 1
    measured = []
    for name, runs in answers[0].items():
        errors, aparts, accuracies = zip(*runs, strict=True)
        measured.append(
            {
                "way": name,
                "world_size": options.world_size,
                "batch_size": options.batch_size,
                "seeds": options.seeds,
                "error_median": f"{statistics.median(errors):.2g}",
                "error_max": f"{max(errors):.2g}",
                "between_ranks_max": f"{max(aparts):.2g}",
                "accuracy_mean_of_worst_rank": f"{statistics.mean(map(min, accuracies)):.4f}",
                "accuracy_mean_of_best_rank": f"{statistics.mean(map(max, accuracies)):.4f}",
            }
        )
        row = measured[-1]
        print(
            f"{name:32}  error {row['error_median']:>7} (max {row['error_max']:>7})  "
            f"between ranks {row['between_ranks_max']:>7}  "
            f"accuracy {row['accuracy_mean_of_worst_rank']} to {row['accuracy_mean_of_best_rank']}"
        )
    print(rows.said(rows.append("population", measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
