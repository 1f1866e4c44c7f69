"""What torchrun puts into the environment, for the programs that it starts."""

import os

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def problem() -> str | None:
    """What is wrong with the first number that is none, if there is one; those that are missing are no matter."""
    for variable in NUMBERS:
        text = os.environ.get(variable, "0")
        if not text.isdecimal():
            return f"given {variable}={text!r} in the environment; expected a whole number, as torchrun gives"
    return None
