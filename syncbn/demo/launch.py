"""Start the demo's processes by torch's launcher, and leave none behind.

Standard input of the launcher, and so of every process it starts, is one end of a socket pair whose other end is here.
When this end closes (the demo was interrupted, killed, or the launcher died) each process leaves by itself: see train.py.
When all of the other end is closed, no process is left: that is what `launch` waits for before it returns or raises.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LEAVING = 30.0  # seconds that processes get to leave: they may still be importing torch

QUIET = {
    "OMP_NUM_THREADS": "1",  # the launcher warns where it is not set
    "LOGLEVEL": "ERROR",  # the launcher's own messages
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class LaunchError(RuntimeError):
    """The launcher, or a process that it started, failed; its own message is on standard error."""


def torchrun(size: int, logs: Path, script: Path, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `script` in `size` processes of this machine; their standard output goes below `logs`.

    They meet on loopback: by the hostname, which torchrun takes else and which may not resolve, they would look for each other
    for minutes.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={size}", "--redirects=1", f"--log-dir={logs}", str(script), *arguments]


def launch(command: Sequence[str], name: str) -> None:
    """Run `command` to its end. Whatever happens, nothing that it started is left afterwards.

    Raises:
        LaunchError: it ended with another status than 0, or left processes that do not go.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            # A session of its own: Ctrl-C reaches the demo alone, which then ends the launcher quietly.
            launcher = subprocess.Popen(command, stdin=theirs.fileno(), env=os.environ | QUIET, start_new_session=True)
        try:
            status = launcher.wait()
        finally:
            launcher.kill()
            launcher.wait()
            _wait_for_the_others(ours, name)
    if status != 0:
        raise LaunchError(f"the processes of {name} ended with exit status {status}; expected 0: see the error above")


def _wait_for_the_others(ours: socket.socket, name: str) -> None:
    """Tell the launcher's processes to leave, and return when none is left."""
    with contextlib.suppress(OSError):  # raised by some systems where all of the other end is closed
        ours.shutdown(socket.SHUT_WR)
    ours.settimeout(LEAVING)
    try:
        ours.recv(1)
    except TimeoutError:
        raise LaunchError(f"processes of {name} are left {LEAVING:g} s after the launcher; expected none") from None
