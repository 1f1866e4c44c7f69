"""`bench resnet50`: a training step of a ResNet-50 on one device, over the same with torch's local batch norm.

Requirements
    - nothing is communicated: synchronized layers are in a world of eight whose collectives cost a call and a launch each;
    - all variants train the same images from the same weights, and take turns, step by step;
    - before any time is taken, and in a world of one, gradients and running statistics are as near to float64 as twice those of
      torch's layer, or to ALLOWED, whatever the convolutions round to;
    - a step is forward, backward and SGD by the clock, between two synchronisations with the device; and, of a variant that can
      be captured, its replay as a CUDA graph, which has no host in it;
    - the rows of a setting are written as soon as it is measured; one that fails its check has none.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..doctor.finding import table
from ..doctor.latency import timed
from . import counts, memory, peers, rows, sync_operators
from .agreement import DisagreementError
from .fake_world import RANKS, fake_world
from .layer_step import WARM_UP, Clocked, captured
from .network import replace, resnet50
from .peers import TORCH, TORCH_SYNC, runnable
from .rows import Row
from .run import say
from .step import state
from .timing import Quartiles, order, quartiles, ratio

VARIANTS = (TORCH_SYNC, "torch-sync-unmasked", "syncbn", "syncbn-host", "syncbn-aten")
ALLOWED = {"gradients": 1e-2, "running statistics": 1e-5}  # relative, in the norm of all, where torch's own error is less
MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TORCH: lambda model: model,
    TORCH_SYNC: lambda model: replace(model, sync_operators.TorchSync),
    "torch-sync-unmasked": lambda model: replace(model, sync_operators.Unmasked),
    "syncbn": peers.forced,
    "syncbn-host": peers.forced,
    "syncbn-aten": peers.forced,
}


class Setting(NamedTuple):
    """How a network is trained."""

    precision: str  # "float32", of which convolutions on a GPU may round to TF32 as torch has it by default
    layout: str

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision != "float32")


SETTINGS = (
    Setting("bfloat16 autocast", "channels_last"),
    Setting("float32", "channels_last"),
    Setting("float32", "contiguous"),
)


Seen = dict[tuple[Setting, str], counts.Counts | None]  # by setting and variant: a profile of a network takes seconds


class Watched(NamedTuple):
    """What was found of a variant before times were taken."""

    peak: int  # bytes
    counts: counts.Counts | None
    replay: Callable[[], None] | None


class Training(NamedTuple):
    """One variant of the network; `run` is a step."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    run: Callable[[], None]


def run(options: argparse.Namespace) -> int:
    """Measure at each number of images, print, append rows; the exit status."""
    device = torch.device(options.device)
    names = runnable(VARIANTS, device)
    versions = rows.accelerator(device)
    measured: list[Row] = []
    seen: Seen = {}
    wrong = 0
    for images in options.images:
        for setting in tqdm(SETTINGS, f"{images} images", unit=" settings", disable=None):
            try:
                found = measure(names, setting, images, options.width, options.size, options.repeats, device, seen)
            except DisagreementError as error:
                wrong = say(f"{error}; its setting is not reported")
                continue
            found = [row | versions for row in found]
            path = rows.append("resnet50", found, options.results, options.device)
            measured += found
    if measured:
        print(shown(measured))
        print(rows.said(path))
    return wrong


def measure(
    names: Sequence[str],
    setting: Setting,
    images: int,
    width: int,
    size: int,
    repeats: int,
    device: torch.device,
    seen: Seen,  # launches and waits, which are those of any number of images
) -> list[Row]:
    """A row for each variant.

    Raises:
        DisagreementError: one of them does not train as torch's does; nothing is reported.
    """
    torch.manual_seed(0)
    initial: Any = resnet50(width)
    initial = initial.to(device, memory_format=setting.memory_format)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, size, size, generator=generator).to(device, memory_format=setting.memory_format)
    target = torch.randint(1000, (images,), generator=generator).to(device)
    made = [training(name, initial, setting, x, target) for name in names]
    with fake_world(1):
        errors = checked(made, initial, x, target)
    watched, taken = {}, {one.name: Clocked([], []) for one in made}
    with fake_world(RANKS):
        for one in made:
            with peers.using(one.name):
                for _ in range(WARM_UP):
                    one.run()
                if (setting, one.name) not in seen:
                    seen[setting, one.name] = counts.of(one.run, device)[0]
                found = seen[setting, one.name]
                peak = memory.peak(one.run, device)
                waits = found is not None and found.host_synchronizations > 0
                replay = None if waits else captured(one.name, one.run, one.model.zero_grad, device)
                watched[one.name] = Watched(peak, found, replay)
        by_name = {one.name: one for one in made}
        for repeat in range(-1, repeats):
            for name in order(list(by_name), repeat):
                one = by_name[name]
                replay = watched[one.name].replay
                with peers.using(one.name):
                    eager = timed(one.run, device)[0]
                    replayed = None if replay is None else timed(replay, device)[0]
                if repeat >= 0:
                    taken[one.name].eager.append(eager)
                    taken[one.name].replay.extend(() if replayed is None else (replayed,))
    network = f"ResNet-50, width {width}, {size}×{size}"
    common = {"network": network, "images": images, **setting._asdict(), "device": device.type, "ranks": RANKS}
    return [{"variant": one.name} | common | _columns(one.name, taken, watched, errors) for one in made]


