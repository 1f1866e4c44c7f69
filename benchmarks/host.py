"""What a step of small tensors waits for: by Python, and by C++ (`python -m syncbn build`); the GPU's kernels without a GPU.

    python benchmarks/host.py [--repeats 31]

Eight layers in a row, forward and backward, of tensors of 8 kB in the memory of the CPU. Of a GPU's kernels ("python", "c++") a
launch is a function that does nothing: what Triton and the driver take for each of the four is not in the times, nor what
choosing and asking a device takes. The CPU's ("cpu, python", "cpu, c++") compute, and so does torch's local batch norm: a ratio
over it says nothing of a GPU. Alone, and in a world of eight ranks without communication. Prints, and appends rows to
results/host.csv.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from syncbn import kernels
from syncbn.bench import peers, rows
from syncbn.bench.fake_world import fake_world
from syncbn.bench.timing import interleaved, microseconds, quartiles, ratio
from syncbn.kernels import cpu, extension, host, triton

LAYERS, STEPS = 8, 50
SHAPE = (2, 16, 8, 8)


def nothing(*given: object) -> None:
    """In place of a launch."""


class Launchers(dict):
    """Of every program, compiled."""

    def get(self, key: object, default: object = None) -> triton.Launcher:
        hash(key)  # as to find it
        return LAUNCHER


LAUNCHER = triton.Launcher(None, nothing, 0, None)


def row_of(layer: nn.Module, compute: object, library: object = None):
    """Some steps of layers in a row by these kernels, and C++ of a library, if there is one."""
    made = nn.Sequential(*(layer() for _ in range(LAYERS)))
    leaf, dy = torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE)

    def run() -> None:
        picked = mock.patch.object(kernels, "pick", lambda x: compute if compute.takes(x) else None)
        with picked, mock.patch.object(extension, "library", library):
            for _ in range(STEPS):
                made(leaf).backward(dy)
                made.zero_grad()
                leaf.grad = None

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    triton._launchers, triton.INTERPRETED = Launchers(), True
    with tempfile.TemporaryDirectory() as directory:
        library = extension.load(extension.build(Path(directory) / extension.LIBRARY.name))
    host.use(library, launch=lambda *given: LAUNCHER)
    measured = []
    for ranks in (1, 8):
        with fake_world(ranks):
            runs = {
                "torch": row_of(lambda: nn.BatchNorm2d(SHAPE[1]), None),
                "python": row_of(lambda: peers.forced(nn.BatchNorm2d(SHAPE[1])), triton),
                "c++": row_of(lambda: peers.forced(nn.BatchNorm2d(SHAPE[1])), host, library),
                "cpu, python": row_of(lambda: peers.forced(nn.BatchNorm2d(SHAPE[1])), cpu),
                "cpu, c++": row_of(lambda: peers.forced(nn.BatchNorm2d(SHAPE[1])), cpu, library),
            }
            taken = interleaved(runs, options.repeats, torch.device("cpu"), warm_up=2)
        for name, times in taken.items():
            each = [seconds / (STEPS * LAYERS) for seconds in times]
            by_python = "cpu, python" if name.startswith("cpu") else "python"
            over = {"torch": ratio(times, taken["torch"]).median, "python": ratio(times, taken[by_python]).median}
            row = {"variant": name, "ranks": ranks, "shape": "x".join(map(str, SHAPE)), **microseconds(quartiles(each))}
            measured.append(row | {f"over_{base}": round(value, 3) for base, value in over.items()})
            print(
                f"{ranks} ranks, {name:11}: {1e6 * statistics.median(each):6.1f} microseconds a layer, {over['torch']:.2f} of "
                f"torch's local batch norm, {over['python']:.2f} of ours by Python"
            )
    print(rows.said(rows.append("host", measured)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
