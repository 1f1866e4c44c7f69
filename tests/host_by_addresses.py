"""A plugin of pytest, for a process with TRITON_INTERPRET=1 and HOST_LIBRARY: the kernels' tests by the host side in C++.

A program that it asks for is not run where it would be compiled, but whenever it is launched: by the addresses and the numbers
that a GPU would be given, on the CPU by Triton's interpreter. So every function is called until nothing is new to it.
"""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncbn.kernels import extension, host, plans, triton

STREAM = 77


def is_long(number) -> bool:
    return isinstance(number, int) and number >= 2**31


class Made:
    """Stands for a compiled program: sees whether what it is launched for is what it was made for, and interprets it."""

    function, metadata = "of the driver", "packed"

    def __init__(self, number, x, plan, tensors, more, constants):
        self.name = host.PROGRAMS[number]
        self.tensors = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
        self.numbers = [(type(number), is_long(number)) for number in (*more, *plan.numbers, *constants, *plan.cut)]
        self.constants = (*constants, *plan.cut)

    def run(self, *given):
        *grid, stream, function, metadata = given[:6]
        addresses, numbers = given[9 : 9 + len(self.tensors)], given[9 + len(self.tensors) :]
        assert (stream, function, metadata, given[6:9]) == (STREAM, self.function, self.metadata, (None,) * 3)
        assert [(type(number), is_long(number)) for number in numbers] == self.numbers
        assert numbers[-len(self.constants) :] == self.constants
        assert [None if address is None else address % 16 == 0 for address in addresses] == [
            None if made_for is None else made_for[1] for made_for in self.tensors
        ]
        self.launch(tuple(grid), addresses, numbers)

    def launch(self, grid, addresses, numbers):
        dtypes = [made_for and made_for[0] for made_for in self.tensors]
        tensors = [dtype and at(address, dtype) for address, dtype in zip(addresses, dtypes, strict=True)]
        getattr(triton.programs, self.name)[grid](*tensors, *numbers)


def at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """The value at an address; a program finds what is behind it."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


class Library:
    """A library whose programs are `make`'s, and whose functions are called until nothing is new to them."""

    def __init__(self, path: Path, make: Any = Made) -> None:
        self.loaded, self.make = extension.load(path), make
        self.new: list[Made] = []
        self.launched: dict[str, int] = dict.fromkeys(host.PROGRAMS, 0)
        self.use()

    def use(self, **others: Any) -> None:
        """Forget what was planned and made, and call `others` in place of what it calls."""
        given: dict[str, Any] = {"plans": lambda *shape: plans.of(*shape), "stream": lambda device: STREAM, "launch": self.add}
        host.use(self.loaded, **given | others)

    def add(self, *given: Any) -> Made:
        made = self.make(*given)
        self.new.append(made)
        return made

    def functions(self) -> SimpleNamespace:
        same = {name: getattr(self.loaded, name) for name in ("takes", "record", "is_in_order")}
        return SimpleNamespace(**same, **{name: self.known(name) for name in host.PROGRAMS})

    def known(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            result, self.new = None, [None]  # type: ignore[list-item]
            while self.new:
                self.new.clear()
                result = getattr(self.loaded, name)(*arguments)
            self.launched[name] += result is not None
            return result

        return call


def pytest_configure(config):
    config.host = Library(Path(os.environ["HOST_LIBRARY"]))
    extension.library = config.host.functions()


@pytest.fixture(autouse=True)
def _forget(request):
    """Plans of another test, which may have had other tiles."""
    request.config.host.use()


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"by addresses: {min(config.host.launched.values())} calls of each function or more")
