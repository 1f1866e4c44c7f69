"""The benchmarks of a GPU, as far as they run without one: stand-ins for torch's operators, made-up rows for pictures."""

import argparse
import contextlib
import csv
import functools
import itertools
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cuda_operators
import pytest
import torch
import torch.distributed as dist
from gpus import needs_gpu
from matplotlib.figure import Figure
from torch import nn
from torch.autograd import DeviceType

from syncbn import collectives, kernels
from syncbn.__main__ import main
from syncbn.bench import (
    cases,
    check,
    counts,
    device_time,
    draw_layer_cuda,
    draw_merge,
    layer,
    layer_cuda,
    layer_cuda_summary,
    layer_step,
    memory,
    merge,
    network,
    peers,
    plot,
    resnet50,
    rows,
    step,
)
from syncbn.bench.fake_world import RANKS, fake_world, gather_name
from syncbn.bench.run import add_command
from syncbn.observing import Call

CPU = torch.device("cpu")
VARIANTS = ["torch", "torch-sync", "torch-sync-unmasked", "syncbn-aten"]


@pytest.fixture(autouse=True)
def heap_of_this_process_as_it_is(monkeypatch):
    monkeypatch.setattr(layer, "keep_heap", lambda: False)


@pytest.fixture
def operators():
    with cuda_operators.on_cpu():
        yield


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parsed(command: str, results: Path) -> argparse.Namespace:
    """The options of a command, which is not run."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["bench", *command.split(), "--results", str(results)])


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


# The layer


def test_the_cases_of_a_gpu(tmp_path):
    found = cases.chosen(parsed("layer --device cuda", tmp_path))
    names = {(case.layout, case.name) for case in found}
    for batch, (channels, size) in ((batch, one) for batch in (2, 32, 128) for one in cases.RESNET50):
        assert {(layout, f"{batch}x{channels}x{size}x{size}") for layout in ("contiguous", "channels_last")} <= names
    assert {case.shape[1] for case in found} >= {3, 48, 1000}
    assert {case.layout for case in found} == {"contiguous", "channels_last", "contiguous 3d", "channels_last 3d", "rows"}
    assert {case.dtype for case in found} == {torch.float32, torch.bfloat16}
    assert len(found) == 2 * len(names)
    assert sum(case.by_compiler for case in found) == 12
    assert len(cases.chosen(parsed("layer --device cuda --quick", tmp_path))) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "shape"), [("channels_last", (4, 3, 5, 5)), ("rows", (32, 8)), ("contiguous 3d", (2, 8, 3, 4, 4))]
)
def test_rows_of_a_case(dtype, layout, shape, operators):
    """Every variant passes the check in a world of one, and is timed in a world of eight."""
    found = layer_cuda.measure(cases.Case(layout, shape, dtype, 1), VARIANTS, 2, CPU)
    assert [row["variant"] for row in found] == [*VARIANTS, "copy"]
    by_name = {row["variant"]: row for row in found}
    assert by_name["torch"]["backend"] == "native"
    assert by_name["torch"]["ratio"] == by_name["torch-sync"]["over_torch_sync"] == by_name["torch"]["device_ratio"] == 1
    assert by_name["torch"]["chain_ratio"] == by_name["torch-sync"]["chain_over_torch_sync"] == 1
    assert by_name["copy"]["forward_of_copy"] == by_name["copy"]["backward_of_copy"] == 1
    assert by_name["copy"]["error_y"] == ""
    for row in found:
        assert row["bytes"] == math.prod(shape) * dtype.itemsize
        assert (row["ranks"], row["launches"], row["host_synchronizations"]) == (8, 0, 0)
        assert row["replay_microseconds_median"] == "", "there are no graphs on a CPU"
        for part in ("", "chain_", "forward_", "backward_"):
            times = [row[f"{part}microseconds_{which}"] for which in ("lower_quartile", "median", "upper_quartile")]
            assert 0 < times[0] <= times[1] <= times[2]
        assert row["variant"] == "copy" or float(row["error_dx"]) < 2e-2


def test_without_torchs_operators_there_is_no_ratio_over_them():
    found = layer_cuda.measure(cases.Case("rows", (32, 8), torch.float32, 1), ["torch", "syncbn-aten"], 2, CPU)
    columns = ("over_torch_sync", "chain_over_torch_sync", "device_over_torch_sync")
    assert {row[column] for row in found for column in columns} == {""}


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_local_batch_norm_under_the_compiler(monkeypatch):
    """Traced, not compiled, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shape = (8, 512, 7, 7)
    names = ["torch", "torch-inductor"]
    found = layer_cuda.measure(cases.Case("contiguous", shape, torch.float32, 1), names, 2, CPU)
    assert [row["variant"] for row in found] == [*names, "copy"]
    found = layer_cuda.measure(cases.Case("contiguous", (3, *shape[1:]), torch.float32, 1), names, 2, CPU)
    assert [row["variant"] for row in found] == ["torch", "copy"]


