"""The benchmarks of a GPU, as far as they run without one: stand-ins for torch's operators, made-up rows for pictures."""

import argparse
import contextlib
import csv
import functools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cuda_operators
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType

from syncbn import kernels
from syncbn.__main__ import main
from syncbn.bench import cases, check, counts, device_time, layer, layer_cuda, layer_cuda_summary, peers, rows
from syncbn.bench.fake_world import RANKS, fake_world, gather_name
from syncbn.bench.run import add_command

CPU = torch.device("cpu")
VARIANTS = ["torch", "torch-sync", "torch-sync-unmasked", "syncbn-aten"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
        assert message.tolist() == [0, 1, 2]
        assert operations(lambda: getattr(dist, gather_name())(into, message, dist.group.WORLD, async_op=False)) == [
            "aten::copy_"
        ]
        assert into.tolist() == [0, 1, 2] * RANKS
    assert not dist.is_initialized()


def test_a_world_is_left_as_it_was_when_something_fails():
    before = dist.all_reduce, getattr(dist, gather_name())
    with contextlib.suppress(OSError), fake_world(2):
        assert dist.all_reduce is not before[0]
        raise OSError("planted")
    assert (dist.all_reduce, getattr(dist, gather_name())) == before
    assert not dist.is_initialized()


def test_the_world_calls_what_torchs_layer_calls(operators):
    """Its gather has another name from one torch to the next; a call that went past the world would issue eight copies."""
    layer, x = peers.PEERS["torch-sync"].make(nn.BatchNorm1d(4)), torch.randn(16, 4)
    with fake_world(RANKS), mock.patch("syncbn.bench.fake_world.dist.get_world_size", wraps=dist.get_world_size) as asked:
        layer(x.requires_grad_()).sum().backward()
    assert sum(call.args != () for call in asked.call_args_list) == 1, "once, by the gather that stands in"


# Counts and clocks


def event(name: str, start: float, device: DeviceType = DeviceType.CPU, end: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, end=start + 1 if end is None else end)
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
    assert by_name["copy"]["forward_of_copy"] == by_name["copy"]["backward_of_copy"] == 1
    assert by_name["copy"]["error_y"] == ""
    for row in found:
        assert row["bytes"] == math.prod(shape) * dtype.itemsize
        assert (row["ranks"], row["launches"], row["host_synchronizations"]) == (8, 0, 0)
        for part in ("", "forward_", "backward_"):
            times = [row[f"{part}microseconds_{which}"] for which in ("lower_quartile", "median", "upper_quartile")]
            assert 0 < times[0] <= times[1] <= times[2]
        assert row["variant"] == "copy" or float(row["error_dx"]) < 2e-2


def test_without_torchs_operators_there_is_no_ratio_over_them():
    found = layer_cuda.measure(cases.Case("rows", (32, 8), torch.float32, 1), ["torch", "syncbn-aten"], 2, CPU)
    assert {row["over_torch_sync"] for row in found} == {row["device_over_torch_sync"] for row in found} == {""}


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
    for name in ("syncbn", "syncbn-aten", "torch"):
        with peers.using(name):
            seen[name] = kernels.TRITON_FROM_BYTES
    assert seen == {"syncbn": 0, "syncbn-aten": math.inf, "torch": 7.0}
    assert kernels.TRITON_FROM_BYTES == 7.0


def test_the_copy_moves_the_bytes_of_the_passes():
    moved = []
    x = torch.empty(10, 4)
    step = layer_cuda.copies(x)
    copy_ = torch.Tensor.copy_
    with mock.patch.object(
        torch.Tensor, "copy_", lambda self, other: moved.append(self.nbytes + other.nbytes) or copy_(self, other)
    ):
        step = layer_cuda.copies(x)
        step.both()
    assert moved == [3 * x.nbytes, 5 * x.nbytes]


def test_no_step_adds_to_the_gradients_of_another():
    layer, x = nn.BatchNorm1d(4), torch.randn(16, 4)
    step = layer_cuda.step_of("torch", layer, x, torch.ones(16, 4))
    seen = []
    with mock.patch.object(nn.Module, "zero_grad", lambda module: seen.append(module)):
        layer_cuda.interleaved({"torch": step}, 2, CPU, device_time.wall_clock)
    assert len(seen) == 2 * 3, "after the step, and after its passes, warm-up included"


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
