"""A progress bar over batches, for whoever waits: it fails no run."""

import contextlib
from collections.abc import Iterable
from typing import Any

from . import collectives


class _NoBar:
    def update(self) -> None: ...


def bar_over(
    loader: Iterable[Any], num_batches: int | None, title: str, wanted: bool
) -> contextlib.AbstractContextManager[Any]:
    """A bar with an update() over so many batches at most, on rank 0, where it is wanted and tqdm is installed."""
    if not wanted or collectives.rank_and_size()[0] != 0:
        return contextlib.nullcontext(_NoBar())
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(_NoBar())
    lengths = [length for length in (num_batches, _length(loader)) if length is not None]
    return tqdm(total=min(lengths, default=None), desc=title, unit="batch")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # as datasets of unknown length raise
        return None