def training(name: str, initial: nn.Module, setting: Setting, x: Tensor, target: Tensor) -> Training:
    """The variant of the network with an optimizer."""
    model = MAKERS[name](copy.deepcopy(initial)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss() -> Tensor:
        with setting.autocast(x.device):
            y = model(x)
        return F.cross_entropy(y.float(), target)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(name, model, loss, step)


def checked(made: Sequence[Training], initial: nn.Module, x: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
    """The errors of each after its first backward, relative to float64."""
    whole = copy.deepcopy(initial).double().train()
    F.cross_entropy(whole(x.double()), target).backward()
    wanted = state(whole)
    del whole
    found: dict[str, dict[str, float]] = {}
    for one in made:
        with peers.using(one.name):
            one.loss().backward()
        pairs = zip(ALLOWED, state(one.model), wanted, strict=True)
        found[one.name] = {what: float((value - want).norm() / want.norm()) for what, value, want in pairs}
        one.model.zero_grad()
    for name, errors in found.items():
        for what, error in errors.items():
            if not error <= max(2 * found[TORCH][what], ALLOWED[what]):
                raise DisagreementError(
                    f"{name} does not train as torch's local batch norm: {what} of {len(x)} images are off by {error:.1e} of "
                    f"their norm, torch's by {found[TORCH][what]:.1e}"
                )
    return found


def _columns(
    name: str,
    taken: Mapping[str, Clocked],
    watched: Mapping[str, Watched],
    errors: Mapping[str, Mapping[str, float]],
) -> Row:
    peak, seen, _ = watched[name]
    mine, base, over_sync = taken[name], taken[TORCH], taken.get(TORCH_SYNC)
    return {
        **_named("milliseconds", [1e3 * value for value in quartiles(mine.eager)]),
        **_named("over_torch", ratio(mine.eager, base.eager)),
        **_named("over_torch_sync", ratio(mine.eager, over_sync.eager) if over_sync else None),
        **_named("replay_milliseconds", [1e3 * value for value in quartiles(mine.replay)] if mine.replay else None),
        **_named("replay_over_torch", ratio(mine.replay, base.replay) if mine.replay and base.replay else None),
        **(dict.fromkeys(counts.Counts._fields, "") if seen is None else seen._asdict()),
        "peak_bytes": peak,
        **{f"error_{what.replace(' ', '_')}": f"{error:.1e}" for what, error in errors[name].items()},
        "repeats": len(mine.eager),
    }


def _named(what: str, values: Sequence[float] | None) -> dict[str, Any]:
    """The columns of quartiles; empty where there are none."""
    told = [""] * 3 if values is None else [round(value, 3) for value in values]
    return {f"{what}_{part}": value for part, value in zip(Quartiles._fields, told, strict=True)}


def shown(measured: Sequence[Row]) -> str:
    """Medians; of ratios, between their quartiles."""
    lines: list[Sequence[object]] = [
        (
            *("images", "precision", "layout", "variant", "ms a step", "over torch", "over torch-sync", "launches", "waits"),
            *("ms as a graph", "over torch's"),
        )
    ]
    for row in measured:
        cells = [row[name] for name in ("images", "precision", "layout", "variant")]
        cells.append(f"{row['milliseconds_median']:.2f}")
        cells += [_between(row, "over_torch"), _between(row, "over_torch_sync"), row["launches"], row["host_synchronizations"]]
        replayed = row["replay_milliseconds_median"]
        lines.append((*cells, "-" if replayed == "" else f"{replayed:.2f}", _between(row, "replay_over_torch")))
    return table(lines)


def _between(row: Row, what: str) -> str:
    low, middle, high = (row[f"{what}_{part}"] for part in Quartiles._fields)
    return "-" if middle == "" else f"{middle:.3f} ({low:.3f} to {high:.3f})"
