"""Control traffic: small messages about a run, beside the statistics. With collectives.py all that layers communicate by.

Requirements
    - over Gloo on the CPU, so that no GPU waits; with the timeout of the group that it is for;
    - rows of one size, whatever they are for, that say where in its program a rank is: ranks in different places find out from
      the same rows, and all raise the same error, which says who is where.
"""

import hashlib
import itertools
import json
import pickle
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .collectives import CollectiveError, ProcessGroup, rank_and_size, timeout

ABSENT_SECONDS = 1.0  # in which the ranks that wait for the same message find that out
VALUES = 3  # in a row, beside the digest of the place

# Gloo beside each group, for control messages; they go when it does.
_sides: weakref.WeakKeyDictionary[ProcessGroup, "Side"] = weakref.WeakKeyDictionary()

Rows = list[list[int]]  # (size, VALUES), by rank


def side_group(group: ProcessGroup) -> "Side":
    """The control channel of the ranks of `group`, one for all who ask; every rank of the group asks at the same time.

    A group of the same ranks as the default one, for as long a wait, has that one's: who asks with either hears of the other.

    Raises:
        CollectiveError: it is to be made, and a rank is gone or does not come within the timeout.
    """
    world = dist.group.WORLD
    if world is not None and ranks_of(group) == ranks_of(world) and timeout(group) == timeout(world):
        group = world
    if group not in _sides or _sides[group].is_broken():
        _sides[group] = Side(group)
    return _sides[group]


class Place(NamedTuple):
    """Where in its program a rank sends a message."""

    key: str  # the same on ranks that are in the same place
    where: str  # in words
    details: str = ""  # in words, where those of `where` are the same
    at: str = ""  # in words, if they are the same on all ranks


class Side:
    """Control messages between the ranks of a group: over Gloo on the CPU, so that no GPU waits, with the group's timeout.

    Made of the backend itself: `new_group` needs every rank of the job, or, with use_local_synchronization, names the group by
    how many groups a rank is in, so that ranks that are in different numbers of groups wait for each other until the timeout.

    A message without an answer breaks it: Gloo has closed connections. The store then says so, under the number of the channel,
    to ranks that were elsewhere too, and all make the next one when they ask again. One that asked before it could know meets
    closed connections, or nobody, in the broken one: an error within the timeout, and no message that is another's.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout(group)
        self.ranks = ranks_of(group)  # in the job
        self.sent = 0  # rows
        self.errors = 0  # raised here
        self.loops = 0  # of even_steps: the same number on every rank
        self._under_way: Callable[[], Rows] | None = None
        every: Any = dist.PrefixStore(f"syncbn/{group.group_name}", dist.distributed_c10d._get_default_store())
        number = next(number for number in itertools.count() if not every.check([f"{number}/broken"]))
        self.store: Any = dist.PrefixStore(str(number), every)
        try:
            self._gloo: Any = dist.ProcessGroupGloo(self.store, self.rank, self.size, self.timeout)
        except RuntimeError as error:
            raise self._unanswered(Place("opening", "opening the control channel")) from error

    def is_broken(self) -> bool:
        """Whether a rank has waited in vain; False if the store does not answer."""
        try:
            return self.store.check(["broken"])
        except RuntimeError:
            return False

    def gather_rows(
        self, place: Place, values: Sequence[int] = (), agree: Callable[[Rows], bool] = lambda rows: True
    ) -> Callable[[], Rows]:
        """Send up to VALUES integers to every rank and do not wait; the function returned waits for all rows, by rank.

        One message at a time is under way, the one before is waited for: all ranks know of a difference before the next one.

        Args:
            place: of this rank; the same key is expected on every rank.
            agree: whether rows of the same place fit together.

        Raises:
            CollectiveError, from either: on every rank, ranks are in different places, now or in the message before; or a rank
                is gone, or did not come within the timeout.
        """
        if self._under_way is not None:
            self._under_way()
        self.sent += 1
        posted = self._gather(place, [digest(place.key), *values, *[0] * (VALUES - len(values))])
        found: Future[Rows] = Future()

        def answer() -> Rows:
            if not found.done():
                self._under_way = None
                try:
                    found.set_result(self._same(place, posted(), agree))
                except CollectiveError as error:
                    found.set_exception(error)
            return found.result()

        self._under_way = answer
        return answer

    def gather_objects(self, value: Any, place: Place | None = None) -> list[Any]:
        """Every rank's value, by rank: pickled, and waited for. CollectiveError as `gather_rows`."""
        shares = self.gather_bytes(pickle.dumps(value), place)
        return [value if rank == self.rank else pickle.loads(share) for rank, share in enumerate(shares)]

    def gather_bytes(self, data: bytes, place: Place | None = None) -> list[bytearray]:
        """Every rank's bytes, by rank, each of its own length; waited for. CollectiveError as `gather_rows`."""
        place = place or Place("objects", "in an exchange of objects")
        lengths = [length for length, *_ in self.gather_rows(place, [len(data)])()]
        shares = [bytearray(data if rank == self.rank else length) for rank, length in enumerate(lengths)]
        try:
            works = []
            for rank, share in enumerate(shares):
                if share:
                    options = dist.BroadcastOptions()
                    options.rootRank = rank
                    works.append(self._gloo.broadcast([torch.frombuffer(share, dtype=torch.uint8)], options))
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._unanswered(place) from error
        return shares

    def _gather(self, place: Place, row: list[int]) -> Callable[[], Rows]:
        """The rows of all ranks, once the function returned has waited for them."""
        local = torch.tensor(row, dtype=torch.int64, device="cpu")
        rows = local.new_zeros(self.size, len(row))
        work = self._gloo.allgather([list(rows.unbind())], [local])

        def wait() -> Rows:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._unanswered(place) from error
            return rows.tolist()

        return wait

    def _same(self, place: Place, rows: Rows, agree: Callable[[Rows], bool]) -> Rows:
        """The values in the rows, if all ranks are in the same place."""
        values = [row[1:] for row in rows]
        if len({key for key, *_ in rows}) == 1 and agree(values):
            return values
        told = self.gather_objects(place, place._replace(key="told"))
        self.errors += 1
        self.loops = 0  # they may have begun different numbers
        raise CollectiveError(_difference(self.ranks, told))

    def _unanswered(self, place: Place) -> CollectiveError:
        self.errors += 1
        places = self._places(place)
        absent = [rank for rank in range(self.size) if rank not in places]
        here = f"{place.at and f' at {place.at}'}, where rank {self.ranks[self.rank]} is {place.where}"
        if not absent and len({there.key for there in places.values()}) > 1:
            return CollectiveError(_difference(self.ranks, [places[rank] for rank in range(self.size)]))
        if not absent:
            return CollectiveError(
                f"no answer{here}: every rank came there, but not within {self.timeout}; expected them all at the same time: "
                "look for what kept one of them"
            )
        return CollectiveError(
            f"no answer from {listed(self.ranks[rank] for rank in absent) if places else 'a rank'}{here}: gone, frozen, or "
            f"elsewhere for longer than {self.timeout}; expected every rank there: look at its own messages"
        )

    def _places(self, place: Place) -> dict[int, Place]:
        """Of the ranks that say in a moment that they wait in vain for this message too; nothing if the store is gone."""
        try:
            self.store.set("broken", "")
            self.store.set(f"message {self.sent}/{self.rank}", json.dumps(place))
            time.sleep(ABSENT_SECONDS)
            keys = {rank: f"message {self.sent}/{rank}" for rank in range(self.size)}
            return {rank: Place(*json.loads(self.store.get(key))) for rank, key in keys.items() if self.store.check([key])}
        except RuntimeError:
            return {}


