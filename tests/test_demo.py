"""The demo: real runs, the check it makes of itself, and that no process outlives it."""

import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import interrupts
import numpy as np
import pytest
import torch
from torch import nn

from syncbn.__main__ import main
from syncbn.demo import compare, launch, report, run, train

STEPS = 25  # of planted records
STARTUP = 100  # seconds in which demos, two of them side by side, begin to train on a loaded machine
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find processes")


def start(directory: Path, *options: str) -> "subprocess.Popen[str]":
    """The command as a user starts it; every process of it has the directory as TMPDIR in its environment."""
    command = [sys.executable, "-m", "syncbn", "demo", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with interrupts.heard():
        return subprocess.Popen(command, cwd=directory, env=os.environ | {"TMPDIR": str(directory)}, **pipes)


def end(demo: "subprocess.Popen[str]") -> None:
    demo.kill()
    demo.communicate()


@pytest.fixture(scope="module", autouse=True)
def whole_demo(tmp_path_factory):
    """A short demo that nothing disturbs, started before the other tests of this file."""
    directory = tmp_path_factory.mktemp("whole")
    demo = start(directory, "--world-size=2", "--batch-size=3", "--steps=6", "--seed=1", "--out=picture.png")
    yield directory, demo
    end(demo)


@pytest.fixture
def interrupted(tmp_path):
    demo = start(tmp_path, "--world-size=2", "--batch-size=2", "--steps=200")
    yield demo
    end(demo)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two demos side by side, of which one was killed, and of the other its launcher."""
    demos = {}
    try:
        for victim in ("demo", "launcher"):
            directory = tmp_path_factory.mktemp(victim)
            demos[victim] = directory, start(directory, "--world-size=2", "--batch-size=2", "--steps=3000")
        for directory, _ in demos.values():
            assert wait_until(lambda of=directory: list(of.glob("syncbn-demo-*/whole/loss-0.npy")), STARTUP)
        for victim, (directory, demo) in demos.items():
            launcher = next(number for number, line in processes(directory).items() if "torch.distributed.run" in line)
            os.kill(demo.pid if victim == "demo" else launcher, signal.SIGKILL)
        yield demos, time.monotonic() + 20
    finally:
        for _, demo in demos.values():
            end(demo)


def processes(directory: Path) -> dict[int, str]:
    """The command lines of the processes that live with `directory` as TMPDIR, by their ids."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={directory}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def wait_until(condition, seconds):
    """The first true value of condition(), asked until the time is over; else the last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def figures(output: str) -> dict[tuple[str, str], list[float]]:
    """The table of differences: (run, span of steps) → loss, parameters, running statistics."""
    table, name = {}, ""
    for line in output.splitlines():
        if match := re.fullmatch(r"(\([bc]\))? .*?(1|1-\d+)((?: +\d\.\de[+-]\d\d){3})", line):
            name = match[1] or name
            table[name, match[2]] = [float(value) for value in match[3].split()]
    return table


def test_sigterm_is_an_interrupt(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "train", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert main(["demo", f"--out={tmp_path / 'picture.png'}"]) == 130
    assert capsys.readouterr().err.endswith("syncbn demo: interrupted\n")
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_a_failing_launch_is_status_1_with_its_own_error_shown(monkeypatch, capfd, tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit('planted')"]
    monkeypatch.setattr(run, "torchrun", lambda *_: failing)
    assert main(["demo", f"--out={tmp_path / 'picture.png'}"]) == 1
    errors = capfd.readouterr().err
    assert "planted\n" in errors
    assert errors.endswith("the processes of mode whole ended with exit status 1; expected 0: see the error above\n")
    assert not list(tmp_path.iterdir())


def test_a_process_that_does_not_leave_is_reported(monkeypatch):
    monkeypatch.setattr(launch, "LEAVING", 0.2)
    stubborn = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3)'])"
    with pytest.raises(launch.LaunchError, match=r"processes of mode x are left 0.2 s after the launcher"):
        launch.launch([sys.executable, "-c", stubborn], "mode x")


def plant(monkeypatch, local=0.5, synced=1e-7, step=3, rank_1=0.0):
    """Instead of training, records where (b) and (c) have relative differences of loss, from a step on, and rank 1's others."""

    def record(modes, size, directory, options):
        for mode in modes:
            factor = {"whole": 0.0, "local": local, "syncbn": synced}[mode]
            loss = np.full(STEPS, options.world_size * options.batch_size, dtype=np.float64)
            loss[step:] *= 1 + factor
            (directory / mode).mkdir()
            for rank in range(size):
                np.save(directory / mode / f"loss-{rank}.npy", loss / size)
                np.save(directory / mode / f"running-{rank}.npy", np.full((STEPS, 4), rank * rank_1))
            parameters = np.zeros((STEPS, 6))
            parameters[7, 2] = factor
            np.save(directory / mode / "parameters.npy", parameters)
            summary = {"accuracy": 0.5, "seconds": 1.0, "imported_syncbn": mode == "syncbn"}
            (directory / mode / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(run, "train", record)


@pytest.mark.parametrize(
    ("size", "planted", "status", "words"),
    [
        (2, {}, 0, ["PASSED", "ok   (c)", "ok   (b)"]),
        (2, {"synced": 1e-3}, 1, ["FAILED", "BAD  (c)"]),
        (2, {"synced": 1.1e-5}, 1, ["FAILED", "BAD  (c)", "ok   (b)"]),
        (2, {"synced": 9e-6, "local": 8e-4}, 1, ["FAILED", "ok   (c)", "BAD  (b)"]),
        (2, {"synced": 0.0, "local": 0.0}, 1, ["FAILED", "ok   (c)", "BAD  (b)"]),
        (2, {"synced": 0.0}, 0, ["PASSED", "inf times"]),
        (2, {"synced": float("nan")}, 1, ["FAILED", "BAD  (c)", "BAD  (b)"]),
        (2, {"synced": 1e-3, "step": 19}, 1, ["steps 1-20: FAILED"]),
        (1, {"synced": 1e-3}, 0, ["not checked"]),
        (2, {"step": 20}, 1, ["ok   (c)", "BAD  (b)"]),
    ],
)
def test_the_check_decides_the_exit_status(monkeypatch, capsys, tmp_path, size, planted, status, words):
    plant(monkeypatch, **planted)
    assert main(["demo", f"--world-size={size}", f"--out={tmp_path / 'picture.png'}"]) == status
    output = capsys.readouterr().out
    for word in words:
        assert word in output
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_picture_for_which_there_is_no_room(monkeypatch, capsys, tmp_path):
    plant(monkeypatch)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "picture.png")
    monkeypatch.setattr(report, "draw", mock.Mock(side_effect=error))
    assert main(["demo", "--world-size=2", f"--out={tmp_path / 'picture.png'}"]) == 1
    said = capsys.readouterr()
    assert "PASSED" in said.out
    assert said.err.endswith("syncbn demo: picture.png cannot be written or read (OSError: No space left on device)\n")


def test_the_table_has_the_largest_difference_of_any_rank_up_to_a_step(monkeypatch, capsys, tmp_path):
    plant(monkeypatch, local=0.25, synced=2e-7, rank_1=-0.125)
    assert main(["demo", "--world-size=2", f"--out={tmp_path / 'picture.png'}"]) == 0
    assert figures(capsys.readouterr().out) == {
        ("(b)", "1"): [0.0, 0.0, 0.12],
        ("(b)", "1-20"): [0.25, 0.25, 0.12],
        ("(b)", "1-25"): [0.25, 0.25, 0.12],
        ("(c)", "1"): [0.0, 0.0, 0.12],
        ("(c)", "1-20"): [2e-7, 2e-7, 0.12],
        ("(c)", "1-25"): [2e-7, 2e-7, 0.12],
    }


def test_a_loss_of_zero_is_no_division_by_zero():
    def made(loss):
        zeros = np.zeros((3, 1))
        return compare.Run(np.array(loss), zeros, [zeros], 0.5, 1.0, False)

    assert compare.differences(made([0.0, 1.0, 3.0]), made([0.0, 0.0, 2.0])).loss.tolist() == [0.0, np.inf, 0.5]


def test_axis_limits_keep_everything_finite_and_zero_below_it():
    assert report._limits(np.array([0.0, 3e-9, 0.2, np.inf])) == (pytest.approx(1e-10), pytest.approx(1.0))
    assert report._limits(np.zeros(2)) == (pytest.approx(1e-8), pytest.approx(1e-4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size=0"], "--world-size: given '0'; expected a whole number, 1 or more"),
        (["--world-size=two"], "--world-size: given 'two'; expected a whole number, 1 or more"),
        (["--batch-size=0"], "--batch-size: given '0'; expected a whole number, 1 or more"),
        (["--steps=0"], "--steps: given '0'; expected a whole number, 1 or more"),
        (["--seed=-1"], "--seed: given '-1'; expected a whole number, 0 or more"),
        (["--seed=99999999999999999999"], "--seed: given '99999999999999999999'; expected a whole number, 0 or more"),
        (["--world-size=2", "--batch-size=719"], "1438 in a global batch; expected at most the 1437 images"),
        (["--out=missing/picture.png"], "--out: given 'missing/picture.png'; expected a file that can be written"),
        (["--out=."], "--out: given '.'; expected a file that can be written"),
        (["--out=/proc/picture.png"], "--out: given '/proc/picture.png'; expected a file that can be written"),
        (["--world-size"], "--world-size: expected one argument"),
    ],
)
def test_usage_errors(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_demo", lambda options: pytest.fail("the demo ran"))
    with pytest.raises(SystemExit) as stop:
        main(["demo", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("tqdm", "tqdm")])
def test_missing_packages_are_named_with_what_to_install(monkeypatch, capsys, tmp_path, module, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(run, "_demo", lambda options: pytest.fail("the demo ran"))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        f'syncbn demo: {package} not installed; expected what the demo needs: pip install "syncbn[demo]"\n'
    )


def test_the_network_has_residual_blocks_and_no_batch_norm_of_a_single_value():
    model = train.network()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) >= 8
    assert {type(layer) for layer in layers} == {nn.BatchNorm2d}
    values = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: values.append(inputs[0][:, 0].numel()))
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    assert len(values) == len(layers)
    assert min(values) >= 4


