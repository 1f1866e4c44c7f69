"""A plugin of pytest, for a process with BY_LIBRARY, a path: tests, and the processes of worlds.py, use what `build` makes.

With TRITON_INTERPRET=1 tensors of the CPU are given to the kernels in Triton, which the library launches by the interpreter.
"""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

from syncbn import eager, kernels
from syncbn.kernels import extension, in_triton

calls = {"record": 0, "forward": 0, "backward": 0}  # by C++ of this process; of Python from there


def counted(name, call):
    def function(*given):
        calls[name] += 1
        return call(*given)

    return function


def use():
    """In this process, from here on."""
    library = extension.library = extension.load(Path(os.environ["BY_LIBRARY"]))
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("interpreted").patch_once()
        in_triton().use(library)
        kernels.pick = lambda x: in_triton() if in_triton().takes(x) else kernels.composed()
    others = {name: getattr(library, name) for name in dir(library) if not name.startswith("_")}
    extension.library = SimpleNamespace(**others | {"record": counted("record", library.record)})
    forward, backward, all_reduce = eager.FUNCTIONS
    eager.FUNCTIONS = (counted("forward", forward), counted("backward", backward), all_reduce)


def pytest_configure(config):
    use()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("by the library: " + ", ".join(f"{count} {name}" for name, count in calls.items()))
