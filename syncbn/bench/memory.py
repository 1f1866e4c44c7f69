"""Memory: the most that a training step of a layer holds, and a heap that does not disturb what is timed."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_heap() -> bool:
    """Have glibc keep what is freed, from now on in this process; False where the C library is another.

    As it is, whether a large result is on fresh pages depends on what was freed before it: page faults take up to half of the
    time of a layer, and fall on one variant or another by chance.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes held at most in `step`, beyond what was held before it: every allocation and release counts, temporaries too.

    The step is to release nothing that was there before it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    cpu = torch.profiler.ProfilerActivity.CPU
    with quiet(), torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the two lines that the profiler of torch 2.13 writes on standard error, below Python, for every run."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
