"""Rows of measurements: appended to a CSV, each with the hardware, versions, commit and command that made it.

Requirements
    - append only, and never under other columns than a file has;
    - a row names no path of the machine that it was made on.
"""

import contextlib
import csv
import datetime
import importlib
import io
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..doctor.place import driver

Row = dict[str, Any]
HERE = Path(__file__).parent
CIRCUMSTANCES = ("date", "hardware", "python", "torch", "commit", "command")


class RowError(ValueError):
    """Rows do not fit the file that they are for."""


def directory(given: Path | None = None) -> Path:
    """Where rows go: the directory given, else benchmarks/results of the checkout one stands in, else ./syncbn-bench."""
    if given is not None:
        return given
    stands_in = Path.cwd()
    for place in (stands_in, *stands_in.parents):
        if (place / "benchmarks" / "results").is_dir() and (place / "syncbn").is_dir():
            return place / "benchmarks" / "results"
    return stands_in / "syncbn-bench"


def prepare(where: Path | None = None) -> None:
    """Make the directory of the rows, before anything is measured.

    Raises:
        RowError: no file can be written there.
    """
    path = directory(where)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = f"{type(error).__name__}: {error.strerror}"
        raise RowError(f"no rows can be written to {path} ({reason}); expected a folder for them as --results") from error


def require(name: str, rows: Sequence[Mapping[str, Any]], where: Path | None = None) -> None:
    """See that rows fit NAME.csv, as soon as the first are there.

    Raises:
        RowError: the file, or one row of them, has other columns.
    """
    path = directory(where) / f"{name}.csv"
    given = [[*row, *CIRCUMSTANCES] for row in rows]
    there = next(csv.reader([_text(path).split("\n", 1)[0]]), None) if path.exists() else None
    for columns in given:
        if columns != (there or given[0]):
            told = f"{', '.join(there or given[0])}; given {', '.join(columns)}"
            raise RowError(f"{path.name} has the columns {told}; nothing is appended")


def append(name: str, rows: Sequence[Mapping[str, Any]], where: Path | None = None, device: str = "cpu") -> Path:
    """Append rows to NAME.csv, which has the columns of the rows and those of `circumstances`; all of them or none.

    Raises:
        RowError: the file, or one row of them, has other columns; they cannot be written.
    """
    path = directory(where) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    require(name, rows, where)
    whole = [dict(row) | circumstances(device) for row in rows]
    if not whole:
        return path
    text, size = io.StringIO(), path.stat().st_size if path.exists() else 0
    writer = csv.DictWriter(text, list(whole[0]), lineterminator="\n")
    if not size:
        writer.writeheader()
    writer.writerows(whole)
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # no row that is cut, which the next would join
        raise RowError(f"no rows can be written to {path} ({type(error).__name__}: {error.strerror})") from error
    return path


def said(path: Path) -> str:
    """What a command tells of a file that it wrote to."""
    return f"rows appended to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"


def read(name: str, where: Path | None = None) -> list[dict[str, str]]:
    """The rows of NAME.csv as text, the oldest first; none if there is no such file.

    Raises:
        RowError: a row of it has other columns than its first line, as where it was cut, or it is no text.
    """
    path = directory(where) / f"{name}.csv"
    if not path.exists():
        return []
    rows = list(csv.DictReader(io.StringIO(_text(path))))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise RowError(f"row {number} of {path} has other columns than the file; expected the same: mend or remove it")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"given {path}, which is no text in UTF-8 ({error.reason}); expected rows of a benchmark") from error


def origin(recorded: Sequence[Mapping[str, str]]) -> str:
    """Where all these rows are from, for a picture."""
    words = {"hardware": "", "driver": "driver ", "torch": "torch ", "triton": "Triton ", "date": "", "commit": "commit "}
    found = {column: dict.fromkeys(row[column] for row in recorded if row.get(column)) for column in words}
    return ", ".join(words[column] + " and ".join(values) for column, values in found.items() if values)


def circumstances(device: str = "cpu") -> dict[str, str]:
    """When, where and by what a row was made."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    values = date, hardware(device), platform.python_version(), str(torch.__version__), commit(), command(sys.argv)
    return dict(zip(CIRCUMSTANCES, values, strict=True))


def hardware(device: str = "cpu") -> str:
    """The processor and the number of cores, or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def accelerator(device: torch.device) -> dict[str, str]:
    """Versions of what is below torch on a GPU, empty where there is none of them: columns of the rows measured there."""
    on_gpu = device.type == "cuda"
    return {
        "driver": driver() if on_gpu else "",
        "cuda": str(torch.version.cuda or "") if on_gpu else "",
        "triton": _version_of("triton"),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu and torch.distributed.is_nccl_available() else "",
    }


def _version_of(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return ""


def commit() -> str:
    """The commit of the checkout, marked if anything but recorded results has changed; of an installation, the version."""
    if not _git("ls-files", "--", __file__):
        return f"version {__version__}"
    top = _git("rev-parse", "--show-toplevel")
    changed = _git("-C", top, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return _git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command(arguments: Sequence[str]) -> str:
    """The command line, as one types it in the checkout."""
    program, *rest = arguments
    path = Path(program)
    if path.name in ("__main__.py", "syncbn"):
        return shlex.join(["python", "-m", "syncbn", *rest])
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.join(["python", path.name if path.is_absolute() else str(path), *rest])
