"""Processes that a test interrupts."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """What starts inside hears SIGINT, as from a terminal: behind an `&` of a shell the tests, and theirs, have it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # not inherited, other than one that ignores
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
