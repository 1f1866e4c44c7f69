"""`bench layer --device cuda`: forward and backward of one layer on a GPU, in a world of eight that communicates nothing.

Requirements
    - variants take turns on the same values, each of which passed the equality check in a world of one (see fake_world.py);
    - a step is timed by the clock, host and waits included, operands where the step before left them in L2: of one layer alone,
      of several in a row and, for tensors below SMALL, of that row as a graph (see layer_step.py), both told by the layer;
    - each of the two passes of one layer is timed by CUDA events, from a flushed L2, with the host ahead (see device_time.py);
    - the floor is a copy of as many bytes as batch norm has to move, three times the tensor forward and five times backward, of
      which half are read and half written, by one device-to-device copy for each pass, in turn with the variants;
    - rows go to a file of their own, those of a case as soon as it is measured; one that fails its check has none.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import agreement, check, counts, memory, rows
from .cases import Case, chosen
from .device_time import clock
from .fake_world import RANKS, fake_world
from .layer_cuda_summary import SMALL, summary
from .layer_step import DEPTH, WARM_UP, Clocked, Step, Taken, captured, copies, in_a_row, interleaved, step_of, using
from .peers import PEERS, TORCH, TORCH_SYNC, outputs_of, runnable
from .rows import Row
from .timing import Quartiles, microseconds, quartiles, ratio

FILE = "layer_cuda"
COPY = "copy"
VARIANTS = ("torch-inductor", TORCH_SYNC, "torch-sync-unmasked", "syncbn", "syncbn-host", "syncbn-aten")


class Variant(NamedTuple):
    """What was found before times were taken."""

    step: Step
    chain: Step
    replay: Callable[[], None] | None
    errors: dict[str, float]
    peak: int  # bytes
    counts: counts.Counts | None
    backend: str  # of torch's local batch norm


def run(options: argparse.Namespace) -> int:
    """Measure every case; the exit status: 1 if a result was wrong."""
    device, wrong = torch.device(options.device), 0
    variants = runnable([name for name in options.variants or VARIANTS if not _traced(name)], device)
    versions = rows.accelerator(device)
    measured: list[Row] = []
    for case in tqdm(chosen(options), "layer", unit=" cases", disable=None, dynamic_ncols=True):
        try:
            found = [row | versions for row in measure(case, variants, options.repeats, device)]
        except agreement.DisagreementError as error:
            print(f"syncbn bench: {error}; its case is not reported", file=sys.stderr)
            wrong += 1
            continue
        measured += found
        if not options.check:
            path = rows.append(FILE, found, options.results, options.device)
    if not measured:
        return 1
    print(summary(measured))
    if options.check:
        recorded = [{**row, "threads": ""} for row in rows.read(FILE, options.results)]
        here = rows.circumstances(options.device)
        return check.report([row | {"threads": ""} for row in measured], recorded, here) or int(wrong > 0)
    print(rows.said(path))
    return int(wrong > 0)


def _traced(name: str) -> bool:
    """Whether a collective of the variant is in a compiled graph, which the fake world has no part in: said."""
    traced = PEERS[name].compiled and PEERS[name].make is not copy.deepcopy
    if traced:
        reason = "its collective is in the compiled graph, where that of the fake world cannot take its place"
        print(f"syncbn bench: {name} ({PEERS[name].what}) is skipped: {reason}", file=sys.stderr)
    return traced


def measure(case: Case, variants: Sequence[str], repeats: int, device: torch.device) -> list[Row]:
    """A row for each variant and for the copy.

    Raises:
        DisagreementError: a variant is not batch norm; nothing is reported.
    """
    theirs = case.layer().to(device)
    x, dy = case.tensors(device)
    names = [name for name in variants if case.by_compiler or not PEERS[name].compiled]
    torch._dynamo.reset()
    with fake_world(1):
        wanted, errors = agreement.expected(theirs, x, dy), {}
        for name in names:
            told = f"{name}, {case.dtype}, {case.layout}, {case.name}".replace("torch.", "")
            errors[name] = agreement.require(told, functools.partial(outputs_of, name, x, dy), theirs, wanted, case.dtype)
        del wanted
    found = {}
    with fake_world(RANKS):
        for name in names:
            chain = step_of(name, theirs, x, dy, DEPTH)
            found[name] = examined(name, step_of(name, theirs, x, dy), chain, errors[name], device, x.nbytes < SMALL)
        unknown = dict.fromkeys(agreement.Outputs._fields, float("nan"))
        found[COPY] = examined(COPY, copies(x), copies(x, DEPTH), unknown, device, x.nbytes < SMALL)
        repeats *= 4 if case.small else 1
        taken = interleaved({name: one.step for name, one in found.items()}, repeats, device, clock(device))
        chains, replays = ({name: getattr(one, part) for name, one in found.items()} for part in ("chain", "replay"))
        chained = in_a_row(chains, replays, repeats, device)
    return [_row(case, name, found, taken, chained, x.nbytes, device) for name in found]


def examined(name: str, step: Step, chain: Step, errors: dict[str, float], device: torch.device, with_graph: bool) -> Variant:
    """Run it until all is made that is made once, then watch one step."""
    with using(name):
        for _ in range(WARM_UP):
            for one in (step, chain):
                one.both()
                one.clear()
        peak = memory.peak(step.both, device)
        step.clear()
        seen, backend = counts.of(step.both, device)
        step.clear()
        waits = seen is not None and seen.host_synchronizations > 0
        replay = captured(name, chain.both, chain.clear, device) if with_graph and not waits else None
    return Variant(step, chain, replay, errors, peak, seen, backend)


def _row(
    case: Case,
    name: str,
    found: dict[str, Variant],
    taken: dict[str, Taken],
    chained: dict[str, Clocked],
    bytes_of_x: int,
    device: torch.device,
) -> Row:
    mine, base, floor, one = taken[name], taken[TORCH], taken[COPY], found[name]
    over_sync = taken.get(TORCH_SYNC)
    seen = counts.Counts._fields
    return {
        "variant": name,
        "backend": one.backend,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "shape": case.name,
        "bytes": bytes_of_x,
        "device": device.type,
        "ranks": RANKS,
        **microseconds(quartiles(mine.step)),
        **_ratio("ratio", ratio(mine.step, base.step)),
        **_ratio("over_torch_sync", None if over_sync is None else ratio(mine.step, over_sync.step)),
        **_chained(chained[name], chained[TORCH], chained.get(TORCH_SYNC)),
        **_times("forward", mine.forward),
        **_times("backward", mine.backward),
        "forward_of_copy": round(ratio(floor.forward, mine.forward).median, 3),
        "backward_of_copy": round(ratio(floor.backward, mine.backward).median, 3),
        **_ratio("device_ratio", ratio(mine.device, base.device)),
        **_ratio("device_over_torch_sync", None if over_sync is None else ratio(mine.device, over_sync.device)),
        "host_ahead": mine.host_ahead,
        **(dict.fromkeys(seen, "") if one.counts is None else one.counts._asdict()),
        "peak_bytes": one.peak,
        "peak_over_torch": round(one.peak / found[TORCH].peak, 3),
        **{f"error_{tensor}": "" if error != error else f"{error:.1e}" for tensor, error in one.errors.items()},
        "repeats": len(mine.step),
    }


def _chained(mine: Clocked, base: Clocked, over_sync: Clocked | None) -> dict[str, Any]:
    """The columns of layers in a row."""
    return {
        **_times("chain", mine.eager),
        **_ratio("chain_ratio", ratio(mine.eager, base.eager)),
        **_ratio("chain_over_torch_sync", None if over_sync is None else ratio(mine.eager, over_sync.eager)),
        **_times("replay", mine.replay),
    }


def _times(name: str, taken: Sequence[float]) -> dict[str, Any]:
    """The columns of a time; empty where there is none."""
    columns = microseconds(quartiles(taken or [0.0]))
    return {f"{name}_{key}": value if taken else "" for key, value in columns.items()}


def _ratio(name: str, value: Quartiles | None) -> dict[str, Any]:
    """The columns of a ratio; empty where there is no base."""
    keys = (f"{name}_lower_quartile", name, f"{name}_upper_quartile")
    return dict(zip(keys, ("",) * 3 if value is None else (round(part, 3) for part in value), strict=True))
