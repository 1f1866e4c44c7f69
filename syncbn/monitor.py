"""What synchronizing does in a training run, read from the messages that the layers reduce anyway.

Requirements
    - no collective, no pass over data, no wait for the device but in `read`; the bits of a distributed run stay;
    - figures of one rank: what it sees of itself beside the sums of all;
    - a layer is known by itself and a backward by its forward, not by names or by order: other models may run between;
    - what is kept does not grow with the number of steps;
    - nothing is left behind in the model.
"""

import contextlib
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import equations, observing
from .function import Forward
from .names import named
from .observing import Call

KEPT = 4096  # collectives, of which a GPU may not have been through all


class LayerReport(NamedTuple):
    """A layer's figures, means over its calls; NaN where no call had them. i = (v + ε)^(−1/2) is of the global statistics."""

    mean_shift: float  # root mean square over channels of (μ_local − μ)·i: how far x̂ would be off by a local mean
    std_shift: float  # root mean square over channels of ((v_local + ε)/(v + ε))^(1/2) − 1
    mean_over_std: float  # largest |μ|·i of any channel and call
    variance_error: float  # 1e-14·mean_over_std²: the relative error of v that float64 sums bring at that ratio
    smoothness_slack: float  # Σ over channels of γ²·i²·(G1² + (G2·i)²)/n


class Report(NamedTuple):
    """What was seen since the monitor began, or was last read."""

    seconds: float  # of that time
    share: float  # of it in the layers' collectives, waiting for other ranks included
    collectives: int
    layers: dict[str, LayerReport]  # by path in the model, in its order; a layer that is the model, by its class

    def flat(self, prefix: str = "syncbn/") -> dict[str, float]:
        """As one dictionary for a logger: prefix + "share_of_step", prefix + path + "/mean_shift", ...; without what is NaN."""
        values = {f"{prefix}share_of_step": self.share}
        for path, layer in self.layers.items():
            values |= {f"{prefix}{path}/{name}": value for name, value in layer._asdict().items()}
        return {name: value for name, value in values.items() if not math.isnan(value)}


@contextlib.contextmanager
def monitor(model: nn.Module) -> Iterator["Monitor"]:
    """Watch the layers of a model in the training steps run inside.

        with syncbn.monitor(model) as watched:
            for x, target in batches:
                step(model, x, target)
                print(watched.read())

    **Does synchronizing matter here?** `mean_shift` and `std_shift` are the noise that local statistics would add on this rank.
    Shares drawn alike from one distribution give about (1/n_local − 1/n)^(1/2) and half of (2/n_local − 2/n)^(1/2) for n values
    per channel that are independent, which positions of an image are not; ranks with other data, more.

    **Precision.** `mean_over_std` is what makes E[x²] − E[x]² lose digits: 2^−24·ratio² relative to the variance with sums in
    float32, 1e-14·ratio² (`variance_error`) with the float64 sums of syncbn.

    **Smoothness.** With g the gradient of the loss by a layer's output, that by its input is smaller than γ·i·g: in squared
    norm by at least `smoothness_slack`, per channel γ²·i²·(⟨1, g⟩² + ⟨g, x̂⟩²)/n, what batch norm's backward takes out
    (Santurkar et al. 2018, arXiv:1805.11604, theorem 4.1). ⟨1, g⟩ and ⟨g, x̂⟩ are G1 and G2·i, which the layers reduce. It is in
    units of the loss that each rank differentiates: that of DistributedDataParallel is W times the rank's part of the mean.

    A layer in eval mode, and one in compiled code, is not seen. The layers of a process that is alone take the synchronized
    path while they are watched: equal to rounding, not to the bit. There, between a checkpointed forward and its backward,
    watch all of a layer's forwards or none.

    Args:
        model: any model with layers of ours, in DistributedDataParallel or not. Inside, messages name its layers by their
            paths in it.

    Raises:
        ValueError: no layer of ours in the model.
    """
    with named(model) as layers:
        watching = Monitor(layers)
        with observing.observe(watching):
            yield watching


