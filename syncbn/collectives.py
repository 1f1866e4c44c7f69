"""The communication seam: with control.py the only file by which layers communicate; bench has the collectives of its peers.

Requirements
    - one all_reduce a call, float64, in program order: nothing here depends on data, shapes or gradients of one rank;
    - a group is named once (None, a ProcessGroup, a 1-D DeviceMesh or a size) and resolved at each use, so that a model
      can be built, copied and pickled before any process group exists, and outlive one;
    - observers see every call, and cost nothing when there are none.
"""

import contextlib
import datetime
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import observing
from .observing import Call, Observer

ProcessGroup = dist.ProcessGroup
GroupLike = ProcessGroup | DeviceMesh | None
# What torch.distributed.new_group returns to a rank that is not in the new group.
OUTSIDE = dist.GroupMember.NON_GROUP_MEMBER
SUM = dist.AllreduceOptions()  # on the current stream of a GPU
SUM.asyncOp = False
# Each default group's groups by size; they go when it does.
_groups_by_size: weakref.WeakKeyDictionary[ProcessGroup, dict[int, ProcessGroup]] = weakref.WeakKeyDictionary()


class CollectiveError(RuntimeError):
    """A layer's collective failed: a peer is gone or did not come within the group's timeout. Chained to the backend's."""


class Group:
    """The processes that share statistics: all of them (None), a ProcessGroup, a 1-D DeviceMesh, or groups of a size.

    `deepcopy` shares a group; `pickle` keeps None and sizes and raises TypeError for what lives in one process only.
    """

    __slots__ = ("_known", "group_size", "process_group")

    def __init__(self, process_group: GroupLike = None, group_size: int | None = None):
        """
        Args:
            process_group: None (every rank), a ProcessGroup, or a DeviceMesh of one dimension.
            group_size: contiguous groups of this many ranks. Every rank makes all of them, at its first training forward.

        Raises:
            TypeError: the group is none of these, or the size is no int.
            ValueError: both are given, the size is below 1, or the mesh has several dimensions.
        """
        if process_group is not None and group_size is not None:
            raise ValueError(f"given process_group={process_group!r} and group_size={group_size!r}; expected one of them")
        if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool)):
            raise TypeError(f"given group_size={group_size!r}; expected an int, the number of ranks in a group")
        if group_size is not None and group_size < 1:
            raise ValueError(f"given group_size={group_size}; expected 1 or more")
        if isinstance(process_group, DeviceMesh) and process_group.ndim != 1:
            raise ValueError(
                f"given a DeviceMesh of {process_group.ndim} dimensions {process_group.mesh_dim_names}; "
                'expected one dimension: slice it, as in mesh["dp"]'
            )
        compiling = torch.compiler.is_compiling()  # to a trace the object is of a class of its own
        if not (compiling or is_group_like(process_group)):
            raise TypeError(
                f"given process_group={process_group!r} of type {type(process_group).__name__}; "
                "expected a torch.distributed.ProcessGroup, a 1-D DeviceMesh or None for all ranks"
            )
        self.process_group: Any = process_group
        self.group_size = group_size
        is_group = not isinstance(process_group, DeviceMesh) if compiling else isinstance(process_group, ProcessGroup)
        self._known: Any = process_group if is_group else None  # to ask for its class each time takes long

    def resolve(self) -> ProcessGroup | None:
        """The ProcessGroup, or None where this process is alone: no distributed job, or groups of one rank.

        Raises:
            ValueError: this rank is outside of the group, or the world size is not a multiple of the group size.
        """
        if torch.compiler.is_compiling():
            self._read_what_is_guarded()
        if self._known is not None:
            return self._known
        group = self.process_group
        if group is None:
            if not dist.is_initialized():  # a trace of torch 2.11 takes a WORLD that is None for a group
                return None
            return dist.group.WORLD if self.group_size is None else _group_of_size(self.group_size)
        if isinstance(group, DeviceMesh) and group.get_coordinate() is not None:
            return group.get_group()
        raise ValueError(
            "given a process group that this rank is not in; expected one that holds every rank on which the layer trains"
        )

    def _read_what_is_guarded(self) -> bool:
        """For a trace, which notes none of it by itself: which group this is, of one rank too, and whether there is a job."""
        if self._known is not None:
            return self._known.group_name is None
        return self.process_group is None and dist.distributed_c10d._world._default_pg is None

    def is_everyone(self) -> bool:
        """Whether it is all processes, whatever their number."""
        return self.process_group is None and self.group_size is None

    def size(self) -> int:
        """The number of processes that share statistics with this one, itself included."""
        group = self.resolve()
        return 1 if group is None else group.size()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Group):
            return False
        return self.group_size == other.group_size and self.process_group == other.process_group

    def __hash__(self) -> int:
        return hash(self.group_size)

    def __repr__(self) -> str:
        return f"process_group={self.process_group}" if self.group_size is None else f"group_size={self.group_size}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.process_group is not None:
            raise TypeError(
                f"given a layer with {self!r}, which lives in this process only and cannot be pickled; expected no group or a "
                "group_size: save model.state_dict(), or syncbn.revert(model) before saving and syncbn.convert it after loading"
            )
        return Group, (None, self.group_size)


