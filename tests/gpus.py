"""What tests on a GPU need, and which kernels they run by."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.version.hip is not None, reason="needs Triton, and a GPU of NVIDIA's"
)
needs_cxx = pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="needs a C++ compiler, and the headers of Python",
)


library: Path | None = None  # what `python -m syncbn build` makes, for ranks that use it


def check_kernels(device: str, triton_from_bytes: float) -> None:
    """The kernels asked for are those picked."""
    from syncbn import kernels

    picked = kernels.pick(torch.zeros(2, 3, device=device))
    assert (picked is kernels.in_triton()) == (triton_from_bytes == 0)
    if triton_from_bytes == 0:
        from syncbn.kernels import host, triton

        assert picked is (triton if kernels.extension.library is None else host)
