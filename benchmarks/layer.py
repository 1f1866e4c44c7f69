"""What the layer costs on one process: forward and backward, forced to synchronize with itself, over torch's own batch norm.

    python benchmarks/layer.py [--threads 2] [--repeats 15]

The nine ResNet-50 shapes at batch 8, contiguous and channels_last, and two of BatchNorm1d; float32; interleaved runs. Prints
the ratio of medians and appends rows to results/layer.csv. Refuses to report where outputs or gradients do not agree.
"""

import argparse
import copy
import math
import statistics
import time

import rows
import torch
from torch import nn

import syncbn

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


def cases() -> list[tuple[str, nn.Module, torch.Tensor]]:
    """(layout, torch's layer, input)."""
    made: list[tuple[str, nn.Module, torch.Tensor]] = []
    for layout, memory in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        for channels, size in RESNET50:
            x = torch.randn(8, channels, size, size).contiguous(memory_format=memory)
            made.append((layout, nn.BatchNorm2d(channels), x))
    made += [("rows", nn.BatchNorm1d(channels), torch.randn(n, channels)) for n, channels in ((4096, 2048), (256, 64))]
    return made


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Seconds of a forward and backward."""
    x.grad = None
    start = time.perf_counter()
    layer(x).backward(dy)
    return time.perf_counter() - start


def agree(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> bool:
    """Whether outputs and input gradients are equal to the error of torch's channels_last kernel."""
    results = []
    for layer in (ours, theirs):
        x.grad = None
        y = layer(x)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = []
    for layout, theirs, x in cases():
        ours = syncbn.convert(copy.deepcopy(theirs))
        ours._force_sync = True
        x.requires_grad_()
        dy = torch.randn_like(x)
        if not agree(ours, theirs, x, dy):
            raise SystemExit(f"{layout} {tuple(x.shape)}: results differ; nothing is reported")
        taken = [[step(layer, x, dy) * 1e6 for layer in (ours, theirs)] for _ in range(options.repeats)]
        mine, torchs = (statistics.median(column) for column in zip(*taken, strict=True))
        shape = "x".join(map(str, x.shape))
        measured.append(
            {
                "layout": layout,
                "shape": shape,
                "threads": options.threads,
                "microseconds_syncbn": round(mine),
                "microseconds_torch": round(torchs),
                "ratio": round(mine / torchs, 2),
                "repeats": options.repeats,
            }
        )
        print(f"{layout:13} {shape:15} {mine:8.0f} µs, torch {torchs:8.0f} µs: {mine / torchs:.2f}")
    for layout in ("contiguous", "channels_last"):
        ratios = [row["microseconds_syncbn"] / row["microseconds_torch"] for row in measured if row["layout"] == layout]
        print(f"{layout}: geometric mean {math.exp(statistics.fmean(map(math.log, ratios))):.2f}")
    print(f"rows appended to {rows.append('layer', measured)}")


if __name__ == "__main__":
    main()
