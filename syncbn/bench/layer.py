"""`bench layer`: forward and backward of one layer on one process, over torch's own batch norm, which synchronizes nothing.

Requirements
    - ours synchronizes with itself: its whole path but the collective;
    - all variants of a case run in turn, in one process, on the same values; every one of them passed the equality check;
    - freed memory is kept, so that page faults fall on none of them;
    - a variant that cannot run here is named with the reason;
    - beside them what the memory takes alone, which is no batch norm and has no check to pass.

On a GPU other things count, and other columns: layer_cuda.py.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..doctor.finding import table
from . import agreement, check, layer_cuda, peers, rows
from .cases import Case, chosen
from .memory import keep_heap, peak
from .peers import MEMORY, PEERS, TORCH, outputs_of, runnable
from .rows import Row
from .run import UsageError
from .timing import columns, geometric_mean, interleaved

KEYS = ("variant", "dtype", "layout", "threads")


def run(options: argparse.Namespace) -> int:
    """Measure every case, then append the rows or compare them with those recorded; the exit status."""
    asked = options.variants or [*PEERS, MEMORY]
    if options.device == "cuda":
        if options.variants and MEMORY in asked:
            raise UsageError(f"given --variants {MEMORY} and --device cuda; expected cpu: a GPU's passes stand beside a copy")
        return layer_cuda.run(options)
    device = torch.device(options.device)
    variants = runnable([name for name in asked if name != MEMORY], device) + [MEMORY] * (MEMORY in asked)
    measured: list[Row] = []
    heap = "kept" if keep_heap() else "as it is"
    before = torch.get_num_threads()
    try:
        for case in tqdm(chosen(options), "layer", unit=" cases", disable=None, dynamic_ncols=True):
            torch.set_num_threads(case.threads)
            measured += [row | {"heap": heap} for row in measure(case, variants, options.repeats, device)]
            if not options.check:
                rows.require("layer", measured, options.results)
    finally:
        torch.set_num_threads(before)
    print(summary(measured))
    if options.check:
        return check.report(measured, rows.read("layer", options.results), rows.circumstances(options.device))
    print(rows.said(rows.append("layer", measured, options.results, options.device)))
    return 0


def measure(case: Case, variants: Sequence[str], repeats: int, device: torch.device) -> list[Row]:
    """A row for each variant.

    Raises:
        DisagreementError: a variant is not batch norm; nothing is reported.
    """
    theirs = case.layer().to(device)
    x, dy = (tensor.to(device) for tensor in case.tensors())
    names = [name for name in variants if _fits(name, case)]
    torch._dynamo.reset()
    wanted = agreement.expected(theirs, x, dy)
    steps = {}
    for name in names:
        if name == MEMORY:
            steps[name] = peers.memory_passes(x, dy)
            continue
        told = f"{name}, {case.dtype}, {case.layout}, {case.name}".replace("torch.", "")
        agreement.require(told, functools.partial(outputs_of, name, x, dy), theirs, wanted, case.dtype)
        steps[name] = step(name, theirs, x, dy)
    del wanted
    bytes_held = {name: peak(run, device) for name, run in steps.items()}
    repeats *= 4 if case.small else 1
    taken = interleaved(steps, repeats, device, warm_up=2)
    return [_row(case, name, taken, bytes_held, device) for name in names]


def _fits(name: str, case: Case) -> bool:
    """Whether a variant is run on a case. ATen sums half precision slower than it reads it, so that is no bound."""
    return case.dtype == torch.float32 if name == MEMORY else case.by_compiler or not PEERS[name].compiled


def _row(case: Case, name: str, taken: dict[str, list[float]], bytes_held: dict[str, int], device: torch.device) -> Row:
    return {
        "variant": name,
        **case.columns(device),
        **columns(taken[name], taken[TORCH]),
        "peak_bytes": bytes_held[name],
        "peak_over_torch": round(bytes_held[name] / bytes_held[TORCH], 3),
        "repeats": len(taken[name]),
    }


def step(name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """A forward and backward of the peer's layer on its own leaf, which keeps no gradient."""
    made, leaf = peers.make(name, copy.deepcopy(layer)), x.detach().requires_grad_()

    def run() -> None:
        with peers.using(name):
            made(leaf).backward(dy)
        leaf.grad = None

    run()  # compiles where it has to
    return run


def summary(measured: Sequence[Row]) -> str:
    """Geometric means over the shapes, what they lose, and memory; torch's own is 1 by definition."""
    lines: list[Sequence[object]] = [(*KEYS, "over torch", "best", "worst", "slower at", "peak memory")]
    for key in dict.fromkeys(tuple(row[name] for name in KEYS) for row in measured):
        of = [row for row in measured if tuple(row[name] for name in KEYS) == key]
        if key[0] == TORCH:
            continue
        ratios = [row["ratio"] for row in of]
        slower = f"{sum(one > 1 for one in ratios)} of {len(ratios)} shapes"
        held = f"{geometric_mean(row['peak_over_torch'] for row in of):.2f}"
        shown = (f"{value:.2f}" for value in (geometric_mean(ratios), min(ratios), max(ratios)))
        lines.append((*key, *shown, slower, held))
    return table(lines)
