"""The benchmarks of a GPU, as far as they run without one: stand-ins for torch's operators, made-up rows for pictures."""

import contextlib
import csv
import functools
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from bench_files import parsed, read
from gpus import needs_gpu
from torch import nn

from syncbn import kernels
from syncbn.__main__ import main
from syncbn.bench import cases, check, device_time, layer_cuda, layer_cuda_summary, layer_step, peers, rows

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")
VARIANTS = ["torch", "torch-sync", "torch-sync-unmasked", "syncbn-aten"]


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
    monkeypatch.setattr(kernels.extension, "library", "C++")
    seen = {}
    for name in ("syncbn", "syncbn-host", "syncbn-aten", "torch"):
        with peers.using(name):
            seen[name] = kernels.TRITON_FROM_BYTES, kernels.extension.library
    assert seen == {"syncbn": (0, None), "syncbn-host": (0, "C++"), "syncbn-aten": (math.inf, None), "torch": (7.0, "C++")}
    assert (kernels.TRITON_FROM_BYTES, kernels.extension.library) == (7.0, "C++")


@pytest.mark.parametrize("there", [False, True])
def test_what_was_not_built_is_not_run(there, monkeypatch, capsys):
    monkeypatch.setattr(kernels.extension, "library", object() if there else None)
    monkeypatch.setattr(kernels, "compiled", lambda: SimpleNamespace(takes=lambda x: True))
    assert peers.runnable(["syncbn-host"], CPU) == ["torch"] + ["syncbn-host"] * there
    assert ("`python -m syncbn build` did not build it here" in capsys.readouterr().err) == (not there)


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
