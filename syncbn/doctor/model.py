"""What synchronizing costs a model: `--model module:function`, whose function gives the model and an input for one rank.

def build():                           # tiny.py, in the directory where the doctor starts
    return Network(), torch.randn(32, 3, 224, 224)          a tuple of tensors, where the model takes several
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .. import observing
from ..control import listed
from ..convert import convert
from ..module import _Synchronized
from ..observing import Call
from ..options import made_by
from .finding import Finding, by_rank, table
from .latency import Key, Taken, cost, group_sizes, timed

WARM_UP = 2
MUCH = 2.0  # times what is predicted


class Loaded(NamedTuple):
    model: nn.Module
    inputs: tuple[Any, ...]


class Layer(NamedTuple):
    name: str
    channels: int
    group_size: int


def load(name: str, device: torch.device) -> Loaded | str:
    """The model, converted, in training mode, and its input; or what is wrong."""
    try:
        made = made_by(name)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            return f"{name} returned {type(made).__name__}; expected (model, input): a module and a tensor, or a tuple of them"
        model, inputs = made[0], made[1] if isinstance(made[1], tuple) else (made[1],)
        inputs = tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)
        model = convert(model).to(device)
        if not layers(model):
            return f"{name} gave a {type(model).__name__} without batch norm layers; expected one or more"
        if any(isinstance(layer, LazyModuleMixin) for layer in model.modules()):
            with torch.no_grad():
                model.eval()(*inputs)  # gives them their sizes, without a collective
        return Loaded(model.train(), inputs)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        return f"{name} failed with {type(error).__name__}: {error}"


def layers(model: nn.Module) -> list[Layer]:
    """Those that synchronize."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _Synchronized)]
    return [Layer(name, layer.num_features, layer._syncbn.group.size()) for name, layer in found]


def judge_layers(ranks: Sequence[tuple[Layer, ...] | str]) -> list[Finding]:
    """Whether every rank has a model, and they have the same layers; a str is why there is none."""
    advice = "give the doctor a function that works on every rank"
    failed = {text: those for text, those in by_rank(ranks).items() if isinstance(text, str)}
    if failed:
        return [Finding(f"no model on {listed(those)}, {text}", advice) for text, those in failed.items()]
    if len(by_rank(ranks)) == 1:
        return [Finding(f"every rank has the same {len(ranks[0])} batch norm layers")]
    other = next(rank for rank, found in enumerate(ranks) if found != ranks[0])
    pairs = zip((*ranks[0], None), (*ranks[other], None), strict=False)
    mine, theirs = next((a, b) for a, b in pairs if a != b)
    told = "; ".join(f"rank {rank} {_said(layer)}" for rank, layer in ((0, mine), (other, theirs)))
    return [Finding(f"the layers differ between ranks, first where {told}", "build the same model on every rank")]


def _said(layer: Layer | None) -> str:
    return (
        "has no more" if layer is None else f"has {layer.name!r} of {layer.channels} channels in a group of {layer.group_size}"
    )


class Collective(NamedTuple):
    """One of a step."""

    layer: str
    phase: str
    channels: int
    values: int
    group_size: int


