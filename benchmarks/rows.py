"""Rows of measurements: appended to a CSV, each with the hardware, versions, commit and command that made it."""

import csv
import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append rows to results/NAME.csv, which has the columns of the rows and those of `circumstances`."""
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    rows = [row | circumstances() for row in rows]
    if not new and path.read_text().split("\n", 1)[0] != ",".join(rows[0]):
        raise SystemExit(f"{path} has other columns than {', '.join(rows[0])}; nothing is appended")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def circumstances() -> dict[str, str]:
    """When, where and by what a row was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def hardware() -> str:
    """The processor and the number of cores, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def commit() -> str:
    """The commit of the checkout, marked if it has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
