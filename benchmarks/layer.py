"""What the layer costs on one process: forward and backward, forced to synchronize with itself, over torch's own batch norm.

    python benchmarks/layer.py [--threads 1 2] [--kernels compiled aten] [--dtypes float32 bfloat16 float16] [--repeats 15]

The nine ResNet-50 shapes at batch 8, contiguous and channels_last, two of BatchNorm1d and three of BatchNorm3d; interleaved
runs of ours with each kind of kernels and of torch's. Prints the ratio of medians and appends rows to results/layer.csv.
Refuses to report where outputs or gradients do not agree.
"""

import argparse
import contextlib
import copy
import math
import os
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import rows
import torch
from torch import Tensor, nn

import syncbn
from syncbn import kernels

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
ROWS = [(4096, 2048), (256, 64)]
VOLUMES = [(2, 64, 8, 56, 56), (2, 128, 8, 28, 28), (2, 512, 4, 7, 7)]
# What outputs and input gradients may differ by, in units of their largest value: the error of torch's channels_last kernel in
# float32, a few roundings of the others.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def cases(dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(layout, torch's layer, input)."""
    for layout in ("contiguous", "channels_last"):
        memory = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
        for channels, size in RESNET50:
            x = torch.randn(8, channels, size, size).to(dtype, memory_format=memory)
            yield layout, nn.BatchNorm2d(channels), x
    for n, channels in ROWS:
        yield "rows", nn.BatchNorm1d(channels), torch.randn(n, channels, dtype=dtype)
    for shape in VOLUMES:
        yield "contiguous 3d", nn.BatchNorm3d(shape[1]), torch.randn(shape, dtype=dtype)
        x = torch.randn(shape).to(dtype, memory_format=torch.channels_last_3d)
        yield "channels_last 3d", nn.BatchNorm3d(shape[1]), x


@contextlib.contextmanager
def using(kind: str) -> Iterator[None]:
    """Take the compiled kernels or, as where they were not built, those of ATen; "torch" changes nothing."""
    hidden = mock.patch.object(kernels, "compiled", return_value=None) if kind == "aten" else contextlib.nullcontext()
    with hidden:
        yield


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Microseconds of a forward and backward."""
    x.grad = None
    start = time.perf_counter()
    layer(x).backward(dy)
    return (time.perf_counter() - start) * 1e6


def agree(layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> bool:
    """Whether outputs and input gradients of all layers are torch's."""
    results = {}
    for kind, layer in layers.items():
        x.grad = None
        with using(kind):
            y = layer(x)
            y.backward(dy)
        results[kind] = (y.detach().double(), x.grad.double())
    return all(
        (mine - torchs).abs().max() <= ALLOWED[x.dtype] * torchs.abs().max()
        for result in results.values()
        for mine, torchs in zip(result, results["torch"], strict=True)
    )


def measure(layout: str, theirs: nn.Module, x: Tensor, kinds: list[str], repeats: int) -> list[dict[str, object]]:
    """A row for each kind of kernels, each with the time of torch's layer in the same run."""
    x.requires_grad_()
    dy = torch.randn_like(x)
    layers = {"torch": theirs}
    for kind in kinds:
        layers[kind] = syncbn.convert(copy.deepcopy(theirs))
        layers[kind]._force_sync = True
    if not agree(layers, x, dy):
        raise SystemExit(f"{x.dtype} {layout} {tuple(x.shape)}: results differ; nothing is reported")
    taken: dict[str, list[float]] = {kind: [] for kind in layers}
    for _ in range(repeats):
        for kind, layer in layers.items():
            with using(kind):
                taken[kind].append(step(layer, x, dy))
    medians = {kind: statistics.median(times) for kind, times in taken.items()}
    return [
        {
            "kernels": kind,
            "dtype": str(x.dtype).removeprefix("torch."),
            "layout": layout,
            "shape": "x".join(map(str, x.shape)),
            "threads": torch.get_num_threads(),
            "microseconds_syncbn": round(medians[kind]),
            "microseconds_torch": round(medians["torch"]),
            "ratio": round(medians[kind] / medians["torch"], 2),
            "repeats": repeats,
        }
        for kind in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--kernels", nargs="+", choices=["compiled", "aten"], default=["compiled", "aten"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if "compiled" in options.kernels and kernels.compiled() is None:
        raise SystemExit("the compiled kernels are not there; nothing is reported")
    measured = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for layout, theirs, x in cases(getattr(torch, dtype)):
                for row in measure(layout, theirs, x, options.kernels, options.repeats):
                    measured.append(row)
                    print(*row.values(), sep="\t", flush=True)
    for key in dict.fromkeys((row["kernels"], row["dtype"], row["layout"], row["threads"]) for row in measured):
        ratios = [r["ratio"] for r in measured if (r["kernels"], r["dtype"], r["layout"], r["threads"]) == key]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{key[0]}, {key[1]}, {key[2]}, {key[3]} threads: geometric mean {mean:.2f}, largest {max(ratios):.2f}")
    print(f"rows appended to {rows.append('layer', measured)}")


if __name__ == "__main__":
    main()
