"""The picture of the layer: time over torch's local batch norm, by shape and layout; below 1 is won, above it lost."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .rows import origin

Text = dict[str, str]
COLORS = {
    "syncbn": "#00618a",
    "syncbn-aten": "#6ab0d2",
    "syncbn-inductor": "#2a9d8f",
    "torch-inductor": "#444444",
    "torch-sync": "#8a5a00",
    "plain": "#d1495b",
    "plain-inductor": "#eda29b",
    "memory": "#bbbbbb",
}
DTYPE_COLORS = {"float32": "#00618a", "bfloat16": "#e09f3e", "float16": "#7b2d8b"}
NAMES = {
    "syncbn": "syncbn, compiled kernels",
    "syncbn-aten": "syncbn, ATen kernels",
    "syncbn-inductor": "syncbn, torch.compile",
    "torch-inductor": "nn.BatchNorm, torch.compile",
    "torch-sync": "operators of nn.SyncBatchNorm",
    "plain": "plain autograd layer",
    "plain-inductor": "plain, torch.compile",
    "memory": "as many passes over memory",
}
GROUPS = {
    "contiguous": ["contiguous"],
    "channels_last": ["channels_last"],
    "(N, C) and 3-D": ["rows", "contiguous 3d", "channels_last 3d"],
}
TICKS = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32]


def draw_layer(figure: Figure, recorded: Sequence[Text]) -> None:
    """Above: every variant in float32 on one thread; below: syncbn by dtype, one thread filled, more of them hollow."""
    figure.set_size_inches(16, 9)
    axes = figure.subplots(2, 3, sharey="row", width_ratios=[9, 9, 8])
    threads = sorted({int(row["threads"]) for row in recorded})
    fewest = f"{threads[0]} thread" + "s" * (threads[0] > 1)
    rest = f", {threads[-1]} hollow" if len(threads) > 1 else ""
    drawn: tuple[list[float], list[float]] = [], []
    for column, (title, layouts) in enumerate(GROUPS.items()):
        of = [row for row in recorded if row["layout"] in layouts and row["variant"] != "torch"]
        above = [row for row in of if row["dtype"] == "float32" and int(row["threads"]) == threads[0]]
        below = [row for row in of if row["variant"] == "syncbn"]
        by_variant = {name: [row for row in above if row["variant"] == name] for name in COLORS}
        by_dtype = {name: [row for row in below if row["dtype"] == name] for name in DTYPE_COLORS}
        _panel(axes[0, column], of, by_variant, COLORS, threads[0])
        _panel(axes[1, column], of, by_dtype, DTYPE_COLORS, threads[0])
        for ratios, rows in zip(drawn, (above, below), strict=True):
            ratios += [float(row["ratio"]) for row in rows]
        axes[0, column].set_title(title, loc="left")
    told = (f"float32, {fewest}", f"syncbn, compiled kernels,\nby dtype, {fewest} filled{rest}")
    for row, what in enumerate(told):
        _share_limits(list(axes[row]), drawn[row])
        axes[row, 0].set_ylabel("time over torch's local batch norm")
        axes[row, 0].text(0.01, 0.02, "faster than torch", transform=axes[row, 0].transAxes, fontsize=9, color="#2a7d6f")
        handles = {label: handle for each in axes[row] for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 9}
        axes[row, 2].legend(handles.values(), handles.keys(), title=what, alignment="left", **beside)
    figure.suptitle(
        f"Forward and backward of one layer, synchronizing with itself: below 1 it is faster than torch's layer, which "
        f"synchronizes nothing\n{origin(recorded)}; bars: quartiles",
        fontsize=11,
    )


def _panel(axes: Axes, of: Sequence[Text], series: dict[str, list[Text]], colors: dict[str, str], fewest: int) -> None:
    """Points by shape, each with the quartiles of the ratio."""
    places = {place: number for number, place in enumerate(dict.fromkeys(_place(row) for row in of))}
    axes.axhline(1, color="black", linewidth=0.8)
    for number, (name, rows) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.6 / len(series)
        for row in rows:
            x = places[_place(row)] + shift
            ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_lower_quartile", "ratio_upper_quartile"))
            axes.plot([x, x], [low, high], color=colors[name], linewidth=1, alpha=0.6)
            filled = int(row["threads"]) == fewest
            face = colors[name] if filled else "white"
            label = NAMES.get(name, name) if filled else None
            axes.plot(x, ratio, "o", color=colors[name], markerfacecolor=face, markersize=5, linestyle="none", label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), list(places), rotation=40, ha="right", fontsize=8, rotation_mode="anchor")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _share_limits(row: Sequence[Axes], ratios: Sequence[float]) -> None:
    """The same range for all panels of a row, with all their points in it; the part below 1 in green."""
    low, high = min(0.4, *ratios) * 0.8, max(2.0, *ratios) * 1.25
    for axes in row:
        axes.set_ylim(low, high)
        axes.axhspan(low, 1, color="#2a9d8f", alpha=0.07)
        shown = [tick for tick in TICKS if low <= tick <= high]
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axes.yaxis.set_minor_formatter(NullFormatter())


def _place(row: Text) -> str:
    """What stands on the axis: the shape, and in 3-D the layout."""
    last = " cl" if row["layout"] == "channels_last 3d" else ""
    return row["shape"].replace("x", "×") + last
