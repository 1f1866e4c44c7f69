"""The picture of the layer on a GPU, by bytes of the tensor: time over torch.nn.SyncBatchNorm's, and fractions of a copy."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from .draw_layer import COLORS
from .layer_cuda_summary import TARGETS
from .rows import origin

Text = dict[str, str]
VARIANTS = {
    "syncbn": (COLORS["syncbn"], "syncbn, Triton"),
    "syncbn-host": ("#7a4fa3", "the same, launched by C++"),
    "syncbn-aten": (COLORS["syncbn-aten"], "syncbn, ATen kernels"),
    "torch-sync": (COLORS["torch-sync"], "operators of nn.SyncBatchNorm"),
    "torch-sync-unmasked": ("#d9a441", "the same without the mask"),
    "torch": ("#222222", "nn.BatchNorm, local"),
    "torch-inductor": ("#9a9a9a", "nn.BatchNorm, local, torch.compile"),
}
MARKERS = {"contiguous": "o", "channels_last": "s", "rows": "^", "contiguous 3d": "D", "channels_last 3d": "P"}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
TIMES = {
    "chain_over_torch_sync": "a layer of several in a row by the clock, host and waits included",
    "device_over_torch_sync": "by events on the device",
}


def draw_layer_cuda(figure: Figure, recorded: Sequence[Text]) -> None:
    """Above: ratios, where torch-sync was measured; below: forward and backward over the bandwidth of a copy."""
    figure.set_size_inches(15, 10)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for number, (column, told) in enumerate(TIMES.items()):
        axes[0, number].set_yscale("log")
        _points(axes[0, number], [row for row in recorded if row["variant"] != "torch-sync"], column)
        late = [VARIANTS[name][1] for name in host_is_late(recorded)] if column.startswith("device") else []
        title = f"{told}, in which the host is late with: {'; '.join(late)}" if late else told
        axes[0, number].set_title(title, loc="left", fontsize=10)
    for number in range(len(TIMES)):  # once both have all their points, since they share the axis
        _ratios(axes[0, number])
    for number, (part, target) in enumerate(TARGETS.items()):
        _points(axes[1, number], recorded, f"{part}_of_copy")
        axes[1, number].axhline(target, color="#2a9d8f", linewidth=1.2, linestyle=(0, (5, 2)))
        axes[1, number].text(
            0.01,
            target + 0.01,
            f"target {target:.0%}",
            color="#2a7d6f",
            fontsize=9,
            transform=axes[1, number].get_yaxis_transform(),
        )
        axes[1, number].set_ylim(0, max(1.05, axes[1, number].get_ylim()[1]))
        axes[1, number].set_title(f"{part}, on the device from a flushed L2", loc="left", fontsize=10)
        axes[1, number].set_xlabel("bytes of the tensor")
    axes[0, 0].set_ylabel("time over the operators of torch.nn.SyncBatchNorm")
    axes[1, 0].set_ylabel("fraction of the bandwidth of a copy")
    axes[0, 1].legend(handles=_handles(recorded), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    figure.suptitle(
        f"Forward and backward of one layer in a world of {recorded[-1]['ranks']} that communicates nothing\n"
        f"{origin(recorded)}; medians",
        fontsize=11,
    )


def host_is_late(recorded: Sequence[Text]) -> list[str]:
    """The variants of which the device waits in most repetitions of most rows, so that its time is the host's."""
    found = []
    for name in dict.fromkeys(row["variant"] for row in recorded if row["variant"] in VARIANTS):
        ahead = [float(row["host_ahead"]) for row in recorded if row["variant"] == name and row["host_ahead"]]
        if ahead and sum(ahead) < len(ahead) / 2:
            found.append(name)
    return found


def _points(axes: Axes, recorded: Sequence[Text], column: str) -> None:
    """Filled float32, hollow the others."""
    keys = ("variant", "dtype", "layout")
    there = [row for row in recorded if row["variant"] in VARIANTS and row[column] != ""]
    for variant, dtype, layout in dict.fromkeys(tuple(row[key] for key in keys) for row in there):
        of = [row for row in there if tuple(row[key] for key in keys) == (variant, dtype, layout)]
        color, _ = VARIANTS[variant]
        face = color if dtype == "float32" else "white"
        style: dict[str, Any] = {"color": color, "markerfacecolor": face, "markersize": 6, "linestyle": "none", "alpha": 0.85}
        values = [float(row[column]) for row in of]
        axes.plot([float(row["bytes"]) for row in of], values, MARKERS.get(layout, "x"), **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _size(value: float, _: object = None) -> str:
    return next(
        (f"{value / unit:g} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= unit), f"{value:g}"
    )


def _ratios(axes: Axes) -> None:
    """The part below 1 in green."""
    low, high = axes.get_ylim()
    low, high = min(0.4, low), max(2.0, high)
    axes.set_ylim(low, high)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhspan(low, 1, color="#2a9d8f", alpha=0.07)
    shown = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.yaxis.set_minor_formatter(NullFormatter())


def _handles(recorded: Sequence[Text]) -> list[Line2D]:
    """Of what is there: variants by color, layouts by marker, dtypes by face."""
    there = {row["variant"] for row in recorded}
    backends = {row["backend"] for row in recorded if row["variant"] == "torch" and row["backend"]}
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    handles = []
    for name, (color, label) in VARIANTS.items():
        if name in there:
            told = f"{label} ({', '.join(sorted(backends))})" if name == "torch" and backends else label
            handles.append(Line2D([], [], color=color, marker="o", linestyle="none", label=told))
    for layout, marker in MARKERS.items():
        if any(row["layout"] == layout for row in recorded):
            handles.append(Line2D([], [], marker=marker, label=layout, **grey))
    for dtype in dict.fromkeys(row["dtype"] for row in recorded):
        face = "#555555" if dtype == "float32" else "white"
        handles.append(Line2D([], [], marker="o", markerfacecolor=face, label=dtype, **grey))
    return handles
