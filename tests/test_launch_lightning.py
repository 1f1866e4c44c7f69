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
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.setattr(lightning, "Trainer", trainer := mock.Mock())
    monkeypatch.setattr(sys, "argv", ["lightning_train.py", "--processes=1", "--timeout=77"])
    runpy.run_path(str(LAUNCH / "lightning_train.py"), run_name="__main__")
    assert trainer.call_args.kwargs["strategy"]._timeout == datetime.timedelta(seconds=77)
    assert trainer.return_value.fit.call_count == 1