def is_group_like(value: object) -> bool:
    """Whether value is None, a ProcessGroup, a DeviceMesh, or what new_group gives a rank outside of the group."""
    return value is None or isinstance(value, (ProcessGroup, DeviceMesh)) or (type(value) is int and value == OUTSIDE)


def is_default_group(group: object) -> bool:
    """Whether group is the default process group, which None means wherever a job is run."""
    return dist.is_initialized() and group is dist.group.WORLD


def _group_of_size(size: int) -> ProcessGroup | None:
    """This rank's group among contiguous groups of `size` ranks, made once for all layers; None for groups of one."""
    world = dist.group.WORLD
    assert world is not None
    if world.size() % size:
        raise ValueError(f"given group_size={size} in a world of {world.size()}; expected a divisor of the world size")
    if size == 1:
        return None
    groups = _groups_by_size.setdefault(world, {})
    if size not in groups:
        groups[size] = dist.new_subgroups(size, timeout=timeout(world))[0]
    return groups[size]


# As torch.compiler.assume_constant_result, without importing the compiler: a trace takes the group as it is.
_group_of_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


def timeout(group: ProcessGroup) -> datetime.timedelta:
    """How long the group's collectives wait for a peer; new groups do not inherit it by themselves."""
    return group._get_backend(group._device_types[0]).options._timeout


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the world size, for messages; (0, 1) where there is no distributed job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Reduced(NamedTuple):
    message: Tensor  # the sum over the group, in the order and dtype of the local message
    hold: bool  # an observer asked that running statistics be held


def all_reduce(message: Tensor, call: Call, observers: tuple[Observer, ...] = ()) -> Reduced:
    """The sum of `message` over call.group: in place, on a message that the caller owns. A lone process's is as it was.

    Raises:
        CollectiveError: the backend raised; the others of the group raise too, or wait until its timeout.
    """
    if call.phase != "backward" and observing.recordings():
        return _recorded_all_reduce(message, call, observers)
    return _observed_all_reduce(message, call, observers)


def _recorded_all_reduce(message: Tensor, call: Call, observers: tuple[Observer, ...]) -> Reduced:
    recordings = observing.recordings()
    given = (recording.take(call, message.numel()) for recording in recordings)
    known = next((taken for taken in given if taken is not None), None)
    reduced = _observed_all_reduce(message, call, observers) if known is None else Reduced(known, True)
    for recording in recordings:
        recording.add(call, reduced.message)
    return reduced


def _observed_all_reduce(message: Tensor, call: Call, observers: tuple[Observer, ...]) -> Reduced:
    watcher = observing.watcher(call.group)
    if watcher is not None:
        observers = (*observers, watcher)
    if not observers:
        return Reduced(_all_reduce(message, call), False)
    local, hold = message.clone(), False
    try:
        for observer in observers:
            hold = bool(observer.before(call, local)) or hold
        _all_reduce(message, call)
    except BaseException as error:
        for observer in observers:
            observer.failed(call, error)
        raise
    for observer in observers:
        observer.after(call, local, message)
    return Reduced(message, hold)


def reduce_together(messages: list[Tensor], name: str, group: ProcessGroup) -> list[Tensor]:
    """The sums over the group of float64 messages, each on its own device, by one all_reduce."""
    packed = torch.cat([message.to(messages[0].device) for message in messages])
    call = Call(name, "control", len(packed), packed.dtype, group)
    sums = all_reduce(packed, call).message.split([len(message) for message in messages])
    return [total.to(message.device) for total, message in zip(sums, messages, strict=True)]


def traced_all_reduce(message: Tensor, call: Call) -> Tensor:
    """As `all_reduce`, for compiled code: a new tensor, by an operator that stays in the graph, unobserved."""
    return message.clone() if call.group is None else functional.all_reduce(message, "sum", call.group)


def post(message: Tensor, group: ProcessGroup) -> Any:
    """Start the all_reduce of a message, in place; the work returned has a wait()."""
    return dist.all_reduce(message, group=group, async_op=True)


def stream_of_its_own(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is posted inside waits for no other stream of a GPU; a CPU has none."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def _all_reduce(message: Tensor, call: Call) -> Tensor:
    if call.group is not None and call.group.size() > 1:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
            rank, size = rank_and_size()
            raise ValueError(
                "given a trace, as torch.func.linearize and make_fx take it, where a collective is recorded without the wait "
                f"for it; expected eager code, torch.func.jvp or torch.compile (layer {call.layer!r}, rank {rank} of {size})"
            )
        try:
            # What dist.all_reduce does, in half of its time; torch 2.15's compiler does not find it in the group itself.
            work: Any = ProcessGroup.allreduce(call.group, [message], SUM)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            rank, size = rank_and_size()
            raise CollectiveError(
                f"all_reduce of layer {call.layer!r} failed in {call.phase} on rank {rank} of {size}, in a group of "
                f"{call.group.size()} on {message.device}; expected every rank of the group to reach it within "
                f"{timeout(call.group)}: look for the first error among the other ranks"
            ) from error
    return message
