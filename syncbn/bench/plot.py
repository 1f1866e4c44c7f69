"""`bench plot`: the pictures, from the rows of the CSV files and nothing else.

Requirements: of rows that measure the same, the last counts; rows of one hardware alone; without rows there is no picture, and
that is said; those of a GPU are no failure when they are missing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import rows
from .draw_layer import draw_layer
from .draw_layer_cuda import draw_layer_cuda
from .draw_merge import draw_merge
from .draw_scaling import draw_scaling

Text = dict[str, str]
LAYER = ("variant", "dtype", "layout", "shape", "threads", "device")
LAYER_CUDA = ("variant", "dtype", "layout", "shape", "device")
MERGE = ("variant", "ranks", "channels", "device")
ON_A_GPU = ("layer_cuda", "merge")
LATENCY = ("kind", "machine", "operation", "ranks", "note")
EFFICIENCY = ("scaling", "scheme", "ranks")


def run(options: argparse.Namespace) -> int:
    """Draw what there are rows for; 0 if no picture is missing but those of a GPU."""
    where = rows.directory(options.results)

    def of(name: str, keys: Sequence[str]) -> list[Text]:
        return latest(rows.read(name, where), keys, options.hardware)

    pictures: dict[str, tuple[list[list[Text]], Callable[..., None]]] = {
        "layer": ([of("layer", LAYER)], draw_layer),
        "scaling": ([of("scaling_projection", LATENCY), of("scaling_efficiency", EFFICIENCY)], draw_scaling),
        "layer_cuda": ([of("layer_cuda", LAYER_CUDA)], draw_layer_cuda),
        "merge": ([of("merge", MERGE)], draw_merge),
    }
    missing = []
    for name, (tables, draw) in pictures.items():
        if not all(tables):
            on = " on a GPU" * (name in ON_A_GPU)
            print(f"syncbn bench: no rows in {where} to draw {name}.png from; expected some: record them{on}", file=sys.stderr)
            missing.append(name)
            continue
        figure = Figure(layout="constrained")
        draw(figure, *tables)
        print(f"picture: {save(figure, where / f'{name}.png')}")
    return 0 if set(missing) <= set(ON_A_GPU) else 1


def latest(recorded: Sequence[Text], keys: Sequence[str], hardware: str | None) -> list[Text]:
    """The last row for each key on a hardware, None: that of the last row."""
    if not recorded:
        return []
    hardware = recorded[-1]["hardware"] if hardware is None else hardware
    last: dict[tuple[str, ...], Text] = {}
    for row in recorded:
        if row["hardware"] == hardware:
            key = tuple(row[name] for name in keys)
            last.pop(key, None)
            last[key] = row
    return list(last.values())


def save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path