def test_the_kernels_of_a_variant_are_forced(monkeypatch):
    """Whatever the size from which those in Triton are chosen."""
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", 7.0)
    seen = {}
    for name in ("syncbn", "syncbn-host", "syncbn-aten", "torch"):
        with peers.using(name):
            seen[name] = kernels.TRITON_FROM_BYTES, kernels.BY_LIBRARY
    assert seen == {"syncbn": (0, False), "syncbn-host": (0, True), "syncbn-aten": (math.inf, False), "torch": (7.0, True)}
    assert (kernels.TRITON_FROM_BYTES, kernels.BY_LIBRARY) == (7.0, True)


def test_the_copy_moves_the_bytes_of_the_passes():
    moved = []
    x = torch.empty(10, 4)
    step = layer_step.copies(x)
    copy_ = torch.Tensor.copy_
    with mock.patch.object(
        torch.Tensor, "copy_", lambda self, other: moved.append(self.nbytes + other.nbytes) or copy_(self, other)
    ):
        step = layer_step.copies(x)
        step.both()
    assert moved == [3 * x.nbytes, 5 * x.nbytes]


def test_no_step_adds_to_the_gradients_of_another():
    layer, x = nn.BatchNorm1d(4), torch.randn(16, 4)
    step = layer_step.step_of("torch", layer, x, torch.ones(16, 4))
    seen = []
    with mock.patch.object(nn.Module, "zero_grad", lambda module: seen.append(module)):
        layer_step.interleaved({"torch": step}, 2, CPU, device_time.wall_clock)
    assert len(seen) == 2 * 3, "after the step, and after its passes, warm-up included"


def test_layers_in_a_row_are_one_step_and_a_layer_is_a_part_of_it():
    layer, x = nn.BatchNorm1d(4), torch.randn(16, 4)
    forwards, real = [], nn.BatchNorm1d.forward
    with mock.patch.object(nn.BatchNorm1d, "forward", lambda layer, x: forwards.append(id(layer)) or real(layer, x)):
        step = layer_step.step_of("torch", layer, x, torch.ones(16, 4), 8)
        step.both()
    assert len(forwards) == len(set(forwards)) == 8

    def timed(run, device):
        run()
        return 8.0, None

    step = step._replace(clear=mock.Mock(wraps=step.clear))
    with mock.patch.object(layer_step, "timed", timed):
        taken = layer_step.in_a_row({"torch": step}, {"torch": lambda: None}, 3, CPU)
    assert taken == {"torch": layer_step.Clocked([1.0] * 3, [1.0] * 3)}
    assert step.clear.call_count == 4, "after each, the one that warms up included"
    moved = layer_step.copies(x, 8)
    with mock.patch.object(torch.Tensor, "copy_", mock.Mock()) as copied:
        layer_step.copies(x, 8).both()
    assert copied.call_count == 16
    assert layer_step.captured("copy", moved.both, moved.clear, CPU) is None


