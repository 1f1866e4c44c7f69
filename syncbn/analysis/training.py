"""Plain training for the experiments, over the ranks there are: each takes its share of the same global batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import collectives
from .networks import Data
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


def train(model: nn.Module, batches: Iterator[Data], steps: int, lr: float, momentum: float = 0.9) -> list[float]:
    """SGD with momentum on the cross entropy, in this process; the share of each batch that was labelled rightly."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum)
    right = []
    for _ in range(steps):
        batch = next(batches)
        output = model(batch.x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, batch.labels).backward()
        optimizer.step()
        right.append((output.argmax(1) == batch.labels).double().mean().item())
    return right


def epochs(right: Sequence[float], steps: int) -> list[float]:
    """The mean of each `steps` values."""
    return [sum(right[i : i + steps]) / steps for i in range(0, len(right) - steps + 1, steps)]
