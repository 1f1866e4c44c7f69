"""The named cases of the layer benchmark.

Layouts: contiguous and channels_last of (N, C, H, W), "rows" (N, C), both of (N, C, D, H, W).
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .run import DTYPES, UsageError

CPU = torch.device("cpu")
RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
ROWS = [(4096, 2048), (256, 64)]
VOLUMES = [(2, 64, 8, 56, 56), (2, 128, 8, 28, 28), (2, 512, 4, 7, 7)]
IMAGES = 8
QUICK = [(64, 56), (256, 14), (512, 7)]  # also those that torch.compile is run on
# On a GPU
BATCHES = (2, 32, 128)
DETECTION = [(64, 400, 672), (256, 200, 336), (512, 100, 168), (1024, 50, 84), (2048, 25, 42)]  # ResNet-50, 800×1344 pixels
ODD = [(32, 3, 224, 224), (32, 48, 56, 56), (32, 1000, 14, 14)]
GPU_ROWS = [*ROWS, (4096, 8192), (4096, 1000)]
GPU_VOLUMES = [*VOLUMES, (8, 64, 16, 112, 112)]
# What variants under torch.compile, which take long, are run on, by the batch.
COMPILED = {IMAGES: (torch.float32,), 32: (torch.float32, torch.bfloat16)}
GPU_DTYPES = DTYPES[:2]
SMALL = 2**19  # values; what is smaller is repeated more often


class Case(NamedTuple):
    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    threads: int

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def columns(self, device: torch.device) -> dict[str, object]:
        """Those of a row."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "layout": self.layout, "shape": self.name, "threads": self.threads, "device": device.type}

    @property
    def by_compiler(self) -> bool:
        """Whether the variants under torch.compile are run on it."""
        return self.dtype in COMPILED.get(self.shape[0], ()) and len(self.shape) == 4 and self.shape[1:3] in QUICK

    @property
    def small(self) -> bool:
        return torch.Size(self.shape).numel() < SMALL

    def layer(self) -> nn.Module:
        """Torch's, with weights and biases that are not the identity."""
        kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(self.shape)]
        made = kind(self.shape[1])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            made.weight.uniform_(0.5, 1.5, generator=generator)
            made.bias.normal_(generator=generator)
        return made

    def tensors(self, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """x of mean 1/2 and dy of mean 0, both of standard deviation 1."""
        generator = torch.Generator(device).manual_seed(0)
        x, dy = (torch.randn(self.shape, generator=generator, device=device) for _ in range(2))
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory = formats[len(self.shape)] if self.layout.startswith("channels_last") else torch.contiguous_format
        x += 0.5
        return x.to(self.dtype, memory_format=memory), dy.to(self.dtype, memory_format=memory)


def shapes(quick: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(layout, shape) of every case."""
    for layout in ("contiguous", "channels_last"):
        for channels, size in QUICK if quick else RESNET50:
            yield layout, (IMAGES, channels, size, size)
    if quick:
        return
    for shape in ROWS:
        yield "rows", shape
    for volume in VOLUMES:
        yield "contiguous 3d", volume
        yield "channels_last 3d", volume


def gpu_shapes(quick: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(layout, shape) of every case on a GPU."""
    for layout in ("contiguous", "channels_last"):
        for batch in (32,) if quick else BATCHES:
            for channels, size in QUICK if quick else RESNET50:
                yield layout, (batch, channels, size, size)
        if quick:
            continue
        for shape in DETECTION:
            yield layout, (2, *shape)
        for odd in ODD:
            yield layout, odd
        for volume in GPU_VOLUMES:
            yield f"{layout} 3d", volume
    for rows in GPU_ROWS[:1] if quick else GPU_ROWS:
        yield "rows", rows


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases of the command's options, threads outermost; --shapes and --layouts keep some of them.

    Raises:
        UsageError: they keep none, or a shape is of no case.
    """
    on_cpu = options.device == "cpu"
    made = [
        Case(layout, shape, getattr(torch, dtype), threads)
        for threads in (options.threads if on_cpu else [torch.get_num_threads()])
        for dtype in options.dtypes or (DTYPES if on_cpu else GPU_DTYPES)
        for layout, shape in (shapes if on_cpu else gpu_shapes)(options.quick)
    ]
    names = list(dict.fromkeys(case.name for case in made))
    unknown = [name for name in options.shapes or () if name not in names]
    if unknown:
        raise UsageError(f"given --shapes {' '.join(unknown)}; expected some of {', '.join(names)}")
    kept = [case for case in made if case.name in (options.shapes or names)]
    found = [case for case in kept if not options.layouts or case.layout in options.layouts]
    if not found:
        given = f"--shapes {' '.join(options.shapes or names)} and --layouts {' '.join(options.layouts)}"
        raise UsageError(f"given {given}, which no case has both; expected some that one has")
    return found
