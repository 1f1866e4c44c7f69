"""Types of options on the command line, whose errors say what was given and what was expected, and how help tells defaults."""

import argparse
from collections.abc import Callable


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"given {text!r}; expected a whole number, {least} or more")
        return int(text)

    return parse


def positive(text: str) -> float:
    """The type of an option that takes numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a number above 0")
    return value


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
