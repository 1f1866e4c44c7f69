"""What `bench layer --device cuda` times: a step of one layer, of several in a row, and that row as a CUDA graph.

Requirements
    - a step of one layer pays alone for what a network pays once a step: autograd's thread, which has to wake, and the wait for
      the device at the end. So DEPTH layers in a row are a step too, and a layer's time is one part of it;
    - a replayed graph has no host in it. Code that waits for the device cannot be captured: it has no graph;
    - gradients are cleared outside of what is timed and counted, so that no step adds to those of another.
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..doctor.latency import timed
from . import peers
from .device_time import Clock
from .peers import PASSES, PEERS
from .timing import order

DEPTH = 8
WARM_UP = 3


class Step(NamedTuple):
    """Of one variant: `forward` and `backward` in turn, and between steps `clear`."""

    forward: Callable[[], None]
    backward: Callable[[], None]
    clear: Callable[[], None]

    def both(self) -> None:
        self.forward()
        self.backward()


def step_of(name: str, layer: nn.Module, x: Tensor, dy: Tensor, depth: int = 1) -> Step:
    """Of as many layers of a peer, each with the state of `layer`, on a leaf of their own."""
    made, leaf = peers.make(name, *(copy.deepcopy(layer) for _ in range(depth))), x.detach().requires_grad_()
    held: list[Tensor] = []

    def clear() -> None:
        leaf.grad = None
        made.zero_grad()

    return Step(lambda: held.append(made(leaf)), lambda: held.pop().backward(dy), clear)


def copies(x: Tensor, depth: int = 1) -> Step:
    """Copies of as many bytes as the passes of as many batch norms move."""
    runs = []
    for passes in PASSES:
        source = torch.zeros(passes * x.nbytes // 2, dtype=torch.uint8, device=x.device)
        runs.append(functools.partial(torch.empty_like(source).copy_, source))

    def repeated(run: Callable[[], object]) -> None:
        for _ in range(depth):
            run()

    return Step(functools.partial(repeated, runs[0]), functools.partial(repeated, runs[1]), lambda: None)


def captured(
    name: str, run: Callable[[], object], clear: Callable[[], object], device: torch.device
) -> Callable[[], None] | None:
    """The replay of what a variant's `run` does as a graph, `clear` between runs; None on a CPU, and, said, where it fails."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # what is made once is made outside of the graph
            run()
            clear()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:  # whatever it was that a capture does not allow
        print(f"syncbn bench: {name} is not captured as a graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    finally:
        clear()
    return graph.replay


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


class Clocked(NamedTuple):
    """Seconds by the clock, one for each repetition."""

    eager: list[float]
    replay: list[float]  # as a graph; none where there is none


def using(name: str) -> contextlib.AbstractContextManager[None]:
    return peers.using(name) if name in PEERS else contextlib.nullcontext()


def interleaved(steps: Mapping[str, Step], repeats: int, device: torch.device, device_clock: Clock) -> dict[str, Taken]:
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


def in_a_row(
    steps: Mapping[str, Step], replays: Mapping[str, Callable[[], None] | None], repeats: int, device: torch.device
) -> dict[str, Clocked]:
    """What a layer of several in a row takes, as `interleaved` has it of single ones."""
    taken = {name: Clocked([], []) for name in steps}
    for repeat in range(-1, repeats):
        for name in order(list(steps), repeat):
            chain, replay = steps[name], replays[name]
            with using(name):
                eager = timed(chain.both, device)[0] / DEPTH
                chain.clear()
                replayed = None if replay is None else timed(replay, device)[0] / DEPTH
            if repeat >= 0:
                taken[name].eager.append(eager)
                taken[name].replay.extend(() if replayed is None else (replayed,))
    return taken
