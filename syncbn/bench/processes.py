"""Several processes for a benchmark, each a rank of one process group.

Requirements
    - a rank is a fresh interpreter, which a command may precede: the one that enters a network namespace;
    - the rendezvous is a file in a new directory, which cannot collide, and is there in every namespace of a machine;
    - the first rank that fails ends them all, a timeout does, and so does the end of the process that started them.
"""

import contextlib
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

POLL = 0.02  # seconds


class ProcessError(RuntimeError):
    """A rank failed, or did not answer in time; its own error is on standard error."""


class Place(NamedTuple):
    """Where a rank runs."""

    prefix: Sequence[str] = ()  # of its command
    environment: Mapping[str, str] = {}


HERE = Place()


def run(
    task: str,  # module:function, called with (rank, world size, **arguments) on each rank
    arguments: Mapping[str, Any],  # JSON, as the answers are
    size: int,
    timeout: float,
    device: str = "cpu",
    places: Sequence[Place] | None = None,
) -> list[Any]:
    """The answers by rank.

    Raises:
        ProcessError: a rank failed, or they took longer than the timeout.
    """
    places = [HERE] * size if places is None else places
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        job = {"task": task, "arguments": dict(arguments), "size": size, "timeout": timeout, "device": device}
        (directory / "job.json").write_text(json.dumps(job))
        ranks = []
        for rank, place in enumerate(places):
            command = [*place.prefix, sys.executable, "-m", "syncbn.bench.processes", name, str(rank)]
            # The path as this process has it, so that the ranks find the same modules.
            path = os.pathsep.join(entry for entry in ("" if not sys.path[0] else sys.path[0], *sys.path[1:]) if entry)
            more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR", **place.environment}
            ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | more))
            stack.callback(_end, ranks[-1])
        _wait(ranks, task, timeout)
        return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]


@contextlib.contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of this process on a GPU, for layers that ask for one; none on the CPU."""
    if device.type != "cuda":
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], task: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed:
            raise ProcessError(
                f"rank {failed[0]} of {len(ranks)} of {task} ended with exit status {statuses[failed[0]]}: see above"
            )
        if all(status == 0 for status in statuses):
            return
        if time.monotonic() > end:
            waiting = [rank for rank, status in enumerate(statuses) if status is None]
            raise ProcessError(f"no answer from ranks {waiting} of {len(ranks)} of {task} within {timeout:g} s")
        time.sleep(POLL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _leave_with_the_starter() -> None:
    """End this process when the other end of standard input closes: who started it is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(directory: Path, rank: int) -> None:
    """One rank: join, call the task, leave the answer in a file."""
    _leave_with_the_starter()
    job = json.loads((directory / "job.json").read_text())
    if job["device"] == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if job["device"] == "cuda" else "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=job["size"],
        timeout=datetime.timedelta(seconds=job["timeout"]),
    )
    module, _, function = job["task"].partition(":")
    answer = getattr(importlib.import_module(module), function)(rank, job["size"], **job["arguments"])
    (directory / f"{rank}.json").write_text(json.dumps(answer))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # taking the interpreter down takes a second, and nothing is left to write