class Monitor:
    """An observer of the layers given, by path; `monitor` makes it."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.paths = {layer: path for path, layer in layers.items()}
        self.began: list[Callable[[], Callable[[], float]]] = []
        # i (C,) and n () of the forwards whose backward may come.
        self.pending: weakref.WeakKeyDictionary[Forward, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self._begin()

    def read(self) -> Report:
        """The figures since the beginning or the last call, which then begin anew. Between steps: waits for the device."""
        self._add_up(0)
        seconds = time.perf_counter() - self.start
        found = {path: sums.report() for path in self.paths.values() if (sums := self.sums.get(path)) is not None}
        report = Report(seconds, self.seconds / seconds, self.collectives, found)
        self._begin()
        return report

    def _begin(self) -> None:
        self.start = time.perf_counter()
        self.collectives, self.seconds = 0, 0.0  # in those that have been added up
        self.spent: deque[Callable[[], float]] = deque()  # in each that has not
        self.sums: dict[str, _Sums] = {}

    def _add_up(self, kept: int) -> None:
        """All collectives but the last ones: on a GPU those of long ago, for which nothing waits."""
        while len(self.spent) > kept:
            self.seconds += self.spent.popleft()()

    def before(self, call: Call, local: Tensor) -> None:
        if call.forward is not None and call.forward.layer in self.paths:
            self.began.append(_stopwatch(local.device))

    @torch.no_grad()
    def after(self, call: Call, local: Tensor, reduced: Tensor) -> None:
        if call.forward is None or call.forward.layer not in self.paths:
            return
        self.spent.append(self.began.pop()())
        self.collectives += 1
        self._add_up(KEPT)
        if call.sums and call.phase != "backward" and reduced.numel() == 2 * call.channels + 1:
            self._forward(call, call.forward, local, reduced)
        if call.sums and call.phase == "backward" and reduced.numel() == 2 * call.channels:
            self._backward(call.forward, reduced)

    def failed(self, call: Call, error: BaseException) -> None:
        self.began.clear()

    def _forward(self, call: Call, forward: Forward, local: Tensor, reduced: Tensor) -> None:
        mean, var, n = equations.statistics(reduced)
        invstd = (var + forward.eps).rsqrt()
        self.pending[forward] = invstd, n
        if call.phase == "recompute":
            return
        own_mean, own_var, own_n = equations.statistics(local)
        shift = ((own_mean - mean) * invstd).square().mean().sqrt()
        scale = ((own_var + forward.eps).sqrt() * invstd - 1).square().mean().sqrt()
        nothing = torch.full_like(n, math.nan)
        shifts = torch.where(own_n > 0, torch.stack([shift, scale]), nothing)
        ratio = torch.where(n > 0, (mean.abs() * invstd).max(), nothing)
        self.sums.setdefault(self.paths[forward.layer], _Sums()).add_forward(shifts, ratio)

    def _backward(self, forward: Forward, reduced: Tensor) -> None:
        if forward not in self.pending:
            return
        (invstd, n), weight = self.pending[forward], forward.weight
        sum_dy, sum_dy_xmu = reduced.chunk(2)
        scale = invstd if weight is None else invstd * weight
        slack = (scale.square() * (sum_dy.square() + (sum_dy_xmu * invstd).square())).sum() / n.clamp(min=1)
        self.sums.setdefault(self.paths[forward.layer], _Sums()).add_backward(slack)


class _Sums:
    """Of a layer's calls, on the device of the last one; as much of them whatever their number."""

    def __init__(self) -> None:
        self.shifts: Tensor | None = None  # (2, 2) sums of mean_shift and std_shift, and of calls that had them
        self.ratio: Tensor | None = None  # () the largest
        self.slack: Tensor | None = None  # () the sum
        self.backwards = 0

    def add_forward(self, shifts: Tensor, ratio: Tensor) -> None:
        known = ~shifts.isnan()
        shifts = torch.stack([torch.where(known, shifts, 0), known.to(shifts.dtype)])
        self.shifts = shifts if self.shifts is None else self.shifts.to(shifts.device) + shifts
        self.ratio = ratio if self.ratio is None else torch.fmax(self.ratio.to(ratio.device), ratio)

    def add_backward(self, slack: Tensor) -> None:
        self.slack = slack if self.slack is None else self.slack.to(slack.device) + slack
        self.backwards += 1

    def report(self) -> LayerReport:
        mean_shift, std_shift = (math.nan, math.nan) if self.shifts is None else (self.shifts[0] / self.shifts[1]).tolist()
        ratio = math.nan if self.ratio is None else self.ratio.item()
        slack = math.nan if self.slack is None else self.slack.item() / self.backwards
        return LayerReport(mean_shift, std_shift, ratio, 1e-14 * ratio**2, slack)


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts now; a call stops it and gives a function that tells the seconds between, waiting for the device if it has to."""
    if device.type == "cpu":
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - start
            return lambda: seconds

        return stop
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()

    def stop_event() -> Callable[[], float]:
        last.record()

        def elapsed() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1000

        return elapsed

    return stop_event