def test_what_is_not_captured_is_named_and_leaves_nothing(monkeypatch, capsys):
    """A stand-in for the graphs of a GPU, the second of which fails."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    done: list[str] = []

    @contextlib.contextmanager
    def graph(of):
        yield
        if done.count("run") > layer_step.WARM_UP + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    run, clear = (functools.partial(done.append, name) for name in ("run", "clear"))
    assert layer_step.captured("one", run, clear, torch.device("cuda")) is torch.cuda.CUDAGraph.return_value.replay
    assert done == ["run", "clear"] * (layer_step.WARM_UP + 1)
    assert capsys.readouterr().err == ""
    assert layer_step.captured("other", run, clear, torch.device("cuda")) is None
    assert done == ["run", "clear"] * 2 * (layer_step.WARM_UP + 1)
    assert capsys.readouterr().err == (
        "syncbn bench: other is not captured as a graph: operation not permitted when stream is capturing\n"
    )


def test_several_layers_are_compiled_as_one(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(module) or module)
    layer_step.step_of("torch-inductor", nn.BatchNorm1d(4), torch.randn(16, 4), torch.ones(16, 4), 8)
    assert [len(module) for module in compiled] == [8]


def test_a_case_that_is_wrong_has_no_rows_and_the_others_have(operators, tmp_path, capsys):
    real = layer_cuda.outputs_of

    def wrong(name, x, dy, layer):
        found = real(name, x, dy, layer)
        return found._replace(y=found.y * 1.05) if name == "syncbn-aten" and x.shape[1] == 2048 else found

    options = parsed(
        "layer --shapes 256x64 8x2048x7x7 --dtypes float32 --threads 1 --repeats 2 --layouts contiguous rows", tmp_path
    )
    options.variants = ["torch-sync", "syncbn-aten", "plain-inductor"]
    with mock.patch.object(layer_cuda, "outputs_of", wrong):
        assert layer_cuda.run(options) == 1
    printed, errors = capsys.readouterr()
    assert "syncbn-aten, float32, contiguous, 8x2048x7x7 is not batch norm" in errors
    assert "y by" in errors
    assert "plain-inductor (the same under torch.compile) is skipped: its collective is in the compiled graph" in errors
    found = read(tmp_path / "layer_cuda.csv")
    assert [(row["variant"], row["shape"]) for row in found] == [
        (name, "256x64") for name in ("torch", "torch-sync", "syncbn-aten", "copy")
    ]
    assert {"driver", "cuda", "triton", "nccl", "torch", "hardware"} <= set(found[0])
    assert printed.endswith("layer_cuda.csv\n")
    assert not (tmp_path / "layer.csv").exists()


def test_a_gpu_has_its_own_rows_and_is_checked_against_them(operators, tmp_path, monkeypatch, capsys):
    real = layer_cuda.measure
    ratios = iter((1.0, 1.19, 1.21))

    def measure(*given):
        ratio = next(ratios)
        return [row | {"ratio": ratio} for row in real(*given)]

    monkeypatch.setattr(layer_cuda, "measure", measure)
    command = "layer --shapes 256x64 --dtypes float32 --threads 1 --repeats 2 --variants syncbn-aten"
    assert layer_cuda.run(parsed(command, tmp_path)) == 0
    before = (tmp_path / "layer_cuda.csv").read_text()
    capsys.readouterr()
    for status in (0, 1):
        assert layer_cuda.run(parsed(f"{command} --check", tmp_path)) == status
    assert (tmp_path / "layer_cuda.csv").read_text() == before
    assert check.LIMIT == 1.2
    assert next(ratios, None) is None


def test_the_command_measures_a_gpu_by_its_own_program(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(layer_cuda, "run", lambda options: asked.append(options.device) or 0)
    assert main(["bench", "layer", "--device", "cuda", "--results", str(tmp_path)]) == 0
    assert asked == ["cuda"]


def made(variant: str, megabytes: float, forward: float, ratio: float, **more) -> dict[str, object]:
    """A row that nobody measured."""
    row = {
        "variant": variant,
        "dtype": "float32",
        "layout": "contiguous",
        "shape": f"1x{megabytes:g}",
        "bytes": megabytes * 1e6,
    }
    row |= {"ratio": ratio, "over_torch_sync": ratio / 2, "forward_of_copy": forward, "backward_of_copy": forward - 0.1}
    row |= {"chain_over_torch_sync": ratio / 4, "device_over_torch_sync": "", "chain_microseconds_median": 100.0}
    row |= {"replay_microseconds_median": ""}
    return row | {"launches": 5, "host_synchronizations": "", "peak_over_torch": 1.0} | more


def test_what_is_printed_of_rows():
    found = [
        made("torch", 400, 0.5, 1.0),
        made("syncbn", 400, 0.9, 0.5),
        made("syncbn", 100, 0.86, 1.5),
        made("syncbn", 30, 0.84, 2.5, launches=7),
        made("syncbn", 1, 0.01, 1.25),
    ]
    told = layer_cuda_summary.targets(found)
    assert told == [
        "BAD  syncbn, float32, contiguous, forward: 2 of 3 tensors of 25 MB and more have 85% of the bandwidth of a copy; "
        "least 84%, 1x30",
        "BAD  syncbn, float32, contiguous, backward: 2 of 3 tensors of 25 MB and more have 75% of the bandwidth of a copy; "
        "least 74%, 1x30",
    ]
    assert layer_cuda_summary.targets(found[:2])[0].startswith("ok   syncbn, float32, contiguous, forward: 1 of 1")
    assert layer_cuda_summary.targets(found[-1:]) == [
        "no tensor of 25 MB or more was measured with syncbn: nothing is said of the targets"
    ]
    assert layer_cuda_summary.lost(found) == [
        "syncbn is slower than torch's local batch norm, by the clock, in 3 of 4 cases",
        "  float32, contiguous, 1x30: 2.50",
        "  float32, contiguous, 1x100: 1.50",
        "  float32, contiguous, 1x1: 1.25",
        "syncbn is slower than torch-sync, by the clock, in 1 of 4 cases",
        "  float32, contiguous, 1x30: 1.25",
    ]
    assert layer_cuda_summary.faster(found) == [
        "BAD  syncbn, tensors under 10 MB, a layer alone, by the clock: 1.60 to 1.60 times as fast as torch-sync, median 1.60; "
        "0 of 1 reach 3",
        "ok   syncbn, tensors under 10 MB, a layer of several in a row, by the clock: 3.20 to 3.20 times as fast as "
        "torch-sync, median 3.20; 1 of 1 reach 3",
        "BAD  syncbn, tensors of 50 MB and more, a layer alone, by the clock: 1.33 to 4.00 times as fast as torch-sync, median "
        "2.67; 1 of 2 reach 1.5",
        "ok   syncbn, tensors of 50 MB and more, a layer of several in a row, by the clock: 2.67 to 8.00 times as fast as "
        "torch-sync, median 5.33; 2 of 2 reach 1.5",
    ]
    replayed = layer_cuda_summary.faster([made("syncbn", 1, 0.01, 1.25, replay_microseconds_median=12.5)])
    assert replayed[-1] == "     syncbn, replayed as a graph: 12.5 microseconds a layer, launch by launch 100.0"
    by_host = made("syncbn-host", 1, 0.01, 1.25)
    assert layer_cuda_summary.lost([*found, by_host], "syncbn-host")[0].endswith("in 1 of 1 cases")
    assert "syncbn-host, tensors under" in layer_cuda_summary.summary([*found, by_host])
    assert "syncbn-host" not in layer_cuda_summary.summary(found)
    whole = layer_cuda_summary.summary(found).splitlines()
    assert whole[2].split() == [
        "syncbn",
        "float32",
        "contiguous",
        "1.24",
        "2.50",
        "0.62",
        "1.25",
        "0.86",
        "0.76",
        "5",
        "to",
        "7",
        "-",
        "1.00",
    ]


def test_versions_below_torch():
    found = rows.accelerator(CPU)
    assert list(found) == ["driver", "cuda", "triton", "nccl"]
    assert (found["driver"], found["cuda"], found["nccl"]) == ("", "", "")
    assert rows._version_of("csv") == csv.__version__
    assert rows._version_of("no_such_package") == ""


# The network


def test_the_networks_are_those_of_the_paper():
    made = network.resnet50()
    assert sum(p.numel() for p in made.parameters()) == 25_557_032
    assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == 53
    assert network.resnet50(4)(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


NETWORK = "resnet50 --device cpu --width 4 --images 8 --size 64 --repeats 2"


@pytest.fixture
def brief(monkeypatch):
    """A single setting, and without the profiler, which takes seconds for a network."""
    monkeypatch.setattr(resnet50, "WARM_UP", 1)
    monkeypatch.setattr(resnet50, "SETTINGS", resnet50.SETTINGS[1:2])
    monkeypatch.setattr(memory, "peak", lambda run, device: 1)
    monkeypatch.setattr(counts, "of", lambda run, device: (counts.Counts(5, 5, 0, 0), ""))


def test_a_step_of_the_network(operators, brief, tmp_path, capsys):
    """Every variant trains as torch's does, and is timed beside it."""
    assert main(["bench", *NETWORK.split(), "--results", str(tmp_path)]) == 0
    found = read(tmp_path / "resnet50.csv")
    names = ["torch", "torch-sync", "torch-sync-unmasked", "syncbn", "syncbn-aten"]
    if peers.available("syncbn", CPU):
        names.remove("syncbn")
    assert [(row["precision"], row["layout"], row["variant"]) for row in found] == [
        ("float32", "channels_last", name) for name in names
    ]
    for row in found:
        assert 0 < float(row["milliseconds_lower"]) <= float(row["milliseconds_median"]) <= float(row["milliseconds_upper"])
        assert (float(row["over_torch_median"]) == 1) == (row["variant"] == "torch")
        assert (float(row["over_torch_sync_median"]) == 1) == (row["variant"] == "torch-sync")
        assert float(row["error_gradients"]) < 1e-2
        assert row["replay_milliseconds_median"] == row["replay_over_torch_median"] == "", "there are no graphs on a CPU"
    assert "over torch-sync" in capsys.readouterr().out


