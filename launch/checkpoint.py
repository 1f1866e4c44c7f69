"""Checkpoints that a kill at any moment leaves whole: a temporary file beside them, fsync, rename.

Rank 0 writes and reads. After a restart another node may hold rank 0: keep the file where all nodes see it.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

PARTS = {"settings", "progress", "network", "optimizer"}
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
        """Write the state in place of the one there, or leave that.

        Raises:
            CheckpointError: on every rank: rank 0 could not write.
        """
        if self.path is not None:
            self._shared(self._write(self.path, progress) if self.rank == 0 else None)

    def restore(self) -> Progress:
        """Put network and optimizer into the state that rank 0 finds, on every rank; where there is no file, leave them.

        Raises:
            CheckpointError: on every rank: the file is no checkpoint of a run with these settings, or could not be written.
        """
        state = self._shared(read(self.path, self.settings, PARTS) if self.path is not None and self.rank == 0 else None)
        if state is None:
            return Progress()
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        return Progress(*state["progress"])

    def _shared(self, found: Any) -> Any:
        """What rank 0 found, on every rank: an error, if that is a string."""
        box = [found]
        if dist.is_initialized():
            dist.broadcast_object_list(box)
        if isinstance(box[0], str):
            raise CheckpointError(f"given {self.path}, {box[0]}")
        return box[0]

    def _write(self, path: Path, progress: Progress) -> str | None:
        """What is wrong with the place, if anything."""
        state = {"settings": self.settings, "progress": tuple(progress), "network": self.network.state_dict()}
        try:
            with (part := beside(path)).open("wb") as file:
                torch.save(state | {"optimizer": self.optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except (OSError, RuntimeError) as error:  # the latter is torch.save's, upon the former
            return unwritable(error.__context__ or error)
        return None


def read(path: Path, settings: dict[str, Any], parts: set[str]) -> dict[str, Any] | str | None:
    """The state of these parts, None where there is no file yet, or what is wrong with it or its place."""
    try:
        if not path.parent.is_dir():
            return "in a folder that is not there; expected one that is"
        if path.is_dir():
            return "which is a folder; expected a file"
        beside(path).open("wb").close()
        beside(path).unlink()
    except OSError as error:
        return unwritable(error)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file may make the reader raise anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return f"truncated or not a checkpoint ({reason}). {ADVICE}"
    if not isinstance(state, dict) or not parts <= set(state):
        return difference(None, settings)
    return difference(state["settings"], settings) or state


def beside(path: Path) -> Path:
    """The file that takes the place of this one when it is whole."""
    return path.with_name(path.name + ".part")


def unwritable(error: BaseException) -> str:
    return f"which cannot be written ({type(error).__name__}: {error}); expected a place for it and for a .part file beside it"


def difference(found: Any, expected: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint of the settings found, which may be none, for a run with those expected."""
    if not isinstance(found, dict):
        return f"which another program wrote. {ADVICE}"
    names = [name for name in found | expected if name not in found or name not in expected or found[name] != expected[name]]
    theirs, ours = ({name: of[name] for name in names if name in of} for of in (found, expected))
    return f"of a run with {theirs}, where this one has {ours}. {ADVICE}" if names else None
