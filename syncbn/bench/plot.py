"""`bench plot`: the two pictures, from the rows of the CSV files and nothing else.

Requirements: of rows that measure the same, the last counts; rows of one hardware alone; without rows there is no picture, and
that is said.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import rows
from .draw_layer import draw_layer
from .draw_scaling import draw_scaling

Text = dict[str, str]
LAYER = ("variant", "dtype", "layout", "shape", "threads", "device")
LATENCY = ("kind", "machine", "operation", "ranks", "note")
EFFICIENCY = ("scaling", "scheme", "ranks")


def run(options: argparse.Namespace) -> int:
    """Draw what there are rows for; 0 if both pictures were drawn."""
    where = rows.directory(options.results)

    def of(name: str, keys: Sequence[str]) -> list[Text]:
        return latest(rows.read(name, where), keys, options.hardware)

    pictures: dict[str, tuple[list[list[Text]], Callable[..., None]]] = {
        "layer": ([of("layer", LAYER)], draw_layer),
        "scaling": ([of("scaling_projection", LATENCY), of("scaling_efficiency", EFFICIENCY)], draw_scaling),
    }
    drawn = 0
    for name, (tables, draw) in pictures.items():
        if not all(tables):
            print(f"syncbn bench: no rows in {where} to draw {name}.png from; expected some: record them", file=sys.stderr)
            continue
        figure = Figure(layout="constrained")
        draw(figure, *tables)
        print(f"picture: {save(figure, where / f'{name}.png')}")
        drawn += 1
    return 0 if drawn == len(pictures) else 1


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
