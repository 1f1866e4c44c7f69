"""What torchrun puts into the environment, for the programs that it starts."""

import os

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # all of them, or no job


def problem() -> str | None:
    """What is wrong with the environment, if anything: a number that is none, or a part of a job."""
    for variable in NUMBERS:
        text = os.environ.get(variable, "0")
        if not text.isdecimal():
            return f"given {variable}={text!r} in the environment; expected a whole number, as torchrun gives"
    missing = [variable for variable in JOB if variable not in os.environ]
    if "RANK" in os.environ and missing:
        return f"given RANK without {', '.join(missing)} in the environment; expected all, as torchrun gives, or no RANK"
    return None
