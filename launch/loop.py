"""The training loop behind the programs of launch/: whatever wraps the model and makes its gradients, the steps are the same.

Collectives stand where every rank comes, however its share of the data looks: at the end of an epoch and around a checkpoint.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint import Checkpoint, Progress
from torch import Tensor, nn
from tqdm import tqdm


class Place(NamedTuple):
    """Which process of the job this is."""

    rank: int
    world_size: int
    device: torch.device


class Job(NamedTuple):
    """What is trained, where, and how its gradients are made."""

    options: argparse.Namespace
    images: data.Images
    model: nn.Module  # data-parallel
    optimizer: torch.optim.Optimizer
    checkpoint: Checkpoint
    place: Place
    backward: Callable[[Tensor], Any] = Tensor.backward


def length(options: argparse.Namespace, samples: int) -> tuple[int, int]:
    """The steps of an epoch of so many samples, and those of the whole run."""
    per_epoch = math.ceil(samples / options.batch_size)
    return per_epoch, min(options.epochs * per_epoch, options.steps or options.epochs * per_epoch)


def fit(job: Job) -> Progress:
    """Train from where the checkpoint stands, or from the beginning, to the end."""
    options, rank, device = job.options, job.place.rank, job.place.device
    numbers, _ = data.split(len(job.images), options.seed)
    per_epoch, last = length(options, len(numbers))
    step, losses, whole = job.checkpoint.restore()
    total = torch.tensor(whole if rank == 0 else 0.0, dtype=torch.float64, device=device)
    hidden = None if rank == 0 else True  # None: shown on a terminal
    with tqdm(total=last, initial=step, unit="step", disable=hidden, dynamic_ncols=True) as bar:
        while step < last:
            order = data.shuffled(numbers, options.seed, step // per_epoch)
            for x, labels, samples in shares(job, order, step % per_epoch):
                total += train_step(job, x, labels, samples)
                step += 1
                bar.update()
                if step % per_epoch == 0:
                    losses = (*losses, _sum(total).item() / len(order))
                    total.zero_()
                    if rank == 0:
                        bar.write(f"epoch {len(losses)}: loss {losses[-1]:.4f}")
                if step % options.checkpoint_every == 0 or step == last:
                    whole = _sum(total).item()
                    total.fill_(whole if rank == 0 else 0.0)
                    job.checkpoint.save(Progress(step, losses, whole))
                if step == last:
                    break
    return Progress(step, losses, whole)


def train_step(job: Job, x: Tensor, labels: Tensor, samples: int) -> Tensor:
    """One step on this rank's share; the sum of its losses."""
    x = x.to(job.place.device, getattr(torch, job.options.dtype))
    loss = F.cross_entropy(job.model(x), labels.to(job.place.device), reduction="sum")
    job.optimizer.zero_grad()
    # Shares may be unequal. Averaging the gradients over W ranks makes of this those of the mean over all N samples.
    job.backward(loss * job.place.world_size / samples)
    job.optimizer.step()
    return loss.detach()


def report(job: Job) -> None:
    """Rank 0 prints what the network is worth."""
    right = accuracy(job)
    if job.place.rank == 0:
        print(f"accuracy on held-out images: {right:.3f}", flush=True)


def accuracy(job: Job) -> float:
    """The part of the held-out images that the network labels rightly."""
    _, numbers = data.split(len(job.images), job.options.seed)
    right = torch.zeros((), dtype=torch.float64, device=job.place.device)
    job.model.eval()
    with torch.no_grad():
        for x, labels, _ in shares(job, numbers, 0):
            logits = job.model(x.to(job.place.device, getattr(torch, job.options.dtype)))
            right += (logits.argmax(1) == labels.to(logits.device)).sum()
    job.model.train()
    return _sum(right).item() / len(numbers)


def shares(job: Job, numbers: data.Numbers, first: int) -> data.Batches:
    """This rank's shares of the batches from the first on, with the samples of all ranks."""
    rank, world_size, _ = job.place
    return data.Batches(job.images, numbers, job.options.batch_size, rank, world_size, first, job.options.workers)


def _sum(value: Tensor) -> Tensor:
    """Over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
