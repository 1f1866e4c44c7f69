"""What the demo shows at its end: two tables, a judgement, a picture.

In the picture color is the run and line style the quantity, and nothing that was measured vanishes from the logarithmic axis.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .compare import CHECKED_STEPS, FACTOR, LIMIT, Differences, Run, Verdict

GRAY, RED, BLUE = "#9a9a9a", "#d1495b", "#00618a"
STYLES: dict[str, Any] = {"loss": "-", "parameters": (0, (5, 1.5)), "running": (0, (1, 1.3))}
LABELS = {"loss": "loss", "parameters": "parameters", "running": "running statistics"}
NOTES = """\
loss: |l - l_a| / |l_a|, l the mean over the global batch; parameters, running statistics: the largest absolute difference,
of all ranks' running statistics. Accuracy: {held_out} held-out images, network of rank 0. Time: of training alone."""


class Result(NamedTuple):
    """The three runs, and how far two of them are from the first."""

    whole: Run
    local: Run
    syncbn: Run
    local_apart: Differences
    syncbn_apart: Differences
    world_size: int

    @property
    def names(self) -> tuple[str, str, str]:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return "(a) 1 process, whole batch", f"(b) {processes}, local batch norm", f"(c) {processes}, syncbn"


def tables(result: Result, held_out: int) -> str:
    """Accuracy and time of each run; the largest differences to (a) in its first step, first steps, and all."""
    lines = ["", f"{'':34}{'validation accuracy':>20}{'time':>10}"]
    for name, run in zip(result.names, (result.whole, result.local, result.syncbn), strict=True):
        lines.append(f"{name:34}{run.accuracy:>19.1%} {run.seconds:>8.1f} s")
    lines += ["", f"{'largest difference to (a)':34}{'steps':>8}{'loss':>12}{'parameters':>13}{'running statistics':>21}"]
    for name, apart in zip(result.names[1:], (result.local_apart, result.syncbn_apart), strict=True):
        total = len(apart.loss)
        for steps in sorted({1, min(CHECKED_STEPS, total), total}):
            loss, parameters, running = (values[:steps].max() for values in apart)
            first = name if steps == 1 else ""
            span = "1" if steps == 1 else f"1-{steps}"
            lines.append(f"{first:34}{span:>8}{loss:>12.1e}{parameters:>13.1e}{running:>21.1e}")
    return "\n".join([*lines, NOTES.format(held_out=held_out), ""])


def judgement(verdict: Verdict | None) -> str:
    """What the check says; None where there was none."""
    if verdict is None:
        return "not checked: one process has no other to differ from; take --world-size 2 or more"
    times = verdict.local / verdict.syncbn if verdict.syncbn > 0 else float("inf")
    return (
        f"checked, loss of steps 1-{verdict.steps}: {'PASSED' if verdict.passed else 'FAILED'}\n"
        f"  {_mark(verdict.near)} (c) is within {verdict.syncbn:.1e} of (a); at most {LIMIT:.0e} is right\n"
        f"  {_mark(verdict.far)} (b) is {times:,.0f} times farther off, by {verdict.local:.1e}; at least {FACTOR:g} is right"
    )


def _mark(right: bool) -> str:
    return "ok  " if right else "BAD "


def draw(path: Path, title: str, result: Result) -> None:
    """Write the picture: the losses, and the differences to (a), by step."""
    figure = Figure(figsize=(13, 5.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    losses, differences = figure.subplots(1, 2)
    for axes in (losses, differences):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_losses(losses, result)
    _draw_differences(differences, result)
    runs = [losses.lines[1], losses.lines[0], losses.lines[2]]
    quantities = [Line2D([], [], color="black", linestyle=style, label=LABELS[name]) for name, style in STYLES.items()]
    figure.legend(handles=[*runs, *quantities], loc="outside lower center", ncols=6, frameon=False)
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _draw_losses(axes: Axes, result: Result) -> None:
    a, b, c = result.names
    steps = np.arange(1, len(result.whole.loss) + 1)
    axes.plot(steps, result.local.loss, color=RED, linewidth=1.4, label=b)
    axes.plot(steps, result.whole.loss, color=GRAY, linewidth=5, alpha=0.55, label=a)
    axes.plot(steps, result.syncbn.loss, color=BLUE, linewidth=1.4, label=c)
    axes.set_ylim(bottom=0)
    axes.set_title("Training loss", loc="left")
    axes.set_ylabel("mean over the global batch")


def _draw_differences(axes: Axes, result: Result) -> None:
    both = [(RED, result.local_apart), (BLUE, result.syncbn_apart)]
    everything = np.concatenate([values for _, apart in both for values in apart])
    floor, top = _limits(everything)
    steps = np.arange(1, len(result.whole.loss) + 1)
    axes.set_yscale("log")
    axes.set_ylim(floor / 10, top)
    for color, apart in both:
        for name, values in apart._asdict().items():
            axes.plot(steps, np.clip(values, floor, top), color=color, linestyle=STYLES[name], linewidth=1.4)
    if result.world_size > 1:
        checked = [1, max(2, min(CHECKED_STEPS, len(steps)))]
        axes.plot(checked, [LIMIT, LIMIT], color="black", linewidth=1)
        axes.annotate(f"limit for the loss of (c): {LIMIT:.0e}", (1, LIMIT), (0, 4), textcoords="offset points", fontsize=9)
    if (everything == 0).any():
        axes.axhline(floor, color="#bbbbbb", linewidth=0.8)
        right = axes.get_yaxis_transform()
        axes.text(1, floor * 0.8, "0 is drawn here", transform=right, ha="right", va="top", fontsize=9, color="#777777")
    axes.set_title("Difference to (a)", loc="left")
    axes.set_ylabel("loss: relative; others: largest absolute")


def _limits(differences: np.ndarray) -> tuple[float, float]:
    """Two powers of ten: one below every difference that is not zero, where zero is drawn; one above every finite one."""
    shown = differences[np.isfinite(differences) & (differences > 0)]
    exponents = np.log10([shown.min(initial=1e-7), shown.max(initial=1e-4)])
    return float(10 ** (np.floor(exponents[0]) - 1)), float(10 ** np.ceil(exponents[1]))
