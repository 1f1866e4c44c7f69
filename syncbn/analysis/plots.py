"""The look of the pictures: axes with names and units, one color a thing."""

from collections.abc import Sequence
from typing import Any

GRAY, RED, BLUE, GREEN, ORANGE, PURPLE = "#8a8a8a", "#d1495b", "#00618a", "#3a7d44", "#e08e45", "#6a4c93"
COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, GRAY)


def panels(figure: Any, titles: Sequence[tuple[str, str, str]], rows: int = 1) -> list[Any]:
    """Axes side by side, in `rows` rows: (title, x label, y label) each."""
    columns = -(-len(titles) // rows)
    figure.set_size_inches(5.4 * columns, 4.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, x, y) in zip(grid, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    return list(grid[: len(titles)])


def new_figure(title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def write(figure: Any, path: str) -> None:
    """As PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_figure(path, format="png")


def legend(axes: Any) -> None:
    """Over the curves, and readable there."""
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def powers_of_two(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis whose ticks are the values."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{value:g}" for value in values])
    axes.minorticks_off()
