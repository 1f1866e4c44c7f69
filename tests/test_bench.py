"""The benchmarks: models that fit, rows that are kept apart, nothing reported that is wrong, every command once, end to end."""

import copy
import csv
import functools
import importlib
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import SyncBatchNormReLU, collectives
from syncbn.__main__ import main
from syncbn.bench import (
    agreement,
    alpha_beta,
    cases,
    layer,
    memory,
    messages,
    namespaces,
    peers,
    plot,
    processes,
    projection,
    published,
    rows,
    scaling,
    step,
    timing,
)
from syncbn.bench.draw_layer import draw_layer
from syncbn.bench.draw_scaling import draw_scaling
from syncbn.kernels import aten

CPU = torch.device("cpu")
MODULE = "test_bench"
ONE_CASE = ["--shapes", "8x512x7x7", "--layouts", "contiguous", "--threads", "1", "--dtypes", "float32"]
LAYER = ["bench", "layer", *ONE_CASE, "--repeats", "2"]
STEP = ["bench", "step", "--ranks", "2", "--width", "4", "--images", "2", "--repeats", "2", "--timeout", "60"]
SCALING = ["bench", "scaling", "--ranks", "2", "--channels", "64", "--repeats", "3", "--timeout", "60"]
ACCURACY = ["bench", "accuracy", "--images", "4", "--channels", "3", "--size", "8"]


