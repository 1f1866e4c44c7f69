"""benchmarks/gpu.sh by an interpreter that only writes down what it is asked: whether all of that can be asked, and in time."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupts
import pytest

from syncbn.__main__ import main
from syncbn.bench import run as bench
from syncbn.bench.cases import RESNET50, chosen

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = ["build", "tests", "resnet50", "layer-of-resnet50", "fused", "merge", "layer", "plot"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs timeout of GNU, and /proc")
WRITES = """#!/bin/sh
printf '%s\\n' "$*" >> {asked}
case "$*" in {case}) {does};; esac
"""


def started(directory: Path, case: str = "none", does: str = "true", **environment: str) -> "subprocess.Popen[str]":
    """The script, its output to be read; of the interpreter's commands those like `case` do something."""
    python = directory / "python"
    python.write_text(WRITES.format(asked=directory / "asked", case=case, does=does))
    python.chmod(0o755)
    where = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)} | environment
    with interrupts.heard():
        return subprocess.Popen([SCRIPT, directory / "logs"], stdout=subprocess.PIPE, text=True, env=where)


def said(script: "subprocess.Popen[str]") -> dict[str, str]:
    """What became of each step, by its name."""
    printed, _ = script.communicate(timeout=60)
    return dict(line.split(",")[0].split(": ", 1) for line in printed.splitlines())


def test_what_it_asks_can_be_asked(tmp_path, monkeypatch):
    """Options that each command has, shapes that the benchmark has, files of tests that are there."""
    with started(tmp_path) as script:
        assert said(script) == dict.fromkeys(STEPS, "0")
    assert script.returncode == 0
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert len(asked) == len(STEPS)

    ran = []
    monkeypatch.setattr(bench, "run", lambda name, options: ran.append((name, options)) or 0)
    for words in asked[2:]:
        assert main(words[2:]) == 0
    assert [name for name, _ in ran] == ["resnet50", "layer", "fused", "merge", "layer", "plot"]
    assert {options.device for name, options in ran if name != "plot"} == {"cuda"}
    assert len(chosen(ran[1][1])) == 2 * 2 * len(RESNET50)
    assert asked[0] == ["-m", "syncbn", "build"]
    assert asked[1][:2] == ["-m", "pytest"]
    assert asked[1][2] == "--session-timeout=1800"
    assert {Path(name).stem for name in asked[1][3:]} == files_of_gpus()


def files_of_gpus() -> set[str]:
    """As benchmarks/README.md names them."""
    (line,) = (line for line in (ROOT / "benchmarks" / "README.md").read_text().splitlines() if "-m pytest tests/" in line)
    patterns = line.split("pytest ")[1].split("`")[0].split()
    return {path.stem for path in itertools.chain.from_iterable(map(ROOT.glob, patterns))}


def test_a_step_that_fails_costs_no_other(tmp_path):
    with started(tmp_path, "*merge*", "echo no GPU; exit 3") as script:
        assert said(script) == dict.fromkeys(STEPS, "0") | {"merge": "3"}
    assert script.returncode == 1
    assert (tmp_path / "logs" / "merge.txt").read_text() == "no GPU\n"


def test_steps_for_which_no_time_is_left_are_named(tmp_path):
    """The one that takes too long is ended at the end of the time for all."""
    with started(tmp_path, "*resnet50", "exec sleep 60", SECONDS_IN_ALL="2") as script:
        found = said(script)
    assert script.returncode == 1
    assert list(found.values()) == ["0", "0", "124", *["no time is left"] * 5]
    assert list(found) == STEPS


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_what_it_started(tmp_path, how):
    with started(tmp_path, "*build", f"echo $$ > {tmp_path}/number; exec sleep 60") as script:
        number = tmp_path / "number"
        until = time.monotonic() + 30
        while not (number.exists() and number.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        script.send_signal(how)
        assert script.wait(30) == 130
    process = Path("/proc", number.read_text().strip())
    while process.exists() and "Z" not in process.joinpath("stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (tmp_path / "asked").read_text().splitlines() == ["-m syncbn build"]
