"""The network of launch/train.py and its steps as a LightningModule, for lightning_train.py."""

import os
import sys
from pathlib import Path

import data
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from checkpoint import read
from loop import length
from train import network, settings

PARTS = {"settings", "state_dict", "optimizer_states", "loops", "global_step"}


class Epoch(data.Batches):
    """What is left of an epoch, as long as the whole one: Lightning counts the batches that were taken before.

    With a state, though there is none, it is to Lightning a loader that can go on; where, follows from the steps taken.
    """

    def __len__(self) -> int:
        return self.first + len(self.whole)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


class Training(pl.LightningModule):
    def __init__(self, options, images: data.Images):
        super().__init__()
        torch.manual_seed(options.seed)
        self.options, self.images, self.network = options, images, network(images.shape[0], images.classes)
        self.settings = settings(options, images)
        self.numbers, _ = data.split(len(images), options.seed)
        self.per_epoch, self.last = length(options, len(self.numbers))

    def train_dataloader(self):
        given, (epoch, first) = self.options, divmod(self.global_step, self.per_epoch)
        order = data.shuffled(self.numbers, given.seed, epoch)
        place = self.global_rank, self.trainer.world_size
        return Epoch(self.images, order, given.batch_size, *place, first, given.workers)

    def training_step(self, batch, number):
        x, labels, samples = batch  # this rank's share, and the samples of all ranks: see loop.py
        return F.cross_entropy(self.network(x.to(self.dtype)), labels, reduction="sum") * self.trainer.world_size / samples

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.options.learning_rate, momentum=0.9)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["settings"] = self.settings


def file_of(options, settings: dict) -> Path | None:
    """The file that Lightning writes, if any. The process that starts the others exits where this run cannot go on from it."""
    if options.checkpoint is None:
        return None
    path = (options.checkpoint.with_suffix(".ckpt") if options.checkpoint.name else options.checkpoint).absolute()
    problem = read(path, settings, PARTS) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    if isinstance(problem, str):
        sys.exit(f"lightning_train.py: given {path}, {problem}")
    return path
