"""`bench resnet50`, as far as it runs without a GPU."""

from unittest import mock

import pytest
import torch
from bench_files import read
from torch import nn

from syncbn.__main__ import main
from syncbn.bench import counts, memory, network, peers, resnet50, step
from syncbn.kernels import extension

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


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
    monkeypatch.setattr(extension, "library", None)  # whatever was built here


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
