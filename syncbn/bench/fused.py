"""`bench fused`: batch norm and ReLU, and batch norm, addition and ReLU, as one layer of ours over separate modules.

Requirements
    - ours synchronizes with itself, in one module and in several: its whole path but the collective;
    - all ways of a case run in turn, in one process, on the same values; every one of them passed the equality check;
    - a way that cannot run here is named with the reason;
    - on a GPU both passes are timed on the device too, from a flushed L2 (see device_time.py).
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import kernels
from ..doctor.finding import table
from . import agreement, layer_step, peers, rows
from .cases import Case, chosen
from .device_time import clock
from .memory import keep_heap, peak
from .rows import Row
from .run import say
from .timing import columns, geometric_mean, interleaved, microseconds, quartiles, ratio

FORMS = ("relu", "add relu")
KEYS = ("way", "form", "dtype", "layout", "threads")
BASE = "syncbn, separate"
# Relative errors allowed, of values and of dγ and dβ: a few times those of torch's channels_last kernel and,
# in half precision, of modules that round before the ReLU, which flips some signs.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SUMS = {torch.float32: 2e-2, torch.bfloat16: 0.1, torch.float16: 0.1}


class Separate(nn.Module):
    """A batch norm layer, an addition and a ReLU, as models are written."""

    def __init__(self, norm: nn.Module, in_place: bool = False) -> None:
        super().__init__()
        self.norm, self.relu, self.in_place = norm, nn.ReLU(in_place), in_place

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        activated: Tensor = self.relu(y)
        return activated


class Way(NamedTuple):
    """One way to run a form, from torch's layer; by the kernels of a peer."""

    make: Callable[[nn.Module], nn.Module]
    peer: str


WAYS = {
    BASE: Way(lambda layer: Separate(peers.forced(layer)), "syncbn"),
    "syncbn, in place": Way(lambda layer: Separate(peers.forced(layer), True), "syncbn"),
    "syncbn, fused": Way(peers.fused, "syncbn"),
    "syncbn, fused, ATen": Way(peers.fused, "syncbn-aten"),
    "torch, separate": Way(lambda layer: Separate(copy.deepcopy(layer)), "torch"),
    "torch, inductor": Way(lambda layer: Separate(copy.deepcopy(layer)), "torch-inductor"),
}


def run(options: argparse.Namespace) -> int:
    """Measure every case and append the rows; the exit status."""
    device = torch.device(options.device)
    available = set(peers.runnable([way.peer for way in WAYS.values()], device))
    ways = {name: way for name, way in WAYS.items() if way.peer in available}
    if BASE not in ways:
        return say("nothing to compare: the kernels that fuse are not there")
    measured: list[Row] = []
    name = "fused" if device.type == "cpu" else f"fused_{device.type}"
    heap = "kept" if device.type == "cpu" and keep_heap() else "as it is"
    versions = rows.accelerator(device) if device.type == "cuda" else {}
    before = torch.get_num_threads()
    try:
        for case in tqdm(chosen(options), "fused", unit=" cases", disable=None, dynamic_ncols=True):
            torch.set_num_threads(case.threads)
            for form in FORMS:
                measured += [row | versions | {"heap": heap} for row in measure(case, form, ways, options.repeats, device)]
                rows.require(name, measured, options.results)
    finally:
        torch.set_num_threads(before)
    print(summary(measured))
    print(rows.said(rows.append(name, measured, options.results, options.device)))
    return 0


