"""What every process of the demo runs: train a small residual network, and record every step.

Requirements
    - started as a script, so that without the mode "syncbn" nothing of syncbn is imported: the others are torch alone, with its
      nn.BatchNorm2d. The one line that uses syncbn stands in `build`;
    - the same program in every mode: a seed gives the same initial network and the same global batches on any number of
      processes, each of which takes its contiguous share;
    - the objective is the mean loss of the global batch, for any shares;
    - smooth: with ReLU, rounding now and then decides whether an activation near zero passes its gradient, and where an image
      is blank all of its positions have that activation. Such a step moves parameters by 1e-3; SiLU keeps it at rounding;
    - no process outlives the demo.
"""

import argparse
import inspect
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

NAMES = {"whole": "(a) whole batch", "local": "(b) local", "syncbn": "(c) syncbn"}

LEARNING_RATE = 0.01
MOMENTUM = 0.9


class Data(NamedTuple):
    x: Tensor  # (N, 1, 8, 8) float32 from 0 to 1
    labels: Tensor  # (N,) int64
    held_out: Tensor  # (M, 1, 8, 8)
    held_out_labels: Tensor  # (M,)


class Residual(nn.Module):
    """Two 3×3 convolutions, each with batch norm, around which the input passes; a stride halves height and width."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.shortcut(x))


def network() -> nn.Sequential:
    """(N, 1, 8, 8) images → (N, 10) logits, 9 batch norm layers, each of which sees 4 values per image and channel or more."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        Residual(16, 16),  # 8 × 8
        Residual(16, 32, stride=2),  # 4 × 4
        Residual(32, 48, stride=2),  # 2 × 2
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def build(mode: str, seed: int) -> DistributedDataParallel:
    """The network of the seed, data-parallel; its buffers stay each rank's own."""
    torch.manual_seed(seed)
    model = network()
    if mode == "syncbn":
        sys.path[0] = str(Path(__file__).parents[2])  # in place of this script's directory
        import syncbn

        syncbn.convert(model)
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        return DistributedDataParallel(model, forward_sync_buffers=False)
    return DistributedDataParallel(model, broadcast_buffers=False)  # its name in older versions of torch


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The sample numbers of each step's global batch: every epoch in another order, without its incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(samples, generator=generator).split(size) for _ in itertools.count())
    return itertools.islice((batch for epoch in epochs for batch in epoch if len(batch) == size), steps)


class Recorder:
    """Writes each step to files of `directory`, so that memory does not grow with the number of steps.

    loss-<rank>.npy       (steps,)    the sum of the losses of the rank's samples, float64
    running-<rank>.npy    (steps, R)  all running means and variances of the rank after the step, float32
    parameters.npy        (steps, P)  all parameters of rank 0 after the step, float32
    """

    def __init__(self, directory: Path, model: nn.Module, steps: int, rank: int) -> None:
        self.parameters = list(model.parameters()) if rank == 0 else []
        self.running = [buffer for name, buffer in model.named_buffers() if "running_" in name]
        self.files = {"loss": _file(directory / f"loss-{rank}.npy", np.float64, steps)}
        self.files["running"] = _file(directory / f"running-{rank}.npy", np.float32, steps, self.running)
        if self.parameters:
            self.files["parameters"] = _file(directory / "parameters.npy", np.float32, steps, self.parameters)

    def write(self, step: int, losses: Tensor) -> None:
        self.files["loss"][step] = losses.detach().double().sum().item()
        self.files["running"][step] = _flat(self.running)
        if self.parameters:
            self.files["parameters"][step] = _flat(self.parameters)


def _file(path: Path, dtype: type, steps: int, tensors: Sequence[Tensor] | None = None) -> np.memmap:
    shape = (steps,) if tensors is None else (steps, sum(tensor.numel() for tensor in tensors))
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def load(path: Path) -> Data:
    with np.load(path) as data:
        return Data(*(torch.from_numpy(data[name]) for name in Data._fields))


def train(mode: str, data: Data, options: argparse.Namespace) -> None:
    """Train in a mode, and record it in the directory of its name; rank 0 shows progress."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    directory = options.directory / mode
    model = build(mode, options.seed)
    recorder = Recorder(directory, model.module, options.steps, rank)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    steps = batches(len(data.x), options.global_batch, options.steps, options.seed)
    # On a terminal only; elsewhere the demo itself says what runs.
    bar = tqdm(steps, NAMES[mode], options.steps, unit=" steps", disable=None if rank == 0 else True, dynamic_ncols=True)
    start = time.perf_counter()
    for step, batch in enumerate(bar):
        share = batch.tensor_split(size)[rank]
        losses = F.cross_entropy(model(data.x[share]), data.labels[share], reduction="none")
        optimizer.zero_grad()
        # DistributedDataParallel averages gradients over the ranks; so these become those of the global mean.
        (losses.sum() * (size / len(batch))).backward()
        optimizer.step()
        recorder.write(step, losses)
    seconds = time.perf_counter() - start
    if rank == 0:
        summary = {"accuracy": accuracy(model.module, data), "seconds": seconds, "imported_syncbn": "syncbn" in sys.modules}
        (directory / "summary.json").write_text(json.dumps(summary))


def accuracy(model: nn.Module, data: Data) -> float:
    """The share of the held-out images that the network, by its running statistics, labels rightly."""
    model.eval()
    with torch.no_grad():
        return (model(data.held_out).argmax(1) == data.held_out_labels).double().mean().item()


def leave_with_the_demo() -> None:
    """End this process when the other end of standard input closes: the demo is gone, or wants it gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    leave_with_the_demo()
    tqdm.set_lock(threading.RLock())  # that between processes, of which none shares a bar, would be missed at os._exit
    parser = argparse.ArgumentParser(description="One process of `python -m syncbn demo`, which starts it.")
    parser.add_argument("--modes", nargs="+", choices=list(NAMES), required=True, help="one after the other")
    parser.add_argument("--directory", type=Path, required=True, help="holds data.npz and, by mode, what is recorded")
    for name in ("--global-batch", "--steps", "--seed"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        data = load(options.directory / "data.npz")
        for mode in options.modes:
            train(mode, data, options)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # taking the interpreter down takes a second, and nothing is left to write
