"""Read what the processes recorded, measure how far two runs are apart, and judge.

P parameters, R running means and variances.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHECKED_STEPS = 20
LIMIT = 1e-5  # the largest relative difference of loss of (c) to (a)
FACTOR = 100.0  # how many times farther off (b) must be


class Run(NamedTuple):
    """A training run, as train.py recorded it."""

    loss: np.ndarray  # (steps,) the mean over the samples of the global batch
    parameters: np.ndarray  # (steps, P) of rank 0, left on disk
    running: list[np.ndarray]  # (steps, R) of each rank, left on disk
    accuracy: float  # on the held-out images, of rank 0's network
    seconds: float  # of training, without the start of the processes
    imported_syncbn: bool


class Differences(NamedTuple):
    """How far a run is from another, by step: (steps,) each."""

    loss: np.ndarray  # |l − l'| / |l'|; infinite where only l' is zero
    parameters: np.ndarray  # the largest |p − p'|
    running: np.ndarray  # the largest |r − r'|, of the rank where it is largest


class Verdict(NamedTuple):
    steps: int  # how many were checked, from the first
    local: float  # the largest relative difference of loss of (b) to (a) within them
    syncbn: float  # that of (c)

    @property
    def near(self) -> bool:
        """(c) is where (a) is."""
        return self.syncbn <= LIMIT

    @property
    def far(self) -> bool:
        """(b) is not."""
        return self.local > 0 and self.local >= FACTOR * self.syncbn

    @property
    def passed(self) -> bool:
        return self.near and self.far


def read(directory: Path, world_size: int, global_batch: int) -> Run:
    """The run that `world_size` processes recorded in `directory`."""
    ranks = range(world_size)
    loss = sum(np.load(directory / f"loss-{rank}.npy") for rank in ranks) / global_batch
    parameters = np.load(directory / "parameters.npy", mmap_mode="r")
    running = [np.load(directory / f"running-{rank}.npy", mmap_mode="r") for rank in ranks]
    return Run(loss, parameters, running, **json.loads((directory / "summary.json").read_text()))


def differences(run: Run, whole: Run) -> Differences:
    """How far `run` is from `whole`, which is a run of one process."""
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(run.loss == whole.loss, 0.0, np.abs(run.loss - whole.loss) / np.abs(whole.loss))
    return Differences(
        loss,
        _largest(run.parameters, whole.parameters),
        np.max([_largest(running, whole.running[0]) for running in run.running], axis=0),
    )


def _largest(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The largest absolute difference in each row of (steps, *), row by row: memory does not grow with the steps."""
    return np.array([np.abs(row - other).max() for row, other in zip(values, others, strict=True)], dtype=np.float64)


def judge(local: Differences, syncbn: Differences) -> Verdict:
    """The verdict on (b) and (c) over the first steps; a loss that is not finite passes nothing."""
    steps = min(CHECKED_STEPS, len(syncbn.loss))
    return Verdict(steps, float(local.loss[:steps].max()), float(syncbn.loss[:steps].max()))
