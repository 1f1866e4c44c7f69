"""What a pass takes on the device, as it does in a training step: the host is ahead, and the operands are in no cache.

Requirements
    - before each pass the device writes FLUSHES buffers of FLUSHED bytes, many times its L2 cache: that empties the cache, and
      takes a millisecond, in which the host queues the pass, so that what is timed are kernels and not their dispatch;
    - whether the host was ahead is told: where it was not, since code waits for the device or is slow to queue, the gaps count;
    - a CPU has neither queue nor events: there it is wall-clock time, with whatever is in its caches.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

FLUSHED, FLUSHES = 2**28, 16


class Pass(NamedTuple):
    """One run."""

    seconds: float
    ahead: bool  # the host had queued all of it before the device began


class Clock(Protocol):
    def __call__(self, run: Callable[[], object]) -> Pass: ...


class EventClock:
    """By CUDA events around the pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> Pass:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        for _ in range(FLUSHES):
            self.buffer.zero_()
        start.record()
        run()
        end.record()
        ahead = not start.query()
        torch.cuda.synchronize(self.device)
        return Pass(start.elapsed_time(end) / 1e3, ahead)


def wall_clock(run: Callable[[], object]) -> Pass:
    start = time.perf_counter()
    run()
    return Pass(time.perf_counter() - start, False)


def clock(device: torch.device) -> Clock:
    """The device's own."""
    return EventClock(device) if device.type == "cuda" else wall_clock
