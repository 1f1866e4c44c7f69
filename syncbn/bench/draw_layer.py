"""The picture of the layer: time over torch's local batch norm, by shape and layout; below 1 is won, above it lost."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

Text = dict[str, str]
COLORS = {
    "syncbn": "#00618a",
    "syncbn-aten": "#6ab0d2",
    "syncbn-inductor": "#2a9d8f",
    "torch-inductor": "#444444",
    "torch-sync": "#8a5a00",
    "plain": "#d1495b",
    "plain-inductor": "#eda29b",
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
}
GROUPS = {
    "contiguous": ["contiguous"],
    "channels_last": ["channels_last"],
    "(N, C) and 3-D": ["rows", "contiguous 3d", "channels_last 3d"],
}
TICKS = [0.25, 0.5, 1, 2, 4, 8]


def draw_layer(figure: Figure, recorded: Sequence[Text]) -> None:
    """Above: every variant in float32; below: syncbn by dtype; one thread filled, more of them hollow."""
    figure.set_size_inches(16, 9)
    axes = figure.subplots(2, 3, sharey="row", width_ratios=[9, 9, 8])
    threads = sorted({int(row["threads"]) for row in recorded})
    for column, (title, layouts) in enumerate(GROUPS.items()):
        of = [row for row in recorded if row["layout"] in layouts and row["variant"] != "torch"]
        above = [row for row in of if row["dtype"] == "float32" and int(row["threads"]) == threads[0]]
        below = [row for row in of if row["variant"] == "syncbn"]
        _panel(axes[0, column], of, {name: [r for r in above if r["variant"] == name] for name in COLORS}, COLORS, threads)
        _panel(
            axes[1, column],
            of,
            {name: [r for r in below if r["dtype"] == name] for name in DTYPE_COLORS},
            DTYPE_COLORS,
            threads,
        )
        axes[0, column].set_title(f"{title}: float32, {_threads(threads[:1])}", loc="left")
        axes[1, column].set_title(f"{title}: syncbn by dtype, {_threads(threads)}", loc="left")
    for row in (0, 1):
        axes[row, 0].set_ylabel("time over torch's local batch norm")
        handles = {label: handle for each in axes[row] for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
        axes[row, 2].legend(
            handles.values(), handles.keys(), fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
        )
    first = recorded[-1]
    figure.suptitle(
        f"Forward and backward of one layer, synchronizing with itself: below 1 it is faster than torch's layer, which "
        f"synchronizes nothing\n{first['hardware']}, torch {first['torch']}, {first['date']}, commit {first['commit']}",
        fontsize=11,
    )


def _threads(counts: Sequence[int]) -> str:
    if len(counts) == 1:
        return f"{counts[0]} thread" + "s" * (counts[0] > 1)
    return f"{counts[0]} thread filled, {counts[-1]} hollow"


def _panel(
    axes: Axes, of: Sequence[Text], series: dict[str, list[Text]], colors: dict[str, str], threads: Sequence[int]
) -> None:
    """Points by shape, each with the quartiles of the ratio."""
    places = {place: number for number, place in enumerate(dict.fromkeys(_place(row) for row in of))}
    axes.axhspan(1e-3, 1, color="#2a9d8f", alpha=0.07)
    axes.axhline(1, color="black", linewidth=0.8)
    for number, (name, rows) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.09
        for row in rows:
            x = places[_place(row)] + shift
            ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_lower_quartile", "ratio_upper_quartile"))
            first = int(row["threads"]) == threads[0]
            axes.plot([x, x], [low, high], color=colors[name], linewidth=1, alpha=0.6)
            face = colors[name] if first else "white"
            label = NAMES.get(name, name) if first and row is rows[0] else None
            axes.plot(x, ratio, "o", color=colors[name], markerfacecolor=face, markersize=5, linestyle="none", label=label)
    axes.set_yscale("log")
    ratios = [float(row["ratio"]) for rows in series.values() for row in rows] or [1.0]
    axes.set_ylim(min(0.4, min(ratios) * 0.8), max(2.0, max(ratios) * 1.25))
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks(range(len(places)), list(places), rotation=40, ha="right", fontsize=8, rotation_mode="anchor")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _place(row: Text) -> str:
    """What stands on the axis: the shape, and in 3-D the layout."""
    last = " cl" if row["layout"] == "channels_last 3d" else ""
    return row["shape"].replace("x", "×") + last
