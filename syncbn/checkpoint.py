"""Activation checkpointing without communicating twice."""

from contextlib import AbstractContextManager

from .collectives import Recording


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch.utils.checkpoint, by which a recomputation takes the statistics of its own forward.

        checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_context)

    The recomputation then issues no collective; the 2C+1 float64 values of each layer's call are kept until the backward. Works
    for layers called several times, several forwards before a backward, nested checkpoints and early stopping. Running
    statistics move once with it and without it, unless the block itself is compiled: then put the checkpoint inside.

    Inside torch.compile, keep the collective by the compiler's own policy instead:

        ops = [torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default]
        context_fn = functools.partial(create_selective_checkpoint_contexts, ops)

    with torch.utils.checkpoint.create_selective_checkpoint_contexts.

    Returns:
        The context of the forward and that of its recomputation.
    """
    recording = Recording()
    return recording.keep(), _Repeated(recording)


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
