"""The command line: `python -m syncbn <command>`, also installed as `syncbn`.

Requirements: help and usage errors need nothing but torch; what a command needs is imported when it runs.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .analysis.run import add_command as add_analyze
from .bench.run import add_command as add_bench
from .build import add_command as add_build
from .demo.run import add_command as add_demo
from .doctor.run import add_command as add_doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (None: those of the process) name; the exit status: 0, 1 failed, 130 interrupted.

    Raises:
        SystemExit: 2 for a usage error, 0 after --help.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it cannot say µ or ×
    parser = argparse.ArgumentParser(prog="syncbn", description="Exact synchronized batch normalization for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    add_demo(commands)
    add_doctor(commands)
    add_bench(commands)
    add_analyze(commands)
    add_build(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError as error:  # most often who reads has read enough, as `head`
        print(f"syncbn: {error}: nobody reads what is printed, or a process is gone", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still has to print
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
