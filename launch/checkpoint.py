"""Checkpoints that a kill at any moment leaves whole: a temporary file beside them, fsync, rename.

Rank 0 writes and reads. After a restart another node may hold rank 0: keep the file where all nodes see it.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

ADVICE = "The file is left as it is: move it away to begin anew, or give another --checkpoint."


class CheckpointError(Exception):
    """A file that this training cannot go on from, or could not write."""


class Progress(NamedTuple):
    """How far a training is."""

    step: int = 0  # steps taken
    losses: tuple[float, ...] = ()  # the mean loss of each finished epoch
    total: float = 0.0  # the sum of the losses of this epoch's samples so far, of all ranks


class Checkpoint(NamedTuple):
    """A file and what goes into it."""

    path: Path | None  # None: nothing is written or read
    settings: dict[str, Any]  # what a run that goes on must have in common with the one that wrote
    network: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int

    def save(self, progress: Progress) -> None:
        """Write the state in place of the one there, or leave that."""
        if self.path is None or self.rank != 0:
            return
        state = {"settings": self.settings, "progress": tuple(progress), "network": self.network.state_dict()}
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            torch.save(state | {"optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def restore(self) -> Progress:
        """Put network and optimizer into the state that rank 0 finds, on every rank; where there is no file, leave them.

        Raises:
            CheckpointError: on every rank: the file is no checkpoint of a run with these settings, or its folder is not there.
        """
        found: list[Any] = [self._read() if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        state = found[0]
        if isinstance(state, str):
            raise CheckpointError(f"given {self.path}, {state}")
        if state is None:
            return Progress()
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        return Progress(*state["progress"])

    def _read(self) -> dict[str, Any] | str | None:
        """The state, or what is wrong with the file."""
        if self.path is None:
            return None
        if not self.path.parent.is_dir():
            return "in a folder that is not there; expected one that is"
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a file may make the reader raise anything
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return f"truncated or not a checkpoint ({reason}). {ADVICE}"
        if not isinstance(state, dict) or set(state) != {"settings", "progress", "network", "optimizer"}:
            return difference(None, self.settings)
        return difference(state["settings"], self.settings) or state


def difference(found: dict[str, Any] | None, expected: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint of the settings found, which may be none, for a run with those expected."""
    if found is None:
        return f"which another program wrote. {ADVICE}"
    return None if found == expected else f"of a run with {found}, where this one has {expected}. {ADVICE}"
