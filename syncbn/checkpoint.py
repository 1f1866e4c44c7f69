"""Activation checkpointing without communicating twice."""

from contextlib import AbstractContextManager

from torch import Tensor

from .collectives import CollectiveError
from .observing import Call, recorded


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch.utils.checkpoint, by which a recomputation takes the statistics of its own forward.

        checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_context)

    The recomputation then issues no collective; the 2C+1 float64 values of each layer's call are kept until the backward. Works
    for layers called several times, several forwards before a backward, nested checkpoints and early stopping. Running
    statistics move once with it and without it, unless the block itself is compiled: then put the checkpoint inside.

    In eager code a policy of create_selective_checkpoint_contexts has to recompute what is in the layers: their all_reduce is
    in place, and a recomputation has other operators beside it. In torch.compile keep the collective by such a policy instead:

        ops = [torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default]
        context_fn = functools.partial(create_selective_checkpoint_contexts, ops)

    with torch.utils.checkpoint.create_selective_checkpoint_contexts.

    Returns:
        The context of the forward and that of its recomputation.
    """
    recording = Recording()
    return recording.keep(), _Repeated(recording)


class Recording:
    """The reduced messages of the forwards run while it is kept, in order, for a recomputation of the same calls."""

    def __init__(self) -> None:
        self.messages: list[tuple[Call, Tensor]] = []
        self.next: int | None = None  # the message to give next; None: recording

    def keep(self) -> AbstractContextManager[None]:
        """Record the forwards run inside, or, when told to repeat, give them what was recorded."""
        return recorded(self)

    def repeat(self) -> AbstractContextManager[None]:
        """Give the forwards run inside what was recorded, from the first on: no collective is issued."""
        self.next = 0
        return self.keep()

    def take(self, call: Call, size: int) -> Tensor | None:
        if self.next is None:
            return None
        known, message = self.messages[self.next] if self.next < len(self.messages) else (None, None)
        if known is None or message is None or not _is_same(call, known) or message.numel() != size:
            raise CollectiveError(
                f"layer {call.layer!r} is call {self.next + 1} of a recomputation whose forward had "
                f"{f'layer {known.layer!r} there' if known else f'{self.next} calls'}; "
                "expected the same calls in the same order"
            )
        self.next += 1
        return message.clone()

    def add(self, call: Call, reduced: Tensor) -> None:
        if self.next is None:
            self.messages.append((call, reduced.clone()))


def _is_same(one: Call, other: Call) -> bool:
    """Whether two calls are of one layer, or of two by one name: contexts name layers, and a block may make them anew."""
    if one.layer == other.layer:
        return True
    return one.forward is not None and other.forward is not None and one.forward.layer is other.forward.layer is not None


class _Repeated(AbstractContextManager[None]):
    """`recording.repeat()`, entered as often as there are backwards through the same forward."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.entered.append(self.recording.repeat())
        self.entered[-1].__enter__()

    def __exit__(self, *error: object) -> None:
        self.entered.pop().__exit__(*error)  # type: ignore[arg-type]
