"""The processes of a benchmark: none is left, none is waited for without end; two nodes on one machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncbn.bench import namespaces, processes

MODULE = __name__
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


def one_fails(rank, world_size):
    if rank == 1:
        raise OSError("planted")
    time.sleep(100)


def none_answers(rank, world_size):
    time.sleep(100)


def test_the_first_failure_ends_all_processes(capfd):
    start = time.monotonic()
    with pytest.raises(processes.ProcessError, match=rf"rank 1 of 2 of {MODULE}:one_fails ended with exit status 1"):
        processes.run(f"{MODULE}:one_fails", {}, 2, 90)
    assert time.monotonic() - start < 40
    assert "OSError: planted" in capfd.readouterr().err


def test_processes_that_do_not_answer_are_an_error_in_time():
    start = time.monotonic()
    with pytest.raises(processes.ProcessError, match=r"no answer from ranks \[0\] of 1 .* within 1 s"):
        processes.run(f"{MODULE}:none_answers", {}, 1, 1)
    assert time.monotonic() - start < 30


STARTER = f"from syncbn.bench import processes; processes.run('{MODULE}:none_answers', {{}}, 1, 90)"


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
