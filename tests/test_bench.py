"""The benchmarks: every command once, end to end, and what it measures."""

import functools
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from bench_files import ACCURACY, LAYER, SCALING, STEP, read
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import SyncBatchNormReLU
from syncbn.__main__ import main
from syncbn.bench import cases, layer, messages, peers, processes, step

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # what tracing does to an autograd.Function
def test_layer(tmp_path, capsys, monkeypatch):
    """Traced, but not compiled: that takes half a minute where nothing is cached, and test_compile does it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    variants = ["plain", "memory", "syncbn-aten", "torch-sync", "syncbn-inductor"]
    command = [*LAYER, "--variants", *variants, "--results", str(tmp_path)]
    assert main(command) == 0
    printed, errors = capsys.readouterr()
    assert "torch-sync (the operators of torch.nn.SyncBatchNorm) is skipped: torch.nn.SyncBatchNorm has no CPU" in errors
    found = read(tmp_path / "layer.csv")
    assert [row["variant"] for row in found] == ["torch", "plain", "syncbn-aten", "syncbn-inductor", "memory"]
    for row in found:
        times = [float(row[f"microseconds_{part}"]) for part in ("lower_quartile", "median", "upper_quartile")]
        assert 0 < times[0] <= times[1] <= times[2]
        assert float(row["peak_bytes"]) >= 2 * 4 * 8 * 512 * 7 * 7
        assert row["repeats"] == "8"
    assert float(found[0]["ratio"]) == float(found[0]["peak_over_torch"]) == 1
    assert "over torch" in printed
    assert printed.endswith("layer.csv\n")


class Traffic(TorchDispatchMode):
    """Values that the operators inside read and write."""

    def __init__(self):
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.read += sum(value.numel() for value in arguments if isinstance(value, Tensor))
        self.written += result.numel()
        return result


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_passes_over_memory_are_those_of_batch_norm(memory_format):
    """x twice and y, x and dy twice and dx; three sums are a value each."""
    x, dy = (torch.randn(2, 3, 4, 5).to(memory_format=memory_format) for _ in range(2))
    run = peers.memory_passes(x.requires_grad_(), dy)
    with Traffic() as traffic:
        run()
    assert (traffic.read, traffic.written) == (6 * x.numel(), 2 * x.numel() + 3)
    assert sum(peers.PASSES) == 8


def test_accuracy(tmp_path, capsys):
    assert main([*ACCURACY, "--results", str(tmp_path)]) == 0
    found = {
        (row["variant"], row["layout"], row["mean_over_std"]): row for row in read(tmp_path / "accuracy.csv") if row["variant"]
    }
    plain, ours = (float(found[name, "contiguous", "1000"]["error_running_var"]) for name in ("plain", "syncbn-aten"))
    assert plain > 1e-4 > 1e-6 > ours
    assert {ratio for _, _, ratio in found} == {"1", "10", "100", "1000", "10000", "100000", "1e+06"}
    assert "largest error" in capsys.readouterr().out


def test_step(tmp_path, capsys):
    assert main([*STEP, "--results", str(tmp_path)]) == 0
    found = {row["variant"]: row for row in read(tmp_path / "step.csv")}
    assert set(found) == {"torch", "syncbn-local", "syncbn", "syncbn-fused", "syncbn-aten", "syncbn-watched", "plain"}
    assert {row["world_size"] for row in found.values()} == {"2"}
    assert float(found["syncbn-local"]["over_own_kernels_median"]) == 1
    assert 0 < float(found["syncbn-watched"]["share_in_collectives"]) < 1
    assert 0 <= float(found["syncbn-watched"]["share_waiting"]) <= float(found["syncbn-watched"]["share_in_collectives"])
    assert "over own kernels" in capsys.readouterr().out
    made = step.network()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == 20
    assert made(torch.randn(2, 3, 64, 64)).shape == (2, 100)
    fused = list(step.fuse(made, peers.fused).modules())
    assert sum(isinstance(module, SyncBatchNormReLU) for module in fused) == 17
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fused) == 3  # of the shortcuts
    assert not any(isinstance(module, nn.ReLU) for module in fused)


def test_scaling_and_its_plot(tmp_path, capsys):
    assert main([*SCALING, "--results", str(tmp_path)]) == 0
    printed, errors = capsys.readouterr()
    measured = read(tmp_path / "scaling.csv")
    nodes = ["1"] if "two nodes are skipped" in errors else ["1", "2"]
    assert [(row["operation"], row["world_size"], row["nodes"]) for row in measured] == [
        (operation, "2", count) for count in nodes for operation in messages.OPERATIONS
    ]
    assert {row["bytes"] for row in measured} == {"1032"}
    assert "modelled ResNet-50 step" in printed
    kinds = {(row["kind"], row["machine"]) for row in read(tmp_path / "scaling_projection.csv")}
    assert kinds == {("measured", "Gloo here"), ("published", "NCCL"), ("modelled", "NCCL"), ("modelled", "Gloo here")}
    assert {row["fitted_to"] for row in read(tmp_path / "scaling_model.csv")} >= {"measured, 1 nodes", "published"}
    assert {row["kind"] for row in read(tmp_path / "scaling_efficiency.csv")} == {"modelled"}
    assert main(["bench", "plot", "--results", str(tmp_path)]) == 1  # of the layer there are no rows
    assert "no rows in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.png")] == ["scaling.png"]


def test_modelled_efficiencies_need_no_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "run", mock.Mock(side_effect=AssertionError("measured")))
    assert main(["bench", "scaling", "--modelled", "--results", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scaling_efficiency.csv"]
    assert "modelled ResNet-50 step" in capsys.readouterr().out


OWN_GROUP = Path(__file__).parents[1] / "benchmarks" / "own_group.py"


def test_a_group_of_its_own(tmp_path):
    small = ["--layers=2", "--linear=1", "--hidden=16", "--images=2", "--repeats=2", "--timeout=60", f"--results={tmp_path}"]
    done = subprocess.run([sys.executable, OWN_GROUP, *small], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "own_group.csv")
    assert [row["group"] for row in found] == ["none, local batch norm", "default", "own"]
    assert [float(row["milliseconds_in_collectives"]) > 0 for row in found] == [False, True, True]
    delayed = "a delay instead" in done.stderr
    assert {(row["rate"], row["delay"]) for row in found} == {("", "2ms") if delayed else ("1gbit", "")}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--repeats=1", "a whole number, 2 or more"),
        ("--layers=0", "a whole number, 1 or more"),
        ("--linear=-1", "a whole number, 0 or more"),
        ("--hidden=0", "a whole number, 1 or more"),
        ("--images=0", "a whole number, 1 or more"),
        ("--delay=-2", "a number above 0"),
        ("--timeout=nan", "a number above 0"),
    ],
)
def test_a_group_of_its_own_by_options_that_cannot_be(option, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own_group.py", option])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(OWN_GROUP), run_name="__main__")
    name, value = option.split("=")
    assert f"error: argument {name}: given '{value}'; expected {expected}" in capsys.readouterr().err


def test_a_group_of_its_own_is_not_measured_where_no_row_can_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "run", mock.Mock(side_effect=AssertionError("measured")))
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["own_group.py", "--link=delayed", f"--results={tmp_path / 'file'}"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(OWN_GROUP), run_name="__main__")
    said = (
        f"nothing is reported: no rows can be written to {tmp_path / 'file'} (FileExistsError: File exists); expected a folder"
    )
    assert capsys.readouterr().err.startswith(said)


def test_what_the_memory_takes_is_measured_in_float32():
    for dtype in (torch.float32, torch.bfloat16):
        found = layer.measure(cases.Case("rows", (256, 64), dtype, 1), ["torch", "memory"], 2, CPU)
        assert [row["variant"] for row in found] == ["torch", "memory"][: 1 + (dtype == torch.float32)]


def test_what_the_memory_takes_is_measured_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "layer", "--device", "cuda", "--variants", "memory", "--results", str(tmp_path)]) == 2
    assert "given --variants memory and --device cuda; expected cpu" in capsys.readouterr().err