class Leaves(NamedTuple):
    """The input of a step: (N, C, *) each."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @property
    def given(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


def leaves_of(case: Case, form: str, device: torch.device) -> Leaves:
    x, dy = case.tensors(device)
    residual = torch.empty_like(dy).copy_(dy.flip(0)).requires_grad_() if form == "add relu" else None
    return Leaves(x.requires_grad_(), residual, dy)


def measure(case: Case, form: str, ways: Mapping[str, Way], repeats: int, device: torch.device) -> list[Row]:
    """A row for each way.

    Raises:
        DisagreementError: a way does not compute the form; nothing is reported.
    """
    layer, leaves = case.layer().to(device), leaves_of(case, form, device)
    names = [name for name, way in ways.items() if case.by_compiler or not peers.PEERS[way.peer].compiled]
    torch._dynamo.reset()
    made = {name: _made(ways[name], layer) for name in names}
    for name, module in made.items():
        with _kernels_of(ways[name], leaves.x):
            require(f"{name}, {form}, {case.name}, {case.layout}", module, layer, leaves, case.dtype)
    steps = {name: _step(ways[name], module, leaves) for name, module in made.items()}
    held = {name: peak(step, device) for name, step in steps.items()}
    repeats *= 4 if case.small else 1
    if device.type == "cpu":
        taken = interleaved(steps, repeats, device, warm_up=2)
        return [_row(case, form, name, taken, held, device) for name in names]
    passes = {name: _passes(ways[name], module, leaves) for name, module in made.items()}
    found = layer_step.interleaved(passes, repeats, device, clock(device))
    taken = {name: one.step for name, one in found.items()}
    return [_row(case, form, name, taken, held, device) | _on_device(found[name], found[BASE]) for name in names]


def _made(way: Way, layer: nn.Module) -> nn.Module:
    module = way.make(layer)
    compiled: Any = torch.compile(module, fullgraph=True, dynamic=False) if peers.PEERS[way.peer].compiled else module
    return compiled


@contextlib.contextmanager
def _kernels_of(way: Way, x: Tensor) -> Iterator[None]:
    with peers.using(way.peer):
        wanted = peers.PEERS[way.peer].kernels
        assert wanted is None or (kernels.pick(x) is kernels.composed()) == (wanted == "aten"), "the kernels are the peer's"
        yield


def _step(way: Way, module: nn.Module, leaves: Leaves) -> Callable[[], None]:
    """A forward and backward which keeps no gradient of the leaves."""

    def run() -> None:
        with peers.using(way.peer):
            module(*leaves.given).backward(leaves.dy)
        for leaf in leaves.given:
            leaf.grad = None

    run()
    return run


def _passes(way: Way, module: nn.Module, leaves: Leaves) -> layer_step.Step:
    """Its forward and its backward, each by itself."""
    held: list[Tensor] = []

    def forward() -> None:
        with peers.using(way.peer):
            held.append(module(*leaves.given))

    def backward() -> None:
        with peers.using(way.peer):
            held.pop().backward(leaves.dy)

    def clear() -> None:
        for value in (*leaves.given, *module.parameters()):
            value.grad = None

    return layer_step.Step(forward, backward, clear)


def _on_device(mine: layer_step.Taken, base: layer_step.Taken) -> Row:
    """More columns: what both passes take on the device."""
    return {
        **{f"device_{key}": value for key, value in microseconds(quartiles(mine.device)).items()},
        "device_ratio": round(ratio(mine.device, base.device).median, 3),
        "host_ahead": mine.host_ahead,
    }


def require(told: str, module: nn.Module, layer: Any, leaves: Leaves, dtype: torch.dtype) -> dict[str, float]:
    """The relative errors of y and every gradient of a step beside the definition in float64.

    Raises:
        DisagreementError: one of them is off by more than the dtype allows, but where the ReLU may have gone either way.
    """
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves.given]
    x, residual = wide[0], wide[1] if len(wide) > 1 else None
    weight, bias = (value.detach().double().requires_grad_() for value in (layer.weight, layer.bias))
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    mean = x.mean(dims, keepdim=True)
    invstd = ((x - mean).square().mean(dims, keepdim=True) + layer.eps).rsqrt()
    given = (x - mean) * invstd * weight.view(shape) + bias.view(shape) + (0 if residual is None else residual)
    expected = given.relu()
    wanted = [expected, *torch.autograd.grad(expected, [*wide, weight, bias], leaves.dy.double())]
    y = module(*leaves.given)
    parameters = dict(module.named_parameters())
    inner = [next(value for name, value in parameters.items() if name.endswith(end)) for end in ("weight", "bias")]
    found = [y, *torch.autograd.grad(y, [*leaves.given, *inner], leaves.dy)]
    allowed, sums = ALLOWED[dtype], SUMS[dtype]
    decided = given.detach().abs() > allowed * given.detach().abs().max()  # else the ReLU may go either way
    names = ["y", "dx", *([] if residual is None else ["dresidual"]), "dweight", "dbias"]
    errors = {}
    for name, got, want in zip(names, found, wanted, strict=True):
        error = (got.double() - want).detach().abs()
        if name in ("dx", "dresidual"):
            error = torch.where(decided, error, 0)
        errors[name] = off = (error.max() / want.detach().abs().max()).item()
        if not off <= (sums if name in ("dweight", "dbias") else allowed):
            raise agreement.DisagreementError(f"{told} is not batch norm and ReLU: {name} is off by {off:.1e}, relatively")
    return errors


def _row(case: Case, form: str, name: str, taken: dict[str, list[float]], held: dict[str, int], device: torch.device) -> Row:
    return {
        "way": name,
        "form": form,
        **case.columns(device),
        **columns(taken[name], taken[BASE]),
        "peak_over_separate": round(held[name] / held[BASE], 3),
        "repeats": len(taken[name]),
    }


def summary(measured: Sequence[Row]) -> str:
    """Geometric means over the shapes of how much faster a way is than separate modules of ours, which are 1."""
    lines: list[Sequence[object]] = [(*KEYS, "faster than separate", "best", "worst", "on the device", "peak memory")]
    for key in dict.fromkeys(tuple(row[name] for name in KEYS) for row in measured):
        of = [row for row in measured if tuple(row[name] for name in KEYS) == key]
        if key[0] == BASE:
            continue
        faster = [1 / row["ratio"] for row in of]
        held = geometric_mean(row["peak_over_separate"] for row in of)
        on_device = [1 / row["device_ratio"] for row in of if "device_ratio" in row]
        cells = [f"{value:.2f}" for value in (geometric_mean(faster), max(faster), min(faster))]
        lines.append((*key, *cells, f"{geometric_mean(on_device):.2f}" if on_device else "-", f"{held:.2f}"))
    return table(lines)
