"""Benchmarks: turns, peaks of memory, rows that are kept apart, and checks against what was recorded."""

import csv
import errno
import io
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_files import LAYER, read

from syncbn.__main__ import main
from syncbn.bench import layer, memory, rows, timing

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("heap_as_it_is")


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


class Full(io.StringIO):
    """A file on a disk that has room for a part."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def write(self, text):
        with self.path.open("a") as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("there", [0, 1])
def test_of_rows_for_which_there_is_no_room_none_is_written(there, tmp_path, monkeypatch):
    path = rows.append("name", [{"a": 1}] * there, tmp_path)
    path.touch()
    before, opened = path.read_text(), Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **more: Full(self) if more else opened(self, mode))
    with pytest.raises(rows.RowError, match=r"no rows can be written to .*name.csv \(OSError: No space left on device\)"):
        rows.append("name", [{"a": 2}], tmp_path)
    monkeypatch.undo()
    assert path.read_text() == before
    rows.append("name", [{"a": 3}], tmp_path)
    assert [row["a"] for row in rows.read("name", tmp_path)] == ["1", "3"][1 - there :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n3\n", "row 2 of .* has other columns than the file; expected the same"),
        (b"a,b\n1,2,3\n", "row 1 of .* has other columns"),
        (b"a,b\n\xff,2\n", r"name.csv, which is no text in UTF-8 \(invalid start byte\); expected rows"),
    ],
)
def test_a_file_that_is_no_rows_is_an_error(content, said, tmp_path):
    (tmp_path / "name.csv").write_bytes(content)
    with pytest.raises(rows.RowError, match=said):
        rows.read("name", tmp_path)


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