def test_a_network_that_waits_is_not_captured(operators, brief, tmp_path, monkeypatch, capsys):
    """The others' replays are columns of their own, beside torch's."""
    captured, replayed = [], []

    def stand_in(name, run, clear, device):
        number = len(captured)
        captured.append(run)
        return lambda: replayed.append(number) or 0.01 * (1 + number)

    def timed(run, device):
        return run() or 1.0, None

    waits = iter([0, 3, 0, 0, 0])
    monkeypatch.setattr(counts, "of", lambda run, device: (counts.Counts(5, 5, next(waits), 0), ""))
    monkeypatch.setattr(resnet50, "captured", stand_in)
    monkeypatch.setattr(resnet50, "timed", timed)
    assert main(["bench", *NETWORK.split(), "--results", str(tmp_path)]) == 0
    found = {row["variant"]: row for row in read(tmp_path / "resnet50.csv")}
    assert len(captured) == len(found) - 1
    assert sorted(replayed) == sorted([*range(len(captured))] * 3), "twice each, as --repeats has it, and once before"
    assert found["torch-sync"]["replay_milliseconds_median"] == ""
    assert float(found["torch"]["replay_over_torch_median"]) == 1
    assert float(found["torch"]["replay_milliseconds_median"]) == 10
    assert float(found["torch-sync-unmasked"]["replay_over_torch_median"]) == 2
    assert {float(row["milliseconds_median"]) for row in found.values()} == {1000}
    assert "ms as a graph" in capsys.readouterr().out


