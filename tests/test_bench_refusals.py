"""Benchmarks report nothing that is wrong, and nothing is measured that could not be written."""

import copy
import errno
import importlib
import os
import re
from unittest import mock

import pytest
import torch
from bench_files import ACCURACY, LAYER, ONE_CASE, SCALING, STEP
from broken import scaled
from torch import nn

from syncbn import collectives
from syncbn.__main__ import main
from syncbn.bench import agreement, cases, messages, peers, processes, scaling, step, timing
from syncbn.kernels import aten

MODULE = __name__
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


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


@pytest.mark.parametrize(
    "arguments",
    [
        "layer --repeats 1",
        "step --ranks 0",
        "scaling --bandwidth -1",
        "layer --threads 99999",
        "layer --dtypes int8",
        "layer --layouts row",
    ],
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


def test_a_picture_for_which_there_is_no_room(capsys, monkeypatch, tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "layer.png")
    monkeypatch.setattr(importlib.import_module("syncbn.bench.plot"), "run", mock.Mock(side_effect=error))
    assert main(["bench", "plot", "--results", str(tmp_path)]) == 1
    said = "syncbn bench: layer.png cannot be written or read (OSError: No space left on device)\n"
    assert capsys.readouterr().err == said


def test_a_gpu_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*LAYER, "--device", "cuda", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "syncbn bench: given --device cuda, and there is no GPU; expected one\n"
