"""A network, loaders of ranks that end at different times, and what one process does with all of their samples."""

import torch
import torch.nn.functional as F
from torch import nn

# Samples of each batch, by rank: loaders that differ by several batches, that are empty, that have empty batches.
LOADERS: dict[str, list[list[int]]] = {
    "uneven": [[2, 1], [3, 2, 4, 2, 2, 3], [1, 4, 2, 2], [5, 3, 3]],
    "none": [[], [3, 2, 2, 4], [4, 1], []],
    "empty": [[2, 0, 3, 0, 0, 0], [0, 4], [0, 0, 1], [0]],
}


def network(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(6, 8),
        nn.BatchNorm1d(8, eps=1e-3),
        nn.Linear(8, 3),
    )
    return net.to(dtype)


def steps_of(loaders):
    return max(map(len, loaders))


def share(rank, step, size):
    """The batch of a rank in a step: the same on every rank that asks for it."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(size, 2, 9, 9, generator=generator, dtype=torch.float64) + 0.3 * rank
    return x, torch.randint(3, (size,), generator=generator)


def whole(loaders, step):
    """What one process gets in a step: the samples of all ranks that have any."""
    shares = [share(rank, step, sizes[step]) for rank, sizes in enumerate(loaders) if step < len(sizes)]
    return tuple(torch.cat(parts) for parts in zip(*shares, strict=True))


def one_process(loaders, accumulate=1, model=None):
    """The model and the mean losses of one process; a step without samples moves the optimizer by its momentum alone."""
    model = model or network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps_of(loaders)):
        x, target = whole(loaders, step)
        loss = torch.zeros(()).double()
        if len(x):
            loss = F.cross_entropy(model(x), target, reduction="sum") / len(x)
            loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
    return model, losses


def caught(loop):
    """The steps that `loop`, a generator, took, and the error that ended it."""
    steps = 0
    try:
        for _ in loop:
            steps += 1
    except Exception as error:
        return steps, type(error).__name__, str(error)
    return steps, None, None
