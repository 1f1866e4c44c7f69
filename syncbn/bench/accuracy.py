"""`bench accuracy`: how far each output of a layer is from float64, by mean/std of the channels.

Requirements
    - every variant sees the same float32 values, and the reference is the definition, in two passes, on those very values;
    - at mean/std 1 everybody passes the equality check, or nothing is reported; past it errors are shown, whatever they are.
"""

import argparse
import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..doctor.finding import table
from . import agreement, processes, rows
from .agreement import Outputs
from .peers import outputs_of, runnable
from .rows import Row
from .run import UsageError

RATIOS = tuple(10.0**power for power in range(7))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def run(options: argparse.Namespace) -> int:
    """Measure, print, append rows; the exit status."""
    device = torch.device(options.device)
    variants = runnable(options.variants, device)
    shape = (options.images, options.channels, options.size, options.size)
    if options.images * options.size**2 == 1:
        raise UsageError("given --images 1 and --size 1, one value a channel; expected more of one, for a variance")
    measured: list[Row] = []
    with processes.alone(device):
        for ratio in tqdm(RATIOS, "accuracy", unit=" ratios", disable=None, dynamic_ncols=True):
            for layout in LAYOUTS:
                measured += measure(variants, shape, layout, ratio, device)
            rows.require("accuracy", measured, options.results)
    print(shown(measured))
    print(rows.said(rows.append("accuracy", measured, options.results, options.device)))
    return 0


def measure(variants: Sequence[str], shape: Sequence[int], layout: str, ratio: float, device: torch.device) -> list[Row]:
    """A row for each variant: the largest error of each output, relative to its largest value.

    Raises:
        DisagreementError: at mean/std 1 one of them is not batch norm; nothing is reported.
    """
    layer, x, dy = given(shape, layout, ratio, device)
    wanted = agreement.expected(layer, x, dy)
    found = []
    for name in variants:
        run = functools.partial(outputs_of, name, x, dy)
        if ratio == 1:
            errors = agreement.require(f"{name}, {layout}, mean/std 1", run, layer, wanted, torch.float32)
        else:
            errors = agreement.errors(run(copy.deepcopy(layer)), wanted)
        found.append(
            {
                "variant": name,
                "layout": layout,
                "shape": "x".join(map(str, shape)),
                "device": device.type,
                "mean_over_std": f"{ratio:g}",
                **{f"error_{tensor}": f"{error:.1e}" for tensor, error in errors.items()},
            }
        )
    return found


def given(shape: Sequence[int], layout: str, ratio: float, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, x of mean/std `ratio`, dy of mean 0.3 and std 1."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(*shape, generator=generator, dtype=torch.float64) + ratio).float()
    dy = torch.randn(*shape, generator=generator) + 0.3
    x, dy = (tensor.to(device).contiguous(memory_format=LAYOUTS[layout]) for tensor in (x, dy))
    return nn.BatchNorm2d(shape[1]).to(device), x, dy


def shown(measured: Sequence[Row]) -> str:
    """By mean/std."""
    columns = ["mean_over_std", "variant", "layout", *(f"error_{tensor}" for tensor in Outputs._fields)]
    heading = ("mean/std", "variant", "layout", *Outputs._fields)
    return (
        table([heading, *([row[name] for name in columns] for row in measured)])
        + "\n\nlargest error over the largest value, float32 input, against float64"
    )
