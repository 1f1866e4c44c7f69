"""What `python -m syncbn build` makes, where it was: C++ for what small tensors wait for.

Requirements
    - a library is of its sources, one release of torch and one of Python, by its name, so that no other is loaded;
    - it is built when a user asks, never while ranks wait; without it, or where it does not work, Python does the same.
"""

import hashlib
import importlib.util
import logging
import os
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

WHAT = "what `python -m syncbn build` made does not work here"
SOURCES = [Path(__file__).with_name(name) for name in ("host.cpp", "host_node.h")]
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES if path.exists())).hexdigest()[:12]
ENDING = f"-{torch.__version__}{EXTENSION_SUFFIXES[0]}"
LIBRARY = Path(__file__).with_name(f"_host-{DIGEST}{ENDING}")


def build(to: Path) -> Path:
    """Compile the sources for the torch and the Python that run, which takes a quarter of a minute; `to`, the library.

    Raises:
        RuntimeError: there is no C++ compiler (CXX, or c++), or it failed; what it said is in the message.
    """
    import shlex
    import subprocess
    import sysconfig

    root, python = Path(torch.__file__).parent, sysconfig.get_paths()["include"]
    folders = (root / "include", root / "include/torch/csrc/api/include", python)
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise RuntimeError(f"given CXX={os.environ['CXX']!r}: {error}; expected a C++ compiler and its options") from None
    command = [*compiler, "-O2", "-std=c++20", "-shared", "-fPIC", str(SOURCES[0]), "-o", str(to)]
    command += [f"-I{folder}" for folder in folders] + [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"given the C++ compiler {compiler[0]!r}, which cannot be run: {error}") from error
    if done.returncode or not to.exists():
        raise RuntimeError(f"the C++ compiler failed: {shlex.join(command)}\n{done.stderr}")
    return to


def load(path: Path = LIBRARY) -> Any:
    """The library; None if it is not there, or, said in the log, is none."""
    if not path.exists():
        return None
    loader = ExtensionFileLoader("syncbn.kernels._host", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        logging.getLogger("syncbn").warning("%s (%s): Python takes its place, with the same results but slower", WHAT, error)
        return None
    torch.autograd.graph.Node.register(module.Node)
    return module


library = load()  # None: Python does it
