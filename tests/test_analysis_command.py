"""`python -m syncbn analyze`: what is said before anything starts, the exit status, the user's own network, and torchrun."""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn

from syncbn.__main__ import main
from syncbn.analysis import claims, plots, run
from syncbn.analysis.claims import Claim, Outcome, at_least, at_most, near
from syncbn.analysis.experiments import growth as experiment

MODULE = "test_analysis_command"
PNG = b"\x89PNG\r\n\x1a\n"


def deep():
    """Twelve equal layers; as many samples per rank as values."""
    torch.manual_seed(0)
    layers = [part for _ in range(12) for part in (nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(8, 64), lambda model, x: model(x).square().mean()


def only_a_model():
    return nn.Linear(2, 2)


def without_loss():
    return nn.Linear(2, 2), torch.randn(2, 2), None


def that_raises():
    raise OSError("no weights")


def without_gradient():
    return nn.Linear(2, 2), torch.randn(2, 2), lambda model, x: model(x).argmax()


def without_batch_norm():
    return nn.Linear(2, 2), torch.randn(2, 2), lambda model, x: F.mse_loss(model(x), x)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze"], "the following arguments are required: what"),
        (["analyze", "moise"], "invalid choice: 'moise'"),
        (["analyze", "noise", "--model", "a:b"], "given --model with noise; expected growth"),
        (["analyze", "growth", "--model", "a"], "given 'a'; expected module:function"),
        (["analyze", "noise", "--seeds", "-1"], "given '-1'; expected a whole number"),
        (["analyze", "noise", "--seeds", "x"], "given 'x'; expected a whole number"),
        (
            ["analyze", "noise", "--out", "/nowhere"],
            "given --out /nowhere; expected a directory that can be written to: /nowhere",
        ),
        (["analyze", "gdnp", "--out", "/proc"], "given --out /proc; expected a directory that can be written to: /proc"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_some_experiments_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["analyze", "noise"])
    assert "given 2 ranks for noise; expected one: only growth and shift run data parallel" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_torchrun_that_is_no_number(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "two")
    with pytest.raises(SystemExit) as exit_:
        main(["analyze", "growth"])
    assert exit_.value.code == 2
    assert f"given {variable}='two' in the environment; expected a whole number" in capsys.readouterr().err


def test_ranks_share_a_batch_of_64(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        main(["analyze", "shift"])
    assert "given 3 ranks; expected a number that divides the batch of 64" in capsys.readouterr().err


def test_what_is_not_installed_is_said_first(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert main(["analyze", "growth"]) == 1
    assert (
        'matplotlib not installed; expected what the experiments need: pip install "syncbn[analysis]"'
        in capsys.readouterr().err
    )


def outcome(*measured):
    def draw(figure):
        figure.subplots().plot([0, 1], [1, 2])

    return Outcome([at_most("a claim", value, 1.0) for value in measured], ["a note"], draw)


@pytest.mark.parametrize(("measured", "status", "said"), [((0.5,), 0, "every claim holds"), ((0.5, 2.0), 1, "1 claim FAILED")])
def test_the_exit_status_is_that_of_the_claims(measured, status, said, monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "run", lambda settings: seen.append(settings) or outcome(*measured))
    assert main(["analyze", "growth", "--quick", "--seeds", "3", "7", "--out", str(tmp_path)]) == status
    assert (seen[0].quick, seen[0].seeds) == (True, (3, 7))
    out = capsys.readouterr().out
    assert said in out
    assert "note: a note" in out
    assert ("FAILS" in out) == (status == 1)
    assert (tmp_path / "syncbn-growth.png").read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_is_said_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(experiment, "run", lambda settings: pytest.fail("began"))
    (tmp_path / "syncbn-growth.png").mkdir()
    for what in ("growth", "all"):
        with pytest.raises(SystemExit) as exit_:
            main(["analyze", what, "--out", str(tmp_path)])
        assert exit_.value.code == 2
        said = f"expected a directory that can be written to: {tmp_path / 'syncbn-growth.png'}: Is a directory"
        assert said in capsys.readouterr().err


def test_a_directory_is_not_asked_for_a_picture_that_is_not_drawn(capsys):
    assert main(["analyze", "growth", "--model", f"{MODULE}:deep", "--out", "/nowhere"]) == 0
    assert "first layer over last" in capsys.readouterr().out


def test_a_picture_that_is_there_is_written_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "run", lambda settings: outcome(0.0))
    (path := tmp_path / "syncbn-growth.png").write_text("old")
    assert main(["analyze", "growth", "--out", str(tmp_path)]) == 0
    assert path.read_bytes().startswith(PNG)


def test_claims_are_printed_where_the_picture_fails(monkeypatch, capsys, tmp_path):
    def full(figure, path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(experiment, "run", lambda settings: outcome(0.5))
    monkeypatch.setattr(plots, "write", full)
    assert main(["analyze", "growth", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert re.search(r"a claim +≤ 1 +0.5 +holds", said.out)
    assert "note: a note" in said.out
    assert "picture" not in said.out
    path = tmp_path / "syncbn-growth.png"
    assert said.err == f"syncbn analyze: {path} cannot be written or read (OSError: No space left on device)\n"


def test_a_pipe_that_breaks_is_no_file_that_cannot_be_written(monkeypatch, tmp_path):
    def gone(settings):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(experiment, "run", gone)
    run.add_command((parser := argparse.ArgumentParser()).add_subparsers())
    options = parser.parse_args(["analyze", "growth", "--out", str(tmp_path)])
    with pytest.raises(BrokenPipeError):
        options.run(options)


def test_all_runs_every_experiment(monkeypatch, tmp_path):
    ran = []
    for name in run.NAMES:
        module = importlib.import_module(f"syncbn.analysis.experiments.{name}")
        monkeypatch.setattr(module, "run", lambda settings, name=name: ran.append(name) or outcome(0.0))
    assert main(["analyze", "all", "--out", str(tmp_path)]) == 0
    assert ran == ["noise", "shift", "growth", "smoothness", "gdnp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"syncbn-{name}.png" for name in ran)


def test_a_job_whose_ranks_do_not_meet(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    assert main(["analyze", "growth", "--out", str(tmp_path)]) == 1
    assert re.match(
        r"syncbn analyze: this rank could not meet the others \(.*'x'.*\): start every rank\n$", capsys.readouterr().err
    )


def test_an_interrupt(monkeypatch, capsys, tmp_path):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    assert main(["analyze", "growth", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_claims():
    assert at_most("x", 1.0, 1.0).holds
    assert not at_most("x", 1.1, 1.0).holds
    assert at_least("x", 1.0, 1.0).holds
    assert not at_least("x", 0.9, 1.0).holds
    assert near("x", 1.019, 1.0, 0.02).holds
    assert not near("x", 0.979, 1.0, 0.02).holds
    for nothing in (at_most("x", float("nan"), 1.0), at_least("x", float("nan"), 1.0), near("x", float("nan"), 1.0, 0.1)):
        assert not nothing.holds
    table = claims.shown(Outcome([Claim("text", "≤ 1", "2", False)], [], print))
    assert table.splitlines() == ["claim  expected  measured  verdict", "text   ≤ 1       2         FAILS"]


def test_your_own_network(capsys):
    assert main(["analyze", "growth", "--model", f"{MODULE}:deep"]) == 0
    out = capsys.readouterr().out
    assert "0      1      " in out
    assert "33     12     " in out
    assert "fitted: the squared norm of weight gradients grows by lambda_sq" in out
    assert "8 values per channel: lambda_sq 1.79" in out
    assert "2 ranks: unsynchronized, 4 values per channel: lambda_sq 3.08" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{MODULE}:only_a_model", "returned Linear; expected (model, batch, loss)"),
        (f"{MODULE}:without_loss", "returned (Linear, Tensor, NoneType); expected (model, batch, loss)"),
        (f"{MODULE}:without_gradient", "expected a tensor of one value that needs a gradient"),
        (f"{MODULE}:that_raises", "failed with OSError"),
        (f"{MODULE}:absent", "failed with AttributeError"),
        ("no_such_module:f", "failed with ModuleNotFoundError"),
    ],
)
def test_a_network_that_does_not_work(name, message, capsys):
    assert main(["analyze", "growth", "--model", name]) == 1
    assert message in capsys.readouterr().err


def test_a_network_without_batch_norm(capsys):
    assert main(["analyze", "growth", "--model", f"{MODULE}:without_batch_norm"]) == 0
    assert "no batch norm layer: nothing to synchronize" in capsys.readouterr().out


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "syncbn", *arguments]
    here = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=100,
    )


def _own_network(world):
    """The command on all four ranks of the job."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = main(["analyze", "growth", "--model", f"{MODULE}:deep"])
    return status, shown.getvalue()


def test_your_own_network_on_several_ranks():
    (status, shown), *others = worlds.run(4, _own_network)
    assert status == 0
    assert "unsynchronized, 8 values per channel: lambda_sq 1.79; synchronized, 32 values per channel: lambda_sq 1.52" in shown
    assert shown.rstrip().endswith(": synchronize")
    assert others == [(0, "")] * 3


def test_the_experiment_under_torchrun(tmp_path):
    done = torchrun("analyze", "growth", "--quick", "--seeds", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks of 32 values, synchronized: lambda_sq of 64 values" in done.stdout
    assert "2 ranks of 32 values, unsynchronized: lambda_sq of 32 values" in done.stdout
    assert (tmp_path / "syncbn-growth.png").read_bytes().startswith(PNG)


ENDED = """
from pathlib import Path
from syncbn.__main__ import main
assert main(["analyze", "growth", "--quick", "--seeds", "0"]) == 0
print("left:", *(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends(tmp_path):
    """One that then frees its last message aborts the process, rarely."""
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    done = subprocess.run([sys.executable, "-c", ENDED], env=os.environ | job, cwd=tmp_path, **pipes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo" not in done.stdout.partition("left: ")[2]
    assert "left: python" in done.stdout


def test_the_command_line_imports_no_package_of_the_experiments():
    code = "import sys, syncbn.__main__, syncbn.analysis; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"matplotlib", "sklearn"} & set(done.stdout.split())  # torch itself looks for tqdm
