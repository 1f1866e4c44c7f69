"""launch/lightning_train.py goes on where it was left, as the other programs do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.timeout(200)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find processes")
def test_lightning_waits_for_a_frozen_process_no_longer_than_the_timeout(tmp_path):
    pytest.importorskip("lightning")
    log, frozen = tmp_path / "log", []
    command = [sys.executable, LAUNCH / "lightning_train.py", "--epochs=500", "--processes=2", "--timeout=5"]
    with log.open("w") as file:
        trainer = subprocess.Popen(list(map(str, command)), env=environment(), stdout=file, stderr=subprocess.STDOUT)
        try:
            while "Trainable params" not in log.read_text():
                assert trainer.poll() is None, log.read_text()
                time.sleep(0.1)
            children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
            frozen += map(int, children.read_text().split())
            os.kill(frozen[0], signal.SIGSTOP)
            assert trainer.wait(60) == 1
        finally:
            trainer.kill()
            trainer.wait()
            for process in frozen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    ours = r"failed in (forward|backward) on rank 0 of 2.*to reach it within 0:00:05"
    theirs = "Timed out waiting 5000ms|Application timeout"
    assert re.search(f"{ours}|{theirs}", log.read_text()), "in a layer, or in DistributedDataParallel"
