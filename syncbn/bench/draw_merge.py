"""The picture of the merge: microseconds on the device by the number of ranks, a panel for each number of channels."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from .draw_layer_cuda import host_is_late
from .rows import origin

Text = dict[str, str]
VARIANTS = {
    "torch-sync": ("#8a5a00", "torch.nn.SyncBatchNorm: masks and merge of W rows"),
    "torch-sync-unmasked": ("#d9a441", "the merge alone"),
    "syncbn": ("#00618a", "syncbn, Triton: one message, and the statistics moved"),
    "syncbn-aten": ("#6ab0d2", "syncbn, ATen kernels"),
}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def draw_merge(figure: Figure, recorded: Sequence[Text]) -> None:
    """Bars are quartiles."""
    late = host_is_late(recorded)
    by_channels = sorted({int(row["channels"]) for row in recorded})
    figure.set_size_inches(5 * max(2, len(by_channels)), 5.5)
    panels = figure.subplots(1, len(by_channels), sharey=True, squeeze=False)[0]
    for axes, channels in zip(panels, by_channels, strict=True):
        for name, (color, label) in VARIANTS.items():
            of = [row for row in recorded if row["variant"] == name and int(row["channels"]) == channels]
            of.sort(key=lambda row: int(row["ranks"]))
            if not of:
                continue
            ranks = [int(row["ranks"]) for row in of]
            parts = ("lower_quartile", "median", "upper_quartile")
            low, middle, high = ([float(row[f"device_microseconds_{part}"]) for row in of] for part in parts)
            line, told = ("o:", f"{label}; the host is late") if name in late else ("o-", label)
            axes.plot(ranks, middle, line, color=color, markersize=4, linewidth=1.5, label=told)
            axes.vlines(ranks, low, high, color=color, linewidth=1)
        axes.set_title(f"{channels} channels", loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        there = sorted({int(row["ranks"]) for row in recorded})
        axes.set_xticks(there, [f"{count:,}" for count in there], fontsize=8, rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("ranks W")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    bottom, top = panels[0].get_ylim()
    shown = [tick for tick in TICKS if bottom <= tick <= top]
    panels[0].set_yticks(shown, [f"{tick:g}" for tick in shown])
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("µs a call by events on the device")
    panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle(
        "From what a collective gave to the statistics of the batch; no collective is in it\n"
        f"{origin(recorded)}; bars: quartiles",
        fontsize=10,
    )