@pytest.fixture(autouse=True)
def heap_of_this_process_as_it_is(monkeypatch):
    monkeypatch.setattr(layer, "keep_heap", lambda: False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The model


MODELS = [(3e-4, 2e-5, 1e-9), (0.0, 2e-5, 1e-9), (3e-4, 0.0, 1e-9), (3e-4, 2e-5, 0.0), (5e-6, 0.0, 0.0)]


@pytest.mark.parametrize("known", MODELS)
@pytest.mark.parametrize("operation", messages.OPERATIONS)
def test_the_fit_recovers_the_model_that_made_the_latencies(known, operation):
    model = alpha_beta.Model(*known)
    terms = [alpha_beta.ring(operation, ranks, size) for ranks in range(2, 9) for size in (1000, 100_000, 10_000_000)]
    found = alpha_beta.fitted(terms, [model.seconds(one) for one in terms])
    assert found.model == pytest.approx(model, rel=1e-6, abs=1e-13)
    assert found.deviation < 1e-6
    assert found.points == 21


def test_no_part_of_a_fit_is_negative():
    terms = [alpha_beta.Terms(rounds, 0) for rounds in (1, 2, 3)]
    found = alpha_beta.fit(terms, [3.0, 2.0, 1.0])
    assert min(found) >= 0
    with pytest.raises(ValueError, match="given no measurement"):
        alpha_beta.fit([], [])


def test_rounds_and_bytes():
    assert alpha_beta.ring("all_reduce", 4, 1000) == (6, 1500)
    assert alpha_beta.ring("all_gather", 4, 1000) == (3, 3000)
    assert alpha_beta.ring("all_reduce", 4, 1000, turns=2) == (12, 1500)
    assert alpha_beta.tree(64, 8, 1000) == (6, 2000)
    assert alpha_beta.tree(4, 8, 1000) == (0, 2000)


def test_the_projection():
    """53 layers; near what was published; an all_gather grows with the ranks, an all_reduce with their logarithm."""
    assert len(projection.RESNET50) == 53
    operations = projection.nccl(8, 0.0)
    off = projection.published_model().deviation
    for one in published.ALL_REDUCE:
        assert operations["all_reduce"](one.ranks, 0) == pytest.approx(one.seconds, rel=off + 1e-9)
    assert operations["all_gather"](16384, 0) > 100 * operations["all_reduce"](8, 0)
    doubling = [operations["all_reduce"](2 * ranks, 0) - operations["all_reduce"](ranks, 0) for ranks in (16, 256, 4096)]
    assert max(doubling) == pytest.approx(min(doubling))
    node = projection.schemes(operations)["all_reduce in a node"]
    assert projection.step_communication(node, 16384) == pytest.approx(projection.step_communication(node, 8))
    sent = {}
    for name, scheme in projection.schemes(dict.fromkeys(operations, lambda ranks, size: size)).items():
        sent[name] = projection.step_communication(scheme, 8) / sum(4 * c + 1 for c in projection.RESNET50)
    assert sent == {"all_reduce": 8, "all_gather forward": 4, "all_reduce in a node": 8}, "float64, torch's float32"
    assumed = projection.Assumed(8, 32, 32768, 4e-4, 8e-3)
    for kind, scheme in itertools.product(("weak", "strong"), projection.schemes(operations).values()):
        parts = [projection.efficiency(kind, scheme, ranks, assumed)[1] for ranks in (1, *projection.RANKS)]
        assert parts[0] == 1
        assert all(one >= other > 0 for one, other in itertools.pairwise(parts))


# Timing, memory, rows


def test_runs_take_turns_and_none_always_follows_the_same():
    ran = []
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    taken = timing.interleaved(runs, 12, CPU, warm_up=0)
    assert [len(times) for times in taken.values()] == [12, 12, 12]
    assert all(sorted(ran[turn : turn + 3]) == ["a", "b", "c"] for turn in range(0, 36, 3))
    before = {pair for turn in range(0, 36, 3) for pair in itertools.pairwise(ran[turn : turn + 3])}
    assert len(before) == 6, "each has followed each"
    assert timing.order("abc", 5) == timing.order("abc", 5), "on every rank alike"


def test_a_ratio_is_that_of_pairs():
    assert timing.ratio([2.0, 4.0, 6.0, 100.0], [1.0, 2.0, 4.0, 10.0]) == pytest.approx((1.875, 2.0, 4.0))


def test_the_peak_of_memory_is_measured():
    size = 4 * 10_000

    def run():
        held = torch.empty(10_000)
        other = torch.empty(10_000)
        del other
        return torch.empty(5_000), held

    assert memory.peak(run, CPU) == 2 * size


FAULTS = """
import resource, sys, torch
from syncbn.bench.memory import keep_heap
if sys.argv[1] == "kept":
    assert keep_heap()
def touch():
    torch.empty(2**24).fill_(1)
for _ in range(40):  # until the small pieces are used up that alignment cuts off, and that malloc keeps apart
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_kept_heap_has_no_page_faults():
    """64 MB, taken and freed again and again, are 16 384 pages or none."""
    faults = {}
    for kept in ("kept", "as it is"):
        done = subprocess.run([sys.executable, "-c", FAULTS, kept], capture_output=True, text=True, timeout=60, check=True)
        faults[kept] = int(done.stdout)
    assert faults["kept"] < 100
    assert faults["as it is"] > 4000, "in huge pages there may be fewer"


def test_rows_are_appended_under_the_same_columns_only(tmp_path):
    path = rows.append("name", [{"a": 1, "b": "x, y"}], tmp_path)
    rows.append("name", [{"a": 2, "b": "z"}], tmp_path)
    before = path.read_text()
    for other in ({"a": 1}, {"b": 1, "a": 2}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(rows.RowError, match=r"name.csv has the columns a, b, date.*; nothing is appended"):
            rows.append("name", [{"a": 1, "b": 2}, other], tmp_path)
    assert path.read_text() == before
    assert [(row["a"], row["b"]) for row in rows.read("name", tmp_path)] == [("1", "x, y"), ("2", "z")]
    assert set(read(path)[0]) == {"a", "b", "date", "hardware", "python", "torch", "commit", "command"}


def test_where_rows_go(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for directory in ("benchmarks/results", "syncbn/bench"):
        (checkout / directory).mkdir(parents=True)
    monkeypatch.chdir(checkout / "syncbn" / "bench")
    assert rows.directory() == checkout / "benchmarks" / "results"
    monkeypatch.chdir(tmp_path)
    assert rows.directory() == tmp_path / "syncbn-bench"
    assert rows.directory(checkout) == checkout


def test_the_command_of_a_row_names_no_place_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rows.command([f"{tmp_path}/syncbn/__main__.py", "bench", "layer"]) == "python -m syncbn bench layer"
    assert rows.command(["/opt/bin/syncbn", "bench", "step"]) == "python -m syncbn bench step"
    assert rows.command([f"{tmp_path}/benchmarks/soak.py", "--steps", "5"]) == "python benchmarks/soak.py --steps 5"
    assert rows.command(["/elsewhere/soak.py"]) == "python soak.py"


# Refusals


def scaled(function, part=None, factor=1.05):
    """The function with what it returns, or a part of it, wrong."""

    def wrong(*arguments):
        value = function(*arguments)
        if part is None:
            return value * factor
        if isinstance(part, int):
            return tuple(item * factor if number == part else item for number, item in enumerate(value))
        return value._replace(**{part: getattr(value, part) * factor})

    return wrong


WRONG = {
    "y": lambda: mock.patch.object(aten, "normalize", scaled(aten.normalize, 0)),
    "dx": lambda: mock.patch.object(aten, "input_gradient", scaled(aten.input_gradient)),
    "dweight": lambda: mock.patch.object(aten, "gradient_sums", scaled(aten.gradient_sums, "weight")),
    "dbias": lambda: mock.patch.object(aten, "gradient_sums", scaled(aten.gradient_sums, "bias")),
    "running_mean": lambda: mock.patch.object(aten, "move"),
}


@pytest.mark.parametrize("tensor", WRONG)
@pytest.mark.parametrize("command", [LAYER, ACCURACY])
def test_a_layer_that_is_not_batch_norm_is_not_reported(tensor, command, tmp_path, capsys):
    with WRONG[tensor]():
        assert main([*command, "--variants", "syncbn-aten", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("syncbn bench: syncbn-aten, ")
    assert "is not batch norm: relative to the largest value it is off in " in told
    assert f"{tensor} by " in told
    assert told.endswith("; nothing is reported")
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_batch_norm_is_not_reported_either(tmp_path, capsys):
    class Forgetful(peers.PlainSyncBatchNorm):
        def forward(self, x):
            return super().forward(x.detach()) + 0 * x

    wrong = peers.PEERS["plain"]._replace(make=Forgetful)
    with mock.patch.dict(peers.PEERS, plain=wrong):
        assert main([*LAYER, "--variants", "plain", "--results", str(tmp_path)]) == 1
    assert "dx by 1.0e+00" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def wrong_step(rank, world_size, **arguments):
    """Layers that do not synchronize."""
    forced = peers.forced
    with mock.patch.object(peers, "forced", lambda model: step.convert(forced(model), group_size=1)):
        return step.measure(rank, world_size, **arguments)


def wrong_messages(rank, world_size, **arguments):
    """Rank 1 has another sum."""
    real = collectives._all_reduce
    with mock.patch.object(collectives, "_all_reduce", lambda message, call: real(message, call).add_(rank)):
        return messages.measure(rank, world_size, **arguments)


@pytest.mark.parametrize(("times", "said"), [(1.9, ""), (2.1, "gradients of 2 images are off by")])
def test_a_step_may_be_off_by_twice_what_torchs_is(times, said):
    """Of two images a ReLU that passes one value more is more of the gradients than of sixteen."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, target = torch.randn(2, 4), torch.tensor([0, 2])
    exact, torchs = step._step_of_one(network, x, target, torch.float64), (torch.full((83,), 3.0), torch.ones(16))

    def of_one(initial, x, target, dtype):
        return exact if dtype == torch.float64 else (exact[0] + torchs[0].double(), exact[1])

    model = copy.deepcopy(network)
    for parameter, change in zip(model.parameters(), exact[0].split([p.numel() for p in model.parameters()]), strict=True):
        parameter.grad = (change + 3.0 * times).view_as(parameter).float()
    for name, value in zip(("running_mean", "running_var"), exact[1].chunk(2), strict=True):
        getattr(model[1], name).copy_(value)
    with mock.patch.object(step, "_step_of_one", of_one):
        assert said in step.check(network, {"syncbn": model}, x, target)
        assert bool(step.check(network, {"syncbn": model}, x, target)) == bool(said)


def test_a_step_that_is_not_that_of_one_process_is_not_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "TASK", f"{MODULE}:wrong_step")
    assert main([*STEP, "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "syncbn bench: syncbn does not train as one process with the whole batch: gradients of 4 images are off"
    )
    assert not list(tmp_path.iterdir())


def test_a_collective_that_does_not_sum_is_not_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "TASK", f"{MODULE}:wrong_messages")
    assert main([*SCALING, "--nodes", "one", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "syncbn bench: all_reduce of 129 values on 2 ranks does not give the sum; nothing is reported"
    assert not list(tmp_path.iterdir())


def test_the_reference_is_batch_norm():
    """Against torch's own in float64, where x is not far from zero."""
    case = cases.Case("channels_last", (4, 3, 5, 5), torch.float64, 1)
    theirs, (x, dy) = case.layer().double(), case.tensors()
    found = agreement.errors(agreement.outputs(theirs, x, dy), agreement.expected(case.layer(), x, dy))
    assert list(found) == ["y", "dx", "dweight", "dbias", "running_mean", "running_var"]
    assert max(found.values()) < 1e-6


# Every command


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


# Checks against what was recorded


def recorded(tmp_path: Path, factor: float = 1.0, **changes: str) -> None:
    """Rows as a run before this one left them, with ratios multiplied."""
    path = tmp_path / "layer.csv"
    found = [row | changes | {"ratio": str(float(row["ratio"]) * factor)} for row in read(path)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


@pytest.fixture
def steady(monkeypatch, tmp_path):
    """A layer whose ratio is the same in every run; its rows are recorded."""
    real = layer.measure

    def measure(*arguments):
        return [row | {"ratio": 0.5 if row["variant"] != "torch" else 1.0} for row in real(*arguments)]

    monkeypatch.setattr(layer, "measure", measure)
    command = [*LAYER, "--variants", "syncbn-aten", "--results", str(tmp_path)]
    assert main(command) == 0
    return [*command, "--check"]


@pytest.mark.parametrize(
    ("factor", "changes", "status", "line"),
    [
        (1.0, {}, 0, "no ratio grew past the limit"),
        (1 / 1.19, {}, 0, "no ratio grew past the limit"),
        (1 / 1.21, {}, 1, "1 of 1 grew past 1.2 times what was recorded"),
        (2.0, {}, 0, "no ratio grew past the limit"),
        (1.0, {"torch": "1.0"}, 2, "no recorded row matches: "),
        (1.0, {"hardware": "another"}, 2, "no recorded row matches: "),
    ],
)
def test_check(factor, changes, status, line, steady, tmp_path, capsys):
    recorded(tmp_path, factor, **changes)
    before = (tmp_path / "layer.csv").read_text()
    assert main(steady) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(line)
    assert (tmp_path / "layer.csv").read_text() == before


def test_check_takes_the_last_row_that_matches(steady, tmp_path):
    old = read(tmp_path / "layer.csv")
    recorded(tmp_path, 1 / 1.5)
    with (tmp_path / "layer.csv").open("a", newline="") as file:
        csv.DictWriter(file, list(old[0]), lineterminator="\n").writerows(old)
    assert main(steady) == 0


# Pictures


CIRCUMSTANCES = {"date": "2020-01-01", "hardware": "a machine", "python": "3", "torch": "2", "commit": "c", "command": "x"}


def write(path: Path, found: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *CIRCUMSTANCES])
        writer.writeheader()
        writer.writerows([row | CIRCUMSTANCES for row in found])


def invented(directory: Path, ratio: float) -> None:
    """Rows of all files that pictures are drawn from, which nobody measured."""
    of = {"dtype": "float32", "shape": "8x64x7x7", "threads": 1, "device": "cpu", "ratio": ratio}
    of |= {"ratio_lower_quartile": 0.4, "ratio_upper_quartile": 0.9}
    layouts = ("contiguous", "channels_last", "rows")
    write(
        directory / "layer.csv",
        [{"variant": name, "layout": layout} | of for name in ("torch", "syncbn") for layout in layouts],
    )
    times = {"bytes": 8200, "microseconds": 10 * ratio, "microseconds_lower": 9 * ratio, "microseconds_upper": 11 * ratio}
    kinds = ("measured", "published", "modelled")
    point = {"machine": "NCCL", "operation": "all_reduce", "ranks": 8} | times | {"note": "n"}
    write(directory / "scaling_projection.csv", [{"kind": kind} | point for kind in kinds])
    assumed = {
        "node_size": 8,
        "images_per_rank": 32,
        "image_microseconds": 1,
        "floor_milliseconds": 1,
        "bandwidth_gb_per_second": 1,
    }
    efficient = [
        {"kind": "modelled", "scaling": scaling, "scheme": scheme, "ranks": ranks, "efficiency": ratio / ranks} | assumed
        for scaling in ("weak", "strong")
        for scheme in ("all_reduce", "all_gather forward", "all_reduce in a node")
        for ranks in (1, 2)
    ]
    write(directory / "scaling_efficiency.csv", efficient)


def pictures(directory: Path) -> list[bytes]:
    assert main(["bench", "plot", "--results", str(directory)]) == 0
    return [(directory / name).read_bytes() for name in ("layer.png", "scaling.png")]


def test_pictures_are_drawn_from_the_rows_and_nothing_else(tmp_path, monkeypatch):
    """The same rows, the same picture; other rows, another; and nothing is measured or asked of the machine."""
    for module, name in ((timing, "timed"), (processes, "run"), (rows, "circumstances"), (rows, "hardware")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=AssertionError(name)))
    invented(tmp_path, 0.5)
    first = pictures(tmp_path)
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert pictures(tmp_path) == first
    for name in ("layer", "scaling_projection", "scaling_efficiency"):
        invented(tmp_path, 0.5)
        kept = {path: path.read_text() for path in tmp_path.glob("*.csv") if path.stem != name}
        invented(tmp_path, 0.7)
        for path, text in kept.items():
            path.write_text(text)
        assert [one != other for one, other in zip(pictures(tmp_path), first, strict=True)] == [
            name == "layer",
            name != "layer",
        ]


def test_rows_of_other_hardware_and_older_ones_are_not_drawn():
    old, other, new, another = (
        {"key": key, "hardware": hardware, "ratio": ratio}
        for key, hardware, ratio in (("k", "a", "1"), ("k", "b", "2"), ("k", "a", "3"), ("l", "a", "4"))
    )
    assert plot.latest([old, other, new, another], ["key"], None) == [new, another]
    assert plot.latest([old, other, new, another], ["key"], "b") == [other]
    assert plot.latest([], ["key"], None) == []


@pytest.mark.parametrize("name", ["layer", "scaling"])
def test_a_picture_names_all_commits_of_what_it_shows(name, tmp_path):
    invented(tmp_path, 0.5)
    tables = [rows.read(table, tmp_path) for table in {"layer": ["layer"], "scaling": ["scaling_projection"]}[name]]
    tables[0][0] |= {"date": "2019-12-31", "commit": "older"}
    figure = Figure()
    if name == "layer":
        draw_layer(figure, *tables)
    else:
        draw_scaling(figure, *tables, rows.read("scaling_efficiency", tmp_path))
    assert "a machine, torch 2, 2019-12-31 and 2020-01-01, commit older and c; " in figure.get_suptitle()


# Processes


def one_fails(rank, world_size):
    if rank == 1:
        raise OSError("planted")
    time.sleep(100)


def none_answers(rank, world_size):
    time.sleep(100)


def test_the_first_failure_ends_all_processes(capfd):
    start = time.monotonic()
    with pytest.raises(processes.ProcessError, match=r"rank 1 of 2 of test_bench:one_fails ended with exit status 1"):
        processes.run(f"{MODULE}:one_fails", {}, 2, 90)
    assert time.monotonic() - start < 40
    assert "OSError: planted" in capfd.readouterr().err


def test_processes_that_do_not_answer_are_an_error_in_time():
    start = time.monotonic()
    with pytest.raises(processes.ProcessError, match=r"no answer from ranks \[0\] of 1 .* within 1 s"):
        processes.run(f"{MODULE}:none_answers", {}, 1, 1)
    assert time.monotonic() - start < 30


STARTER = "from syncbn.bench import processes; processes.run('test_bench:none_answers', {}, 1, 90)"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find processes")
def test_processes_go_with_the_one_that_started_them(tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", STARTER], env=env, cwd=Path(__file__).parent)

    def ranks() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_text()
            except OSError:
                continue
            if "syncbn.bench.processes" in line and str(tmp_path) in line:
                found.append(line)
        return found

    def wait(condition, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        return condition()

    try:
        assert wait(lambda: len(ranks()) == 1 and list(tmp_path.glob("*/store")), 30)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait(10)
    assert wait(lambda: not ranks(), 15)


def test_two_nodes_have_a_throttled_link_and_leave_nothing():
    def listed() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        with namespaces.two_nodes("200mbit") as places:
            inside = listed()
            show = subprocess.run([*places[0].prefix, "tc", "qdisc"], capture_output=True, text=True, timeout=10, check=True)
            names = [place.prefix[-1] for place in places]
            assert all(name in inside for name in names)
            assert "tbf" in show.stdout
            assert "rate 200Mbit" in show.stdout
    except OSError as error:
        pytest.skip(f"needs the right to make network namespaces: {error}")
    assert not any(name in listed() for name in names)


def test_a_group_of_its_own(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "own_group.py"
    small = ["--layers=2", "--linear=1", "--hidden=16", "--images=2", "--repeats=2", "--timeout=60", f"--results={tmp_path}"]
    done = subprocess.run([sys.executable, program, *small], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "own_group.csv")
    assert [row["group"] for row in found] == ["none, local batch norm", "default", "own"]
    assert [float(row["milliseconds_in_collectives"]) > 0 for row in found] == [False, True, True]
    delayed = "a delay instead" in done.stderr
    assert {(row["rate"], row["delay"]) for row in found} == {("", "2ms") if delayed else ("1gbit", "")}


@pytest.mark.parametrize(
    "arguments",
    ["layer --repeats 1", "step --ranks 0", "scaling --bandwidth -1", "layer --dtypes int8", "layer --layouts row"],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments.split()])
    assert stop.value.code == 2
    _, option, value = arguments.split()
    assert re.search(rf"argument {option}: (given '{value}'; expected|invalid choice: '{value}')", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("layer --shapes 8x64x57x57", "given --shapes 8x64x57x57; expected some of 8x64x112x112, 8x64x56x56, "),
        ("fused --quick --shapes 8x64x112x112", "expected some of 8x64x56x56, 8x256x14x14, 8x512x7x7"),
        ("layer --shapes 256x64 --layouts contiguous", "--shapes 256x64 and --layouts contiguous, which no case has"),
        ("accuracy --images 1 --size 1", "given --images 1 and --size 1, one value a channel; expected more"),
    ],
)
def test_what_no_case_has_is_a_usage_error(arguments, told, tmp_path, capsys):
    assert main(["bench", *arguments.split(), "--results", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_memory_takes_is_measured_in_float32():
    for dtype in (torch.float32, torch.bfloat16):
        found = layer.measure(cases.Case("rows", (256, 64), dtype, 1), ["torch", "memory"], 2, CPU)
        assert [row["variant"] for row in found] == ["torch", "memory"][: 1 + (dtype == torch.float32)]


def test_what_the_memory_takes_is_measured_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "layer", "--device", "cuda", "--variants", "memory", "--results", str(tmp_path)]) == 2
    assert "given --variants memory and --device cuda; expected cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", [LAYER, ACCURACY, STEP, SCALING, ["bench", "fused", *ONE_CASE]])
def test_where_no_rows_can_go_nothing_is_measured(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "timed", mock.Mock(side_effect=AssertionError("measured")))
    monkeypatch.setattr(processes, "run", mock.Mock(side_effect=AssertionError("measured")))
    (tmp_path / "file").write_text("")
    assert main([*command, "--results", str(tmp_path / "file" / "results")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"no rows can be written to .*file/results \(NotADirectoryError: .*\); expected a folder", told)


@pytest.mark.parametrize("name", ["layer", "fused", "accuracy"])
def test_rows_that_would_not_fit_are_an_error_after_the_first_case(name, tmp_path, capsys, monkeypatch):
    measuring = importlib.import_module(f"syncbn.bench.{name}")
    measure = mock.Mock(return_value=[{"b": 1}])
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(measuring, "keep_heap", lambda: False, raising=False)
    (tmp_path / f"{name}.csv").write_text("a,date\n")
    assert main(["bench", name, *(["--threads", "1"] if name != "accuracy" else []), "--results", str(tmp_path)]) == 1
    assert f"{name}.csv has the columns a, date; given b, " in capsys.readouterr().err
    assert measure.call_count <= 2


def test_a_gpu_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*LAYER, "--device", "cuda", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "syncbn bench: given --device cuda, and there is no GPU; expected one\n"