def test_every_epoch_has_another_order_and_no_incomplete_batch():
    made = list(train.batches(samples=10, size=4, steps=5, seed=3))
    assert [len(batch) for batch in made] == [4] * 5
    epochs = [torch.cat(made[0:2]).tolist(), torch.cat(made[2:4]).tolist()]
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert all(torch.equal(*pair) for pair in zip(made, train.batches(10, 4, 5, 3), strict=True))
    assert not torch.equal(made[0], next(train.batches(10, 4, 5, 4)))


def test_buffers_are_not_broadcast_under_either_name_of_the_option(monkeypatch):
    def older(module, broadcast_buffers=True):
        return {"broadcast_buffers": broadcast_buffers}

    def newer(module, broadcast_buffers=None, forward_sync_buffers=None):
        return {"broadcast_buffers": broadcast_buffers, "forward_sync_buffers": forward_sync_buffers}

    monkeypatch.setattr(train, "DistributedDataParallel", older)
    assert train.build("local", 0) == {"broadcast_buffers": False}
    monkeypatch.setattr(train, "DistributedDataParallel", newer)
    assert train.build("local", 0) == {"broadcast_buffers": None, "forward_sync_buffers": False}


def test_help_imports_nothing_of_the_demo_extra():
    code = """import sys; from syncbn.__main__ import main
try: main(["demo", "--help"])
finally: print(sorted({"sklearn", "matplotlib", "syncbn.demo.report", "syncbn.demo.train"} & set(sys.modules)))"""
    help = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--world-size" in help
    assert help.endswith("[]\n")


