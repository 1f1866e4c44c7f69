"""A world that communicates nothing, the launches and waits of a step, the time of a pass: what benchmarks of a GPU count."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType

from syncbn import collectives
from syncbn.bench import counts, device_time, peers
from syncbn.bench.fake_world import RANKS, fake_world, gather_name
from syncbn.observing import Call

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


# The world of eight


def operations(run) -> list[str]:
    """The operators that write to a tensor, from Python or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        run()
    return [event.name for event in profiled.events() if event.name in ("aten::copy_", "aten::add_")]


def test_a_collective_is_one_launch_for_everybody():
    """Torch's own fake gather issues a copy for each rank, its all_reduce nothing."""
    with fake_world(RANKS):
        message, into = torch.arange(3.0, dtype=torch.float64), torch.empty(3 * RANKS, dtype=torch.float64)
        assert operations(lambda: dist.all_reduce(message, group=dist.group.WORLD)) == ["aten::add_"]
        call = Call("layer", "forward", 1, torch.float32, dist.group.WORLD)
        assert operations(lambda: collectives.all_reduce(message, call)) == ["aten::add_"]
        assert message.tolist() == [0, 1, 2]
        assert operations(lambda: getattr(dist, gather_name())(into, message, dist.group.WORLD, async_op=False)) == [
            "aten::copy_"
        ]
        assert into.tolist() == [0, 1, 2] * RANKS
    assert not dist.is_initialized()


def test_a_world_is_left_as_it_was_when_something_fails():
    before = dist.ProcessGroup.allreduce, getattr(dist, gather_name())
    with contextlib.suppress(OSError), fake_world(2):
        assert dist.ProcessGroup.allreduce is not before[0]
        raise OSError("planted")
    assert (dist.ProcessGroup.allreduce, getattr(dist, gather_name())) == before
    assert not dist.is_initialized()


def test_the_world_calls_what_torchs_layer_calls(operators):
    """Its gather has another name from one torch to the next; a call that went past the world would issue eight copies."""
    layer, x = peers.PEERS["torch-sync"].make(nn.BatchNorm1d(4)), torch.randn(16, 4)
    with fake_world(RANKS), mock.patch.object(dist, gather_name(), wraps=getattr(dist, gather_name())) as stand_in:
        layer(x.requires_grad_()).sum().backward()
    assert stand_in.call_count == 1


# Counts and clocks


def event(name: str, start: float, device: DeviceType = DeviceType.CPU, end: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device,
        time_range=SimpleNamespace(start=start, end=start + 1 if end is None else end),
        is_user_annotation=name == counts.MARK,
    )


def test_launches_and_waits_are_those_of_the_step():
    inside = [
        *("cudaLaunchKernel", "cudaLaunchKernelExC_v11060", "cuLaunchKernel", "cuLaunchKernelEx"),
        *("cudaLaunchCooperativeKernel", "cudaGraphLaunch"),
        *("cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventRecord", "aten::add", "cudaStreamIsCapturing", "cudaMalloc"),
        *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    ]
    on_device = [
        *("Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)", "Memcpy DtoD (Device -> Device)"),
        *("Memset (Device)", "Stream Sync", "Event Sync", "Stream Wait Event", counts.MARK),
        *("void at::native::vectorized_elementwise_kernel<4>", "moments", "memory_bound_kernel"),
    ]
    events = [
        event(counts.MARK, 10, end=100),
        event("cudaLaunchKernel", 5),
        event("cudaDeviceSynchronize", 101),
        *(event(name, 20 + number) for number, name in enumerate(inside)),
        *(event(name, 90 + number, DeviceType.CUDA) for number, name in enumerate(on_device)),
    ]
    assert counts.counted(events) == counts.Counts(6, 3, 3, 2)


def test_a_step_on_a_cpu_launches_nothing_and_names_its_operator():
    layer, x = nn.BatchNorm1d(4), torch.randn(16, 4)
    assert counts.of(lambda: layer(x), CPU) == (counts.Counts(0, 0, 0, 0), "native")
    assert counts.backend(["aten::batch_norm", "aten::cudnn_batch_norm"]) == "cudnn"
    assert counts.backend(["aten::batch_norm_stats"]) == ""


def test_a_pass_is_timed_behind_a_flush(monkeypatch):
    """What the device is told, in order; and whether its first event was still to come when all had been queued."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.name = ("start", "end")[Event.made % 2]
            Event.made += 1

        made = 0

        def record(self):
            told.append(self.name)

        def query(self):
            return self.name != "start" or late

        def elapsed_time(self, end):
            assert (self.name, end.name) == ("start", "end")
            assert told[-1] == "synchronize"
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(device_time, "FLUSHED", 16)
    clock = device_time.EventClock(CPU)
    monkeypatch.setattr(clock, "buffer", SimpleNamespace(zero_=lambda: told.append("flush")))
    for late in (False, True):
        told.clear()
        assert clock(lambda: told.append("run")) == device_time.Pass(2.5e-3, not late)
        assert told == ["synchronize", *["flush"] * device_time.FLUSHES, "start", "run", "end", "synchronize"]