def _difference(ranks: list[int], told: list[Place]) -> str:
    """Who is where, fewest ranks first; with what else differs, if the place does not."""
    same_place = len({place.where for place in told}) == 1
    places: dict[str, list[int]] = {}
    for rank, place in zip(ranks, told, strict=True):
        places.setdefault(f"{place.where} ({place.details})" if same_place else place.where, []).append(rank)
    found: list[str] = []
    for where, there in sorted(places.items(), key=lambda item: len(item[1])):
        verb = "" if found or where.startswith("failed") else "are " if len(there) > 1 else "is "
        found.append(f"{listed(there)} {verb}{where}")
    at = f" at {told[0].at}" if told[0].at and len({place.at for place in told}) == 1 else ""
    return (
        f"ranks differ{at}: {', '.join(found)}; expected the same calls in the same order on every rank: look for a condition "
        "that depends on the rank or its data, or a loop left early"
    )


def listed(ranks: Iterable[int]) -> str:
    """Ranks in words: `rank 3`, `ranks 0, 1, 4-7`."""
    named, runs = list(ranks), list[list[int]]()
    for rank in named:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    said = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' * (len(named) > 1)} {', '.join(said)}"


def digest(text: str) -> int:
    """63 bits of a hash, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def ranks_of(group: ProcessGroup | None) -> list[int]:
    """The ranks of a group in the job; this process's where it is alone.

    Raises:
        ValueError: the group is of a job that has ended.
    """
    if group is None:
        return [rank_and_size()[0]]
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        raise ValueError(
            f"given {group}, a process group of a job that has ended; expected one of this job: convert the model with it, or "
            "set its layers' process_group to None for all ranks"
        ) from None


def own_group(group: ProcessGroup, device: torch.device) -> tuple[ProcessGroup, Any]:
    """A new group of the same ranks, with the same timeout, and a store of its own; every rank of the job asks, for its own.

    It has begun: NCCL begins a group with its first collective, and waits for the device, which later may be in one of another.
    """
    world = dist.group.WORLD
    assert world is not None
    mine = tuple(dist.get_process_group_ranks(group))
    wanted = sorted({*side_group(world).gather_objects(mine)})
    made = {ranks: dist.new_group(list(ranks), timeout(group)) for ranks in wanted}[mine]
    dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made, dist.PrefixStore(f"syncbn/{made.group_name}", dist.distributed_c10d._get_default_store())
