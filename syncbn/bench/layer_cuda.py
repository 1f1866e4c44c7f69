"""`bench layer --device cuda`: forward and backward of one layer on a GPU, in a world of eight that communicates nothing.

Requirements
    - variants take turns on the same values, each of which passed the equality check in a world of one (see fake_world.py);
    - a step is timed twice: by the clock, alone, host and waits included, operands where the step before left them in L2; and
      each of its two passes by CUDA events, from a flushed L2, with the host ahead (see device_time.py);
    - the floor is a copy of as many bytes as batch norm has to move, three times the tensor forward and five times backward, of
      which half are read and half written, by one device-to-device copy for each pass, in turn with the variants;
    - gradients are cleared outside of what is timed and counted, so that no step adds to those of another;
    - rows go to a file of their own, those of a case as soon as it is measured; one that fails its check has none.
"""

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..doctor.latency import timed
from . import agreement, check, counts, memory, peers, rows
from .cases import Case, chosen
from .device_time import Clock, clock
from .fake_world import RANKS, fake_world
from .layer_cuda_summary import summary
from .peers import PASSES, PEERS, TORCH, TORCH_SYNC, outputs_of, runnable
from .rows import Row
from .timing import Quartiles, microseconds, order, quartiles, ratio

FILE = "layer_cuda"
COPY = "copy"
VARIANTS = ("torch-inductor", TORCH_SYNC, "torch-sync-unmasked", "syncbn", "syncbn-aten")
WARM_UP = 3


class Step(NamedTuple):
    """Of one variant: `forward` and `backward` in turn, and between steps `clear`."""

    forward: Callable[[], None]
    backward: Callable[[], None]
    clear: Callable[[], None]

    def both(self) -> None:
        self.forward()
        self.backward()


class Taken(NamedTuple):
    """Seconds, one for each repetition."""

    step: list[float]  # by the clock
    forward: list[float]  # on the device
    backward: list[float]
    ahead: list[bool]  # of both passes

    @property
    def device(self) -> list[float]:
        return [one + other for one, other in zip(self.forward, self.backward, strict=True)]

    @property
    def host_ahead(self) -> float:
        """In what share of the repetitions."""
        return round(sum(self.ahead) / len(self.ahead), 2)


class Variant(NamedTuple):
    """What was found before times were taken."""

    step: Step
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
            found[name] = examined(name, step_of(name, theirs, x, dy), errors[name], device)
        found[COPY] = examined(COPY, copies(x), dict.fromkeys(agreement.Outputs._fields, float("nan")), device)
        repeats *= 4 if case.small else 1
        taken = interleaved({name: one.step for name, one in found.items()}, repeats, device, clock(device))
    return [_row(case, name, found, taken, x.nbytes, device) for name in found]


def step_of(name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """The peer's layer on its own leaf."""
    made, leaf = peers.make(name, copy.deepcopy(layer)), x.detach().requires_grad_()
    held: list[Tensor] = []

    def clear() -> None:
        leaf.grad = None
        made.zero_grad()

    return Step(lambda: held.append(made(leaf)), lambda: held.pop().backward(dy), clear)


def copies(x: Tensor) -> Step:
    """Copies of as many bytes as the passes of batch norm move."""
    runs = []
    for passes in PASSES:
        source = torch.zeros(passes * x.nbytes // 2, dtype=torch.uint8, device=x.device)
        runs.append(functools.partial(torch.empty_like(source).copy_, source))
    forward, backward = runs
    return Step(lambda: _drop(forward()), lambda: _drop(backward()), lambda: None)


def _drop(value: object) -> None:
    """Keep nothing."""


def using(name: str) -> contextlib.AbstractContextManager[None]:
    return peers.using(name) if name in PEERS else contextlib.nullcontext()


def examined(name: str, step: Step, errors: dict[str, float], device: torch.device) -> Variant:
    """Run it until all is made that is made once, then watch one step."""
    with using(name):
        for _ in range(WARM_UP):
            step.both()
            step.clear()
        peak = memory.peak(step.both, device)
        step.clear()
        seen, backend = counts.of(step.both, device)
        step.clear()
    return Variant(step, errors, peak, seen, backend)


def interleaved(steps: dict[str, Step], repeats: int, device: torch.device, device_clock: Clock) -> dict[str, Taken]:
    """All variants in turn, again and again, in another order each time."""
    taken = {name: Taken([], [], [], []) for name in steps}
    for repeat in range(-1, repeats):
        for name in order(list(steps), repeat):
            step = steps[name]
            with using(name):
                seconds, _ = timed(step.both, device)
                step.clear()
                forward, backward = device_clock(step.forward), device_clock(step.backward)
                step.clear()
            if repeat >= 0:
                values: tuple[Any, ...] = (seconds, forward.seconds, backward.seconds, forward.ahead and backward.ahead)
                for part, value in zip(Taken._fields, values, strict=True):
                    getattr(taken[name], part).append(value)
    return taken


def _row(
    case: Case, name: str, found: dict[str, Variant], taken: dict[str, Taken], bytes_of_x: int, device: torch.device
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
        **{f"forward_{key}": value for key, value in microseconds(quartiles(mine.forward)).items()},
        **{f"backward_{key}": value for key, value in microseconds(quartiles(mine.backward)).items()},
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


def _ratio(name: str, value: Quartiles | None) -> dict[str, Any]:
    """The columns of a ratio; empty where there is no base."""
    keys = (f"{name}_lower_quartile", name, f"{name}_upper_quartile")
    return dict(zip(keys, ("",) * 3 if value is None else (round(part, 3) for part in value), strict=True))
