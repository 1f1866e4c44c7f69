"""Commands of `syncbn bench` that take little, and the rows that they leave."""

import argparse
import csv
from pathlib import Path

from syncbn.bench.run import add_command

ONE_CASE = ["--shapes", "8x512x7x7", "--layouts", "contiguous", "--threads", "1", "--dtypes", "float32"]
LAYER = ["bench", "layer", *ONE_CASE, "--repeats", "2"]
STEP = ["bench", "step", "--ranks", "2", "--width", "4", "--images", "2", "--repeats", "2", "--timeout", "60"]
SCALING = ["bench", "scaling", "--ranks", "2", "--channels", "64", "--repeats", "3", "--timeout", "60"]
ACCURACY = ["bench", "accuracy", "--images", "4", "--channels", "3", "--size", "8"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parsed(command: str, results: Path) -> argparse.Namespace:
    """The options of a command, which is not run."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["bench", *command.split(), "--results", str(results)])


def write(path: Path, found: list[dict[str, object]], circumstances: dict[str, object]) -> None:
    """Rows that nobody measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *circumstances])
        writer.writeheader()
        writer.writerows([row | circumstances for row in found])
