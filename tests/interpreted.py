"""Triton's interpreter, in half the time: for a process with TRITON_INTERPRET=1."""

import functools
from typing import Any

from triton.runtime.interpreter import InterpretedFunction


@functools.cache
def patch_once() -> None:
    """What it replaces in triton.language whenever a kernel calls a function, it replaces once for the functions of a module.

    A kernel's own is put back when it ends; what functions find there by then are the kernel's, or stay for the next.
    """
    called, patching = set(), InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__globals__["__name__"]
        if module in called:
            return self.rewrite()(*args, **kwargs)
        called.add(module)
        return patching(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
