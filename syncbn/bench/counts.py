"""Kernel launches and waits of one step, counted by the profiler, and the operators that it calls."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .memory import quiet

MARK = "syncbn bench: counted"
LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel|GraphLaunch)")  # of the runtime and of the driver, which Triton calls
WAIT = re.compile(r"cu(da)?(\w+Synchronize|Memcpy(?!\w*Async))")
NO_KERNEL = re.compile(r"Mem(cpy|set)|\w+ (Sync|Wait)")
TO_HOST = "Memcpy DtoH"
BACKENDS = {"cudnn_batch_norm": "cudnn", "miopen_batch_norm": "miopen", "native_batch_norm": "native"}


class Counts(NamedTuple):
    """Of one step; on a CPU all are 0."""

    launches: int  # calls that launch a kernel, or a graph
    kernels: int  # that ran on the device
    host_synchronizations: int  # calls that wait for the device
    copies_to_host: int


def of(run: Callable[[], object], device: torch.device) -> tuple[Counts | None, str]:
    """Of a step that was run before: the counts, None where the profiler sees no GPU; and torch's batch norm backend."""
    if device.type == "cuda":
        _first_profile()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with quiet(), profile(activities=activities, acc_events=True) as profiled:
        with record_function(MARK):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = list(profiled.events())
    found = counted(events)
    return (None if device.type == "cuda" and not any(found) else found), backend(event.name for event in events)


@functools.cache
def _first_profile() -> None:
    """The first of a process starts up, and may miss what it is to see."""
    with quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True):
        torch.zeros(1, device="cuda").add_(1).item()


def counted(events: Iterable[Any]) -> Counts:
    """Of the profiler's events: what the host called inside the mark, whichever thread; all that the device did."""
    events = list(events)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    mark = next(event.time_range for event in on_host if event.name == MARK)
    called = [event.name for event in on_host if mark.start <= event.time_range.start <= mark.end]
    done = [event.name for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    return Counts(
        sum(LAUNCH.match(name) is not None for name in called),
        sum(NO_KERNEL.match(name) is None for name in done),
        sum(WAIT.match(name) is not None for name in called),
        sum(name.startswith(TO_HOST) for name in done),
    )


def backend(operators: Iterable[str]) -> str:
    """Which of torch's batch norms is among the operators; empty: none."""
    names = {name.removeprefix("aten::") for name in operators}
    return next((told for name, told in BACKENDS.items() if name in names), "")
