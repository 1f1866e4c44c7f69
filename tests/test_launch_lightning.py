"""launch/lightning_train.py goes on where it was left, as the other programs do."""

import datetime
import re
import runpy
import subprocess
import sys
from unittest import mock

import launched
import pytest
import torch
import train
from launched import LAUNCH, NEAR, OPTIONS, apart, environment, start

whole = launched.whole


def test_lightning_goes_on_inside_an_epoch_and_after_one_to_the_end_of_a_whole_run(whole, tmp_path):
    """Of two epochs, the last: it may not count those in which parts end as epochs of their own."""
    pytest.importorskip("lightning")
    path = tmp_path / "run.ckpt"
    for steps in (4, 16, 20):
        options = [*OPTIONS[:-2], f"--steps={steps}", "--epochs=2", "--processes=1", "--checkpoint", path]
        start(sys.executable, LAUNCH / "lightning_train.py", *options)
        state = torch.load(path, weights_only=False)
        assert state["global_step"] == steps
    network = {name.removeprefix("network."): value for name, value in state["state_dict"].items()}
    assert apart(whole | {"network": network, "optimizer": state["optimizer_states"][0]}, whole) < NEAR


def test_lightning_does_not_go_on_with_other_settings(tmp_path):
    pytest.importorskip("lightning")
    path = tmp_path / "run.ckpt"
    command = [sys.executable, LAUNCH / "lightning_train.py", "--batch-size=720", "--checkpoint", path]
    start(*command, "--processes=1", "--epochs=1")
    written = path.read_bytes()
    options = ["--processes=2", "--epochs=2", "--seed=1"]
    given = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    done = subprocess.run([*map(str, command), *options], env=environment(), **given)
    assert done.returncode == 1, done.stdout + done.stderr
    expected = r"^lightning_train.py: given \S+/run.ckpt, of a run with {'seed': 0}, where this one has {'seed': 1}\. The"
    assert len(re.findall(expected, done.stderr, re.MULTILINE)) == 1, "rank 0 speaks"
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == written
    start(*command, "--processes=1", "--epochs=2")
    assert torch.load(path, weights_only=False)["global_step"] == 4, "the same settings go on"


def test_lightning_writes_nothing_and_begins_anew_without_a_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        start(sys.executable, LAUNCH / "lightning_train.py", "--processes=1", "--batch-size=95", "--steps=1")
    assert list(tmp_path.iterdir()) == []


def test_lightning_waits_as_long_as_it_is_told(monkeypatch):
    """For the others to come, too: what a short wait does is not tried, for processes need some seconds to begin."""
    given = lightning_train(monkeypatch, "--processes=1", "--timeout=77", trainer=(trainer := mock.Mock()))
    assert given["strategy"]._timeout == datetime.timedelta(seconds=77)
    assert trainer.return_value.fit.call_count == 1


def lightning_train(monkeypatch, *options, trainer=None):
    """What the Trainer is given, by a start in this process that trains nothing."""
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.setattr(lightning, "Trainer", trainer := trainer or mock.Mock())
    monkeypatch.setattr(sys, "argv", ["lightning_train.py", *options])
    runpy.run_path(str(LAUNCH / "lightning_train.py"), run_name="__main__")
    return trainer.call_args.kwargs


@pytest.mark.parametrize(("gpus", "accelerator"), [(0, "cpu"), (1, "cpu"), (2, "gpu"), (3, "gpu")])
def test_lightning_runs_on_gpus_where_there_is_one_for_each_process(gpus, accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = lightning_train(monkeypatch, "--processes=2")
    assert (given["accelerator"], given["devices"]) == (accelerator, 2)


def test_lightning_has_torchs_batch_norm_with_a_gpu_for_each_process(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert lightning_train(monkeypatch, "--processes=2", "--bn=torch")["sync_batchnorm"]
    with pytest.raises(SystemExit, match="2"):
        lightning_train(monkeypatch, "--processes=3", "--bn=torch")
    expected = "argument --bn: given 'torch' with 2 GPUs for 3 processes of this machine; expected one for each, or local or"
    assert expected in capsys.readouterr().err


def test_the_help_of_lightnings_program_is_of_what_it_does(capsys):
    told = []
    for for_lightning in (False, True):
        with pytest.raises(SystemExit, match="0"):
            train.arguments(for_lightning).parse_args(["--help"])
        told.append(" ".join(capsys.readouterr().out.split()))
    assert "prints the loss of each epoch and the accuracy" in told[0]
    assert ".ckpt" not in told[0]
    assert "accuracy" not in told[1]
    assert "loss" not in told[1]
    assert "where there is one for each of --processes, else on CPUs" in told[1]
    assert "to FILE with the suffix .ckpt in place of its own" in told[1]
    assert "--checkpoint FILE write it, its suffix being .ckpt; go on" in told[1]


def test_a_checkpoint_that_lightning_cannot_write_or_use_is_an_error_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.ckpt", "beside.ckpt.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    torch.save({"settings": {}, "network": {}}, tmp_path / "other.ckpt")
    expected = {
        "none/run.ckpt": "in a folder that is not there; expected one that is",
        "folder.pt": "which is a folder; expected a file",
        ".": "which is a folder; expected a file",
        "beside.ckpt": r"which cannot be written \(IsADirectoryError: ",
        252 * "a": r"which cannot be written \(OSError: ",
        "garbage.ckpt": r"truncated or not a checkpoint \(UnpicklingError: .*The file is left as it is",
        "other.ckpt": "which another program wrote. The file is left as it is",
    }
    for given, message in expected.items():
        with pytest.raises(SystemExit, match=rf"^lightning_train.py: given {tmp_path}\S*, {message}"):
            lightning_train(monkeypatch, f"--checkpoint={given}", trainer=mock.Mock(side_effect=AssertionError))
    assert (tmp_path / "garbage.ckpt").read_bytes() == b"no checkpoint"
    assert not (tmp_path / "none").exists()
