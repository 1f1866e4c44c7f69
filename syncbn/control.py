"""Control traffic: small messages about a run, beside the statistics. With collectives.py all that calls torch.distributed.

Requirements: over Gloo on the CPU, so that no GPU waits; with the timeout of the group that it is for.
"""

import pickle
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .collectives import CollectiveError, ProcessGroup, rank_and_size, timeout

ABSENT_SECONDS = 1.0  # in which the ranks that wait for the same message find that out

# Gloo beside each group, for control messages; they go when it does.
_sides: weakref.WeakKeyDictionary[ProcessGroup, "Side"] = weakref.WeakKeyDictionary()


def side_group(group: ProcessGroup) -> "Side":
    """The control channel of the ranks of `group`, one for all who ask; every rank of the group asks first at the same time."""
    if group not in _sides:
        _sides[group] = Side(group)
    return _sides[group]


class Side:
    """Control messages between the ranks of a group: over Gloo on the CPU, so that no GPU waits, with the group's timeout.

    Made of the backend itself: `new_group` needs every rank of the job, or, with use_local_synchronization, names the group by
    how many groups a rank is in, so that ranks that are in different numbers of groups wait for each other until the timeout.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.store: Any = dist.PrefixStore(f"syncbn/{group.group_name}", dist.distributed_c10d._get_default_store())
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout(group)
        self.ranks = ranks_of(group)  # in the job
        self.uses = 0  # of checked mode: the same number on every rank
        self._gloo: Any = dist.ProcessGroupGloo(self.store, self.rank, self.size, self.timeout)

    def gather_rows(self, row: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Send a row of integers to every rank and do not wait; the function returned waits for all rows, by rank.

        Raises:
            CollectiveError, from either: a rank is gone, or did not come within the timeout.
        """
        gathered = self._gather(torch.tensor(row, dtype=torch.int64, device="cpu"))
        return lambda: gathered().tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank: pickled, and waited for. CollectiveError as `gather_rows`."""
        data = pickle.dumps(value)
        lengths = [length for (length,) in self.gather_rows([len(data)])()]
        local = torch.frombuffer(bytearray(data.ljust(max(lengths), b"\0")), dtype=torch.uint8)
        rows = self._gather(local)()
        return [pickle.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]

    def _gather(self, local: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The rows of all ranks, (size, *local.shape), once the function returned has waited for them."""
        rows = local.new_zeros(self.size, *local.shape)
        try:
            work = self._gloo.allgather([list(rows.unbind())], [local])
        except RuntimeError as error:
            raise self._error() from error

        def wait() -> torch.Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._error() from error
            return rows

        return wait

    def absent(self, what: str) -> list[int]:
        """The ranks that do not say in a moment that they wait in vain at `what` too; empty if the store does not answer."""
        try:
            self.store.set(f"{what}/{self.rank}", "waits")
            time.sleep(ABSENT_SECONDS)
            return [rank for rank in range(self.size) if not self.store.check([f"{what}/{rank}"])]
        except RuntimeError:
            return []

    def _error(self) -> CollectiveError:
        rank, size = rank_and_size()
        return CollectiveError(
            f"a control message of rank {rank} of {size} in a group of {self.size} got no answer; expected every rank of the "
            f"group to send one within {self.timeout}: look for the first error among the other ranks"
        )


def ranks_of(group: ProcessGroup | None) -> list[int]:
    """The ranks of a group in the job; this process's where it is alone."""
    return [rank_and_size()[0]] if group is None else dist.get_process_group_ranks(group)


def own_group(group: ProcessGroup) -> tuple[ProcessGroup, Any]:
    """A new group of the same ranks, with the same timeout, and a store of its own; every rank of the job asks, for its own."""
    world = dist.group.WORLD
    assert world is not None
    mine = tuple(dist.get_process_group_ranks(group))
    wanted = sorted({*side_group(world).gather_objects(mine)})
    made = {ranks: dist.new_group(list(ranks), timeout(group)) for ranks in wanted}[mine]
    return made, dist.PrefixStore(f"syncbn/{made.group_name}", dist.distributed_c10d._get_default_store())
