"""What commands have in common: types of options, whose errors say what was given and expected, help, and users' functions."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

LARGEST = 2**63 - 1  # of torch's integers


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers of `least` and more, and no more than `most`."""
    expected = f"a whole number, {least} {'or more' if most is None else f'to {most}'}"

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= (LARGEST if most is None else most):
            raise argparse.ArgumentTypeError(f"given {text!r}; expected {expected}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """The type of an option that takes numbers above 0, up to what a timeout may be."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"given {text!r}; expected a number above 0, 1e+09 at most")
    return value


def function_name(text: str) -> str:
    """The type of an option that names a function of the user's, `module:function`."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"given {text!r}; expected module:function")
    return text


def made_by(name: str) -> Any:
    """What that function gives, of a module in the working directory or on the path. Raises whatever either raises."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)()


def file_problem(error: OSError) -> str:
    """What a command says of a file that it cannot write or read, as on a full disk."""
    return f"{error.filename or 'a file'} cannot be written or read ({type(error).__name__}: {error.strerror})"


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
