"""Several processes for a test, warm: four are started once for a whole pytest run, and every case is a function they call.

    def case(world, x):                    # a module-level function of a test file; runs on every rank of the world
        return sync_batch_norm(x[world.rank], ..., process_group=world.group)

    results = run(3, case, x)              # by rank

World sizes below four are sub-groups of the four. The first rank to raise decides the error; a case that does not end in time,
or leaves a rank behind, ends the processes, and the next case starts new ones. The rendezvous is a file in a new directory.

All communicate by Gloo, or, where `over=NCCL` is given, by that: four other processes, with a GPU each or a share of one.
"""

import atexit
import contextlib
import datetime
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import nccl_ranks

SIZE = 4
GROUP_TIMEOUT = 30.0  # seconds a collective waits for a peer
CASE_TIMEOUT = 60.0
START_TIMEOUT = 90.0
START = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# Seconds to import, here once for all processes.
START.set_forkserver_preload(["torch", "torch._dynamo", "torch._inductor.compile_fx"])
GRACE = 1.0  # seconds the other ranks get to show that they failed too, or ended, after the first error
LEAVING = 10.0  # seconds the warm processes get to end by themselves: on a loaded machine GRACE is too short


class World(NamedTuple):
    """What a case knows of the processes it runs on."""

    rank: int
    size: int
    group: Any  # ProcessGroup of the ranks of this case
    directory: str  # of the rendezvous, for more of its kind
    device: str = "cpu"  # where tensors are to be


class Transport(NamedTuple):
    """What processes communicate by, where they compute, and how they are started."""

    backend: str = "gloo"
    device: str = "cpu"
    start: str = START.get_start_method()


GLOO = Transport()
# Spawned: CUDA cannot be used in a process forked from one that looked for GPUs, as the server may when it imports.
NCCL = Transport("nccl", "cuda", "spawn")
GLOO_ON_GPU = Transport("gloo", "cuda", "spawn")


class CaseError(AssertionError):
    """A case failed on a rank, or did not end in time."""


class _Processes:
    """Some processes with a default group, waiting for cases."""

    def __init__(self, size: int, group_timeout: float, over: Transport = GLOO) -> None:
        start = multiprocessing.get_context(over.start)
        self.directory = tempfile.TemporaryDirectory(prefix="syncbn-world-")
        store = os.path.join(self.directory.name, "store")
        self.pipes: list[Connection] = []
        self.processes = []
        with _single_threaded():
            for rank in range(size):
                ours, theirs = start.Pipe()
                arguments = (rank, size, store, theirs, group_timeout, over)
                process = start.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
        self.collect(range(size), START_TIMEOUT, "start")

    def run(self, ranks: int, timeout: float, name: str, case: tuple, lost: Collection[int] = ()) -> list[Any]:
        for pipe in self.pipes[:ranks]:
            pipe.send((ranks, *case))
        return self.collect([rank for rank in range(ranks) if rank not in lost], timeout, name)

    def collect(self, ranks: Any, timeout: float, name: str) -> list[Any]:
        """The results by rank; CaseError with the first traceback, or with the ranks that did not answer."""
        results: dict[int, Any] = {}
        failed: tuple[int, str] | None = None
        end = time.monotonic() + timeout
        pending = {self.pipes[rank]: rank for rank in ranks}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    ok, value = False, f"the process ended (exit code {self.exit_code(rank)})"
                if ok:
                    results[rank] = value
                elif failed is None:
                    failed = rank, value
                    end = min(end, time.monotonic() + GRACE)
        if failed is not None or pending:
            self.stop()
        if failed is not None:
            raise CaseError(f"{name}: rank {failed[0]} failed first:\n{failed[1]}")
        if pending:
            raise CaseError(f"{name}: no answer from ranks {sorted(pending.values())} within {timeout:g} s")
        return [results[rank] for rank in ranks]

    def exit_code(self, rank: int) -> int | None:
        self.processes[rank].join(GRACE)
        return self.processes[rank].exitcode

    def leave(self, seconds: float = GRACE) -> None:
        """Let the processes end by themselves, which frees their semaphores, and stop those that do not."""
        for pipe in self.pipes:
            pipe.close()
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.stop()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.directory.cleanup()
        self.pipes = []


_warm: dict[Transport, _Processes] = {}


def run(size: int, case: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT, over: Transport = GLOO) -> list[Any]:
    """Call case(world, *args) on `size` ranks, 1 to 4, of the warm processes; the results by rank.

    Raises:
        CaseError: the first rank that raised, with its traceback, or the ranks that gave no answer in time.
    """
    if over not in _warm or not _warm[over].pipes:
        _warm[over] = _Processes(SIZE, GROUP_TIMEOUT, over)
    return _warm[over].run(size, timeout, case.__name__, (case, args))


def run_fresh(
    size: int,
    case: Callable[..., Any],
    *args: Any,
    timeout: float = CASE_TIMEOUT,
    group_timeout: float = 10.0,
    lost: Collection[int] = (),
    over: Transport = GLOO,
) -> list[Any]:
    """As `run`, on processes of its own whose default group is the world: for cases that break it.

    The ranks in `lost` are not heard: they end, or freeze; the results are those of the others.
    """
    processes = _Processes(size, group_timeout, over)
    try:
        return processes.run(size, timeout, case.__name__, (case, args), lost)
    finally:
        if processes.pipes:
            processes.leave()


def prepare() -> None:
    """Begin the imports, while the first tests run."""
    if START.get_start_method() == "forkserver":
        with _single_threaded():
            forkserver.ensure_running()


@atexit.register
def stop() -> None:
    """End the warm processes."""
    for processes in _warm.values():
        if processes.pipes:
            processes.leave(LEAVING)


@contextlib.contextmanager
def _single_threaded() -> Any:
    """One thread in each process started inside: two cores serve four of them."""
    old = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if old is not None:
            os.environ["OMP_NUM_THREADS"] = old


def _serve(rank: int, size: int, store: str, pipe: Connection, group_timeout: float, over: Transport) -> None:
    """The process of a rank: make the groups, then run cases until the pipe closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if "BY_LIBRARY" in os.environ:
        importlib.import_module("by_library").use()
    if over.device == "cuda":
        nccl_ranks.prepare(rank, size)
    timeout = datetime.timedelta(seconds=group_timeout)
    dist.init_process_group(over.backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    groups = {size: dist.group.WORLD}
    for ranks in range(1, size):
        groups[ranks] = dist.new_group(list(range(ranks)), timeout=timeout)
    pipe.send((True, None))
    while True:
        try:
            ranks, case, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, case(World(rank, ranks, groups[ranks], os.path.dirname(store), over.device), *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
