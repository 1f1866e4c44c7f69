"""Plain training for the experiments, over the ranks there are: each takes its share of the same global batches."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import collectives
from .networks import Data, accuracy, classification
from .ranks import resolve, sum_over_ranks

Batch = TypeVar("Batch", bound=tuple[Any, ...])


def share(batch: Batch) -> Batch:
    """This rank's part of a batch of tensors, equal parts: (N/W, *) each."""
    rank, size = collectives.rank_and_size()
    if len(batch[0]) % size:
        raise ValueError(f"given a batch of {len(batch[0])} on {size} ranks; expected a number of ranks that divides it")
    return type(batch)(*(part.chunk(size)[rank] for part in batch))


def descend(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, lr: float) -> float:
    """A step of gradient descent by the mean gradient of the ranks; the loss before it."""
    group = resolve(None)
    size = 1 if group is None else group.size()
    parameters = list(model.parameters())
    value = loss(model, batch)
    gradients = torch.autograd.grad(value, parameters)
    if size == 1:
        torch._foreach_add_([p.data for p in parameters], gradients, alpha=-lr)
        return value.item()
    total, *summed = sum_over_ranks([value, *gradients], group, "training")
    with torch.no_grad():
        for parameter, gradient in zip(parameters, summed, strict=True):
            parameter.sub_(lr * gradient.to(parameter.dtype) / size)
    return total.item() / size


def train(model: nn.Module, batches: Iterator[Data], steps: int, lr: float, momentum: float = 0.9) -> None:
    """SGD with momentum on the cross entropy, in this process."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum)
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        classification(model, batch).backward()
        optimizer.step()


def training_accuracy(model: nn.Module, data: Data, size: int = 64) -> float:
    """The share of the training images that the model labels rightly in training mode, by batches; the model is left alone."""
    model = copy.deepcopy(model).train()
    parts = [accuracy(model, Data(*parts)) * len(parts[0]) for parts in zip(*(x.split(size) for x in data), strict=True)]
    return sum(parts) / len(data.x)