class Stopwatch:
    """An observer: the collectives of a step, and the seconds in them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seen: list[Collective] = []
        self.marks: list[Any] = []  # before and after each

    def mark(self) -> None:
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def before(self, call: Call, local: Tensor) -> None:
        size = 1 if call.group is None else call.group.size()
        self.seen.append(Collective(call.layer, call.phase, call.channels, local.numel(), size))
        self.mark()

    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None:
        self.mark()

    def failed(self, call: Call, error: BaseException) -> None: ...

    def seconds(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in pairs)


class Steps(NamedTuple):
    """What a rank measured of its steps."""

    collectives: list[Collective]
    in_collectives: float  # median seconds of a step
    whole: float


def measure(loaded: Loaded, steps: int, device: torch.device) -> Steps:
    """Every rank comes."""
    waited, whole = [], []
    for _ in range(WARM_UP + steps):
        watch = Stopwatch(device)
        whole.append(timed(functools.partial(_step, loaded, watch), device)[0])
        waited.append(watch.seconds())
    return Steps(watch.seen, statistics.median(waited[WARM_UP:]), statistics.median(whole[WARM_UP:]))


def _step(loaded: Loaded, watch: Stopwatch) -> None:
    with observing.observe(watch):
        outputs = _tensors(loaded.model(*loaded.inputs))
    loss = sum(output.float().mean() for output in outputs if output.requires_grad)
    if not isinstance(loss, Tensor):
        raise ValueError("the model's output has no tensor that needs a gradient; expected one")
    loss.backward()
    loaded.model.zero_grad()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def predicted(found: Sequence[Collective], taken: Mapping[Key, Taken], group_size: int | None = None) -> float:
    """The seconds of a step's collectives, in groups of this size, or of their own."""
    return sum(cost(taken, group_size or one.group_size, one.channels, one.phase) for one in found)


def shown(steps: Sequence[Steps], taken: Mapping[Key, Taken]) -> str:
    """The layers; a step; what smaller groups would save."""
    found, world_size = steps[0].collectives, len(steps)
    by_layer: dict[str, list[Collective]] = {}
    for one in found:
        by_layer.setdefault(one.layer, []).append(one)
    rows: list[Sequence[object]] = [("layer", "channels", "collectives", "bytes", "predicted µs")]
    for name, those in by_layer.items():
        rows.append((name, those[0].channels, len(those), _bytes(those), f"{1e6 * predicted(those, taken):.0f}"))
    now, waited = predicted(found, taken), max(step.in_collectives for step in steps)
    lines = [
        table(rows),
        f"a step: {1e3 * max(step.whole for step in steps):.2f} ms; its {len(found)} collectives of {_bytes(found)} bytes: "
        f"predicted {1e3 * now:.2f} ms, measured {1e3 * waited:.2f} ms, on the slowest rank",
    ]
    for size in [*reversed(group_sizes(world_size)[:-1]), *([1] if world_size > 1 else [])]:
        other = predicted(found, taken, size)
        lines.append(f"group_size={size}: predicted {1e3 * other:.2f} ms, saves {1e3 * (now - other):.2f} ms a step")
    return "\n".join(lines)


def _bytes(those: Sequence[Collective]) -> int:
    return 8 * sum(one.values for one in those)


def judge(steps: Sequence[Steps], taken: Mapping[Key, Taken]) -> list[Finding]:
    """Whether the ranks issued the same collectives; whether they wait for each other."""
    issued = by_rank([tuple(step.collectives) for step in steps])
    if len(issued) > 1:
        told = "; ".join(f"{len(those)} on {listed(ranks)}" for those, ranks in issued.items())
        (mine, _), (theirs, (other, *_)) = list(issued.items())[:2]
        pairs = zip((*mine, None), (*theirs, None), strict=False)
        one, two = next((a, b) for a, b in pairs if a != b)
        where = f"rank 0 has {_issued(one)} and rank {other} has {_issued(two)}"
        advice = "let every rank run the same layers in the same order"
        return [Finding(f"the collectives of a step differ between ranks, {told}, first where {where}", advice)]
    now, waited = predicted(steps[0].collectives, taken), max(step.in_collectives for step in steps)
    if len(steps) > 1 and 0 < MUCH * now < waited:
        told = f"ranks spend {waited / now:.1f} times as long in the model's collectives as the collectives take alone"
        return [Finding(told, "ranks wait for each other: give them equal work, and cores of their own", note=True)]
    return [Finding("a step of the model issues the same collectives on every rank")]


def _issued(one: Collective | None) -> str:
    return "no more" if one is None else f"{one.layer!r} {one.phase}"
