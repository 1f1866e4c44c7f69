"""Forwards that ranks run together, each on batches of its own: who has one is agreed on before each."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from . import collectives
from .collectives import ProcessGroup
from .trees import emptied

NO_BATCH = object()


def inputs_in_step(
    loader: Iterable[Any], num_batches: int | None, groups: list[ProcessGroup], device: torch.device, name: str
) -> Iterator[Any]:
    """This rank's input at each step, until no rank of the groups has one; without samples once this rank has run out.

    Args:
        num_batches: take at most so many of the loader's; None: all.
        device: of the messages.
        name: of who asks, in errors of the collective.

    Raises:
        ValueError: a rank has no batch (on all ranks); a batch is a list or tuple of nothing.
        TypeError: a rank has run out of batches that it cannot empty (on all ranks), see `trees.emptied`.
    """
    batches = itertools.islice(loader, num_batches)
    batch = next(batches, NO_BATCH)
    some, lacking, _ = _agree([batch is not NO_BATCH, batch is NO_BATCH, False], groups, device, name)
    if not some or lacking:
        rank, size = collectives.rank_and_size()
        given = "no batch" if batch is NO_BATCH else "batches, and another rank none"
        raise ValueError(f"given a loader of {given} on rank {rank} of {size}; expected one batch or more on each rank")
    inputs = None
    while some:
        inputs = inputs if batch is NO_BATCH else _input_of(batch)
        yield inputs
        batch, problem = next(batches, NO_BATCH), None
        if batch is NO_BATCH and groups:
            try:
                inputs = _emptied(inputs)
            except TypeError as error:
                problem = error
        some, _, stuck = _agree([batch is not NO_BATCH, batch is NO_BATCH, problem is not None], groups, device, name)
        if some and stuck:
            rank, size = collectives.rank_and_size()
            found = problem or "given a batch, and another rank, out of them, none that it can empty; expected as many on each"
            raise TypeError(f"{found} (rank {rank} of {size})")


def _input_of(batch: Any) -> Any:
    if not isinstance(batch, (list, tuple)):
        return batch
    if not batch:
        rank, size = collectives.rank_and_size()
        raise ValueError(f"given an empty {type(batch).__name__} on rank {rank} of {size}; expected a batch, its input first")
    return batch[0]


def _emptied(inputs: Any) -> Any:
    """The input of a step without its samples. TypeError as `trees.emptied`."""
    return {name: emptied(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else emptied(inputs)


def _agree(flags: list[bool], groups: list[ProcessGroup], device: torch.device, name: str) -> list[bool]:
    """Whether each is true on a rank of the groups."""
    found = torch.tensor(flags, dtype=torch.float64, device=device)
    for group in groups:
        found = collectives.reduce_together([found], name, group)[0].clamp(max=1)
    return found.bool().tolist()
