"""The picture of scaling: latency of a layer's collective, and efficiency of a ResNet-50 step, by the number of ranks.

Filled points are measured, hollow ones published by others, dashed lines modelled.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .rows import origin

Text = dict[str, str]
COLORS = {"all_reduce": "#00618a", "all_gather": "#d1495b", "all_reduce in a node": "#2a9d8f"}
SCHEMES = {
    "all_reduce": ("syncbn: all_reduce both ways", "#00618a"),
    "all_gather forward": ("all_gather forward, as nn.SyncBatchNorm", "#d1495b"),
    "all_reduce in a node": ("syncbn in groups of a node", "#2a9d8f"),
}
WIDTHS = {"NCCL": 2.2}


def draw_scaling(figure: Figure, latencies: Sequence[Text], efficiencies: Sequence[Text]) -> None:
    """Left latencies, right efficiencies."""
    figure.set_size_inches(16, 7.5)
    left, right = figure.subplots(1, 2)
    _latencies(left, latencies)
    _efficiencies(right, efficiencies)
    told = f"Measured on {origin(latencies)}; what is dashed is a model and was not measured"
    figure.suptitle(told, fontsize=11)


def _latencies(axes: Axes, found: Sequence[Text]) -> None:
    for machine, operation, kind in dict.fromkeys((row["machine"], row["operation"], row["kind"]) for row in found):
        of = [row for row in found if (row["machine"], row["operation"], row["kind"]) == (machine, operation, kind)]
        of.sort(key=lambda row: int(row["ranks"]))
        ranks = [int(row["ranks"]) for row in of]
        middle, low, high = ([float(row[f"microseconds{part}"]) for row in of] for part in ("", "_lower", "_upper"))
        color, width = COLORS[operation], WIDTHS.get(machine, 1.1)
        if kind == "modelled":
            axes.plot(ranks, middle, linestyle=(0, (4, 2)), color=color, linewidth=width)
            continue
        face = color if kind == "measured" else "white"
        axes.vlines(ranks, low, high, color=color, linewidth=1)
        axes.plot(
            ranks, middle, "o" if kind == "measured" else "D", color=color, markerfacecolor=face, markersize=6, linestyle="none"
        )
    _axes(axes)
    axes.set_yscale("log")
    axes.set_ylabel("µs")
    size = next(int(row["bytes"]) for row in found if row["kind"] == "modelled")
    notes = {row["machine"]: row["note"] for row in found if row["kind"] == "modelled"}
    axes.set_title(f"A collective of a layer, {size:,} bytes from each rank", loc="left")
    handles = [_line(color=color, label=operation, linewidth=3) for operation, color in COLORS.items()]
    handles += [
        _line(color="#555555", marker="o", linestyle="none", label="measured here"),
        _line(color="#555555", marker="D", linestyle="none", markerfacecolor="white", label="published, NCCL"),
        *(
            _line(
                color="#555555", linestyle=(0, (4, 2)), linewidth=WIDTHS.get(machine, 1.1), label=f"modelled, {machine}: {note}"
            )
            for machine, note in notes.items()
        ),
    ]
    axes.legend(handles=handles, fontsize=9, frameon=False, loc="upper left")


def _line(**style: Any) -> Line2D:
    return Line2D([], [], **style)


def _efficiencies(axes: Axes, found: Sequence[Text]) -> None:
    """Weak solid, strong dotted: all of it modelled."""
    for scheme, (label, color) in SCHEMES.items():
        for scaling, style in (("weak", (0, (4, 2))), ("strong", (0, (1, 1.5)))):
            of = sorted(
                (int(row["ranks"]), float(row["efficiency"]))
                for row in found
                if row["scheme"] == scheme and row["scaling"] == scaling
            )
            axes.plot(*zip(*of, strict=True), color=color, linestyle=style, linewidth=2, label=f"{label}, {scaling}")
    _axes(axes)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("efficiency")
    row = found[-1]
    images = {one["scaling"]: one["images_per_rank"] for one in found if one["ranks"] == "1"}
    axes.set_title(
        f"Modelled: a ResNet-50 step on NCCL, {row['node_size']} GPUs a node. Weak: {float(images['weak']):g} images a rank; "
        f"strong: {float(images['strong']):g} in all.\n"
        f"Assumed: {float(row['image_microseconds']):g} µs an image, no step below "
        f"{float(row['floor_milliseconds']):g} ms, {float(row['bandwidth_gb_per_second']):g} GB/s, gradients hidden",
        loc="left",
        fontsize=10,
    )
    axes.legend(fontsize=9, frameon=False, loc="lower left")


def _axes(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xlabel("ranks")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