def test_launches_are_counted_once_for_all_numbers_of_images(operators, brief, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(counts, "of", lambda run, device: (counts.Counts(len(counted), 5, 0, 0), counted.append(run)))
    command = NETWORK.replace("--images 8", "--images 4 8")
    assert main(["bench", *command.split(), "--results", str(tmp_path)]) == 0
    found = read(tmp_path / "resnet50.csv")
    few, many = ([row for row in found if row["images"] == images] for images in ("4", "8"))
    assert len(counted) == len(few) == len(many)
    assert [row["launches"] for row in few] == [row["launches"] for row in many] == [str(n) for n in range(len(few))]


def test_what_was_measured_before_an_interruption_is_kept(operators, brief, tmp_path, monkeypatch):
    monkeypatch.setattr(resnet50, "SETTINGS", resnet50.SETTINGS * 2)
    measured = resnet50.measure
    once = iter([measured])

    def measure(*arguments):
        return next(once, mock.Mock(side_effect=KeyboardInterrupt))(*arguments)

    monkeypatch.setattr(resnet50, "measure", measure)
    assert main(["bench", *NETWORK.split(), "--results", str(tmp_path)]) == 130
    assert len(read(tmp_path / "resnet50.csv")) >= 4


def test_under_autocast_activations_are_bfloat16():
    halves, whole, _ = resnet50.SETTINGS
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with halves.autocast(CPU):
        assert layer(x).dtype == torch.bfloat16
    with whole.autocast(CPU):
        assert layer(x).dtype == torch.float32
    assert [one.layout for one in resnet50.SETTINGS] == ["channels_last", "channels_last", "contiguous"]


class Half(nn.Module):
    """A layer whose gradient is not that of batch norm."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y.detach() + 0.9 * (y - y.detach())


def test_a_network_that_does_not_train_alike_is_not_reported(operators, brief, tmp_path, capsys):
    wrong = {"torch-sync": lambda model: network.replace(model, Half)}
    with mock.patch.dict(resnet50.MAKERS, wrong):
        assert main(["bench", *NETWORK.split(), "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "torch-sync does not train as torch's local batch norm: gradients of 8 images are off by" in told
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_gpus_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert step.fitting([1, 2, 4], "cpu") == [1, 2, 4]
    assert capsys.readouterr().err == ""
    assert step.fitting([1, 2, 4], "cuda") == [1]
    assert capsys.readouterr().err.splitlines()[-1] == "syncbn bench: 4 ranks are skipped: there are GPUs for 1"


# The merge

MERGE = "merge --device cpu --ranks 1 8 512 --channels 4 --repeats 2"


def test_the_merge(operators, tmp_path, capsys):
    assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 0
    found = read(tmp_path / "merge.csv")
    bytes_of = {(row["variant"], row["ranks"]): int(row["bytes"]) for row in found}
    assert bytes_of["torch-sync", "512"] == 64 * bytes_of["torch-sync-unmasked", "8"] == 512 * 4 * 9
    assert {bytes_of["syncbn-aten", ranks] for ranks in ("1", "8", "512")} == {8 * 9}
    assert len({row["variant"] for row in found}) == 4 - (peers.available("syncbn", CPU) is not None)
    assert all(float(row["device_microseconds_median"]) > 0 for row in found)
    assert {row["host_ahead"] for row in found} == {"0.0"}, "a CPU has no queue"
    output = capsys.readouterr().out
    assert re.search(r"channels +variant +W=1 +W=8 +W=512 +waits", output)
    assert f"gaps between launches count for {', '.join(sorted({row['variant'] for row in found}))}, which" in output


def test_the_merge_is_not_there_on_a_cpu(tmp_path, capsys):
    assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "syncbn bench: given --device cpu: torch.nn.SyncBatchNorm has no CPU implementation, so there is no merge of it to "
        "measure; expected --device cuda\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["torch-sync", "syncbn-aten"])
def test_a_merge_that_is_wrong_is_not_reported(variant, operators, tmp_path, capsys):
    real = merge.merge_of

    def wrong(name, of):
        if name != variant:
            return real(name, of)
        return real(name, of._replace(gathered=of.gathered * 1.01, message=of.message + 1))

    with mock.patch.object(merge, "merge_of", wrong):
        assert main(["bench", *MERGE.split(), "--results", str(tmp_path)]) == 1
    assert f"{variant} of 1 ranks, 4 channels: the mean is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Pictures


CIRCUMSTANCES = {
    "date": "2020-01-01",
    "hardware": "a made-up GPU",
    "driver": "0",
    "torch": "0",
    "triton": "0",
    "commit": "made up",
}


def write(path: Path, found: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *CIRCUMSTANCES])
        writer.writeheader()
        writer.writerows([row | CIRCUMSTANCES for row in found])


def invented(directory: Path, factor: float) -> None:
    """Rows that nobody measured, of both files."""
    speeds = {
        "torch": 0.6,
        "torch-inductor": 0.7,
        "torch-sync": 0.35,
        "torch-sync-unmasked": 0.4,
        "syncbn": 0.9,
        "syncbn-aten": 0.2,
    }
    found: list[dict[str, object]] = []
    for name, dtype, layout in itertools.product(speeds, ("float32", "bfloat16"), draw_layer_cuda.MARKERS):
        for number in range(4, 9):
            part = speeds[name] * (1 - 1 / (number - 2)) * factor
            over = "" if dtype == "bfloat16" and layout == "rows" else 0.3 / part
            row = {"variant": name, "backend": "cudnn" * (name == "torch"), "dtype": dtype, "layout": layout, "shape": number}
            row |= {
                "bytes": 3 * 10**number,
                "device": "cuda",
                "ranks": 8,
                "chain_over_torch_sync": over,
                "device_over_torch_sync": over,
                "host_ahead": 0 if name == "torch-sync" else 1,
            }
            found.append(row | {"forward_of_copy": part, "backward_of_copy": 0.9 * part})
    write(directory / "layer_cuda.csv", [*found, found[0] | {"variant": "copy"}])
    merges = []
    for name, channels, power in itertools.product(draw_merge.VARIANTS, (64, 512, 2048), range(3, 13)):
        micros = (2**power * channels**0.3 / 50 + 5) * factor if name.startswith("torch") else 4 * factor + len(name) - 6
        parts = zip(("lower_quartile", "median", "upper_quartile"), (0.9, 1, 1.2), strict=True)
        times = {f"device_microseconds_{part}": scale * micros for part, scale in parts}
        row = {"variant": name, "ranks": 2**power, "channels": channels, "device": "cuda"}
        merges.append(row | times | {"host_ahead": 0 if name == "torch-sync" else 1})
    write(directory / "merge.csv", merges)


def pictures(directory: Path) -> list[bytes]:
    assert main(["bench", "plot", "--results", str(directory)]) == 1, "the two of the CPU have no rows"
    return [(directory / name).read_bytes() for name in ("layer_cuda.png", "merge.png")]


def test_pictures_are_drawn_from_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "circumstances", mock.Mock(side_effect=AssertionError))
    invented(tmp_path, 1.0)
    first = pictures(tmp_path)
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert pictures(tmp_path) == first
    for name in ("layer_cuda", "merge"):
        invented(tmp_path, 1.0)
        kept = {path: path.read_text() for path in tmp_path.glob("*.csv") if path.stem != name}
        invented(tmp_path, 0.8)
        for path, text in kept.items():
            path.write_text(text)
        assert [one != other for one, other in zip(pictures(tmp_path), first, strict=True)] == [
            name == "layer_cuda",
            name == "merge",
        ]
    assert "to draw layer.png from" in capsys.readouterr().err


def test_no_point_lies_outside_of_its_picture(tmp_path):
    """Ratios on the device are tenths of those by the clock, on an axis that both share."""
    invented(tmp_path, 1.0)
    recorded = read(tmp_path / "layer_cuda.csv")
    for row in recorded:
        row["device_over_torch_sync"] = row["chain_over_torch_sync"] and str(0.1 * float(row["chain_over_torch_sync"]))
    figure = Figure()
    draw_layer_cuda.draw_layer_cuda(figure, recorded)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        values = [value for line in axes.get_lines() if line.get_marker() != "None" for value in line.get_ydata()]
        assert len(values) > 100
        assert low <= min(values) <= max(values) <= high


def test_pictures_say_whose_time_on_the_device_is_the_hosts(tmp_path):
    invented(tmp_path, 1.0)
    figure = Figure()
    draw_layer_cuda.draw_layer_cuda(figure, read(tmp_path / "layer_cuda.csv"))
    clock, device = (axes.get_title(loc="left") for axes in figure.axes[:2])
    assert device.endswith("in which the host is late with: operators of nn.SyncBatchNorm")
    assert "late" not in clock
    figure = Figure()
    draw_merge.draw_merge(figure, read(tmp_path / "merge.csv"))
    labels = {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines()}
    assert [style for label, style in labels.items() if label.endswith("the host is late")] == [":"]
    assert list(labels.values()).count("-") == 3


def test_without_a_gpus_rows_its_pictures_are_not_missed(tmp_path, capsys, monkeypatch):
    for name in ("draw_layer", "draw_scaling"):
        monkeypatch.setattr(plot, name, lambda figure, *tables: None)
    for name in ("layer", "scaling_projection", "scaling_efficiency"):
        write(tmp_path / f"{name}.csv", [dict.fromkeys({*plot.LAYER, *plot.LATENCY, *plot.EFFICIENCY}, "1")])
    assert main(["bench", "plot", "--results", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["layer.png", "scaling.png"]
    assert "to draw merge.png from; expected some: record them on a GPU" in capsys.readouterr().err


# On a GPU


@pytest.fixture
def as_users_run_it():
    """Memory as it is, and the operators that are not deterministic: conftest puts its own settings back."""
    torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("layer --device cuda --quick --repeats 2", "layer_cuda"),
        ("layer --device cuda --quick --repeats 2 --dtypes float16 --variants syncbn torch-sync", "layer_cuda"),
        ("resnet50 --images 8 --size 64 --repeats 2", "resnet50"),
        ("merge --ranks 8 4096 --repeats 2", "merge"),
        ("step --device cuda --ranks 1 --repeats 2", "step"),
        ("accuracy --device cuda", "accuracy"),
    ],
)
def test_every_command_runs_on_a_gpu(as_users_run_it, command, file, tmp_path):
    assert main(["bench", *command.split(), "--results", str(tmp_path)]) == 0
    assert read(tmp_path / f"{file}.csv")
    main(["bench", "plot", "--results", str(tmp_path)])


@needs_gpu
def test_what_is_counted_and_timed_on_a_gpu(as_users_run_it):
    """Torch's masks wait, ours does not and takes four launches and two collectives; a pass is queued before it begins."""
    names = [
        "torch",
        "torch-sync",
        "torch-sync-unmasked",
        *(["syncbn"] if peers.available("syncbn", torch.device("cuda")) is None else []),
    ]
    case = cases.Case("channels_last", (32, 64, 56, 56), torch.float32, 1)
    found = {row["variant"]: row for row in layer_cuda.measure(case, names, 5, torch.device("cuda"))}
    assert found["torch"]["backend"] in ("cudnn", "native")
    assert found["torch-sync"]["host_synchronizations"] >= 3
    assert found["torch-sync-unmasked"]["host_synchronizations"] == 0
    assert found["copy"]["host_ahead"] == 1
    assert 0.05 < found["torch"]["forward_of_copy"] < 1.5
    small = cases.Case("channels_last", (32, 64, 28, 28), torch.float32, 1)
    rows_of_small = {row["variant"]: row for row in layer_cuda.measure(small, names, 5, torch.device("cuda"))}
    assert found["torch"]["replay_microseconds_median"] == "", "the tensor is large"
    assert rows_of_small["torch-sync"]["replay_microseconds_median"] == "", "it waits"
    assert 0 < rows_of_small["torch"]["replay_microseconds_median"] < rows_of_small["torch"]["chain_microseconds_median"]
    if "syncbn" in found:
        ours = rows_of_small["syncbn"]
        assert 0 < ours["replay_microseconds_median"] < ours["chain_microseconds_median"]
        assert (found["syncbn"]["host_synchronizations"], found["syncbn"]["copies_to_host"]) == (0, 0)
        assert found["syncbn"]["launches"] == 4 + 2, "four kernels and two collectives"