@pytest.mark.timeout(300)
@needs_proc
def test_interrupt_ends_every_process(interrupted, tmp_path):
    assert wait_until(lambda: list(tmp_path.glob("syncbn-demo-*/local/loss-1.npy")), STARTUP)
    assert len([line for line in processes(tmp_path).values() if "train.py" in line]) >= 3  # the launcher and two more
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=10)  # not the time that training takes
    assert interrupted.returncode == 130
    assert errors.endswith("syncbn demo: interrupted\n")
    assert "Traceback" not in errors
    assert processes(tmp_path) == {}
    assert not list(tmp_path.glob("syncbn-demo-*"))


@pytest.mark.timeout(300)
@needs_proc
@pytest.mark.parametrize("victim", ["demo", "launcher"])
def test_a_killed_demo_or_launcher_leaves_no_process(killed, victim):
    demos, limit = killed
    directory, demo = demos[victim]
    _, errors = demo.communicate(timeout=max(1.0, limit - time.monotonic()))
    assert demo.returncode == (-9 if victim == "demo" else 1)
    assert ("processes of mode whole ended with exit status -9; expected 0" in errors) == (victim == "launcher")
    assert wait_until(lambda: not processes(directory), limit + 20 - time.monotonic()), processes(directory)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-u", "true"], check=False).returncode != 0,
    reason="needs root, for a hostname of its own",
)
@pytest.mark.timeout(150)
def test_a_hostname_that_does_not_resolve(tmp_path):
    """As in some containers: processes on one machine need none."""
    demo = f"{shlex.quote(sys.executable)} -m syncbn demo --world-size=2 --batch-size=2 --steps=2"
    command = ["unshare", "-u", "sh", "-c", f"hostname no.such.host.invalid && exec {demo}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=STARTUP, check=False)
    assert done.returncode == 0, done.stderr
    assert "picture: " in done.stdout


@pytest.mark.timeout(300)
def test_two_processes_pass_the_check_and_show_the_differences(whole_demo):
    directory, demo = whole_demo
    output, errors = demo.communicate()
    assert demo.returncode == 0, errors
    assert "Warning" not in errors
    assert "checked, loss of steps 1-6: PASSED" in output
    accuracies = re.findall(r"^\([abc]\) .* (\d+\.\d)% +\d+\.\d s$", output, re.MULTILINE)
    assert len(accuracies) == 3
    assert accuracies[0] == accuracies[2]
    table = figures(output)
    assert set(table) == set(itertools.product(["(b)", "(c)"], ["1", "1-6"]))
    assert all(value < 1e-5 for value in table["(c)", "1-6"])
    assert all(local > 100 * synced for local, synced in zip(table["(b)", "1-6"], table["(c)", "1-6"], strict=True))
    assert "picture: picture.png" in output
    header = (directory / "picture.png").read_bytes()[:24]
    assert header[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    width, height = struct.unpack(">II", header[16:])
    assert 1200 <= width <= 2400
    assert 500 <= height <= 1200
    assert not list(directory.glob("syncbn-demo-*"))


def test_help_tells_defaults_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    told = capsys.readouterr().out
    assert "(default: 0)" in told
    assert "None" not in told
