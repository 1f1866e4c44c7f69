"""Shared by all tests: one thread, memory that shows when it is read before it is written, devices and their kernels."""

import importlib.util
import math
import os
import sys
from typing import NamedTuple

import gpus
import hypothesis
import pytest
import torch

# One campaign for CI, the same each time; `-m campaign` runs the long one, another each time.
hypothesis.settings.register_profile("short", derandomize=True, deadline=None, max_examples=100, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=20_000, print_blob=True)

LONGEST = ["compile", "host", "node", "launch", "triton", "launch_lightning", "kernels", "demo", "faults", "nodes", "processes"]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        importlib.import_module("interpreted").patch_once()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts two more
    hypothesis.settings.load_profile("long" if config.getoption("markexpr") == "campaign" else "short")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite, half of which is waiting; this one alone for named files, and beside a GPU."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if whole and not torch.cuda.is_available() else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With two processes the longest files come first, so that neither ends long before the other."""
    if hasattr(config, "workerinput"):
        places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    if "worlds" in sys.modules:
        sys.modules["worlds"].prepare()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: a kernel that reads what it did not write cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def memory_as_it_comes():
    """Nothing is written to new memory, and operators of torch sum in the order that they like."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def heap_as_it_is(monkeypatch):
    """A benchmark leaves the heap of this process as it is."""
    from syncbn.bench import layer

    monkeypatch.setattr(layer, "keep_heap", lambda: False)


@pytest.fixture
def operators():
    """The operators of torch.nn.SyncBatchNorm, on a CPU."""
    import cuda_operators

    with cuda_operators.on_cpu():
        yield


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """Where what `python -m syncbn build` makes is, built once for all processes of a run."""
    import fcntl

    from syncbn.kernels import extension

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    library = folder / extension.LIBRARY.name
    with (folder / "library.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            extension.build(folder / "library.so").replace(library)
    return library


@pytest.fixture(autouse=True)
def _library_of_a_form(request, monkeypatch):
    """For tests whose ranks use it."""
    form = request.node.callspec.params.get("form") if hasattr(request.node, "callspec") else None
    if getattr(form, "by_library", False):
        monkeypatch.setattr(gpus, "library", request.getfixturevalue("host_library"))


class Device(NamedTuple):
    """Where to compute, whether by the kernels in Triton, and whether C++ launches them."""

    name: str
    triton_from_bytes: float = math.inf
    by_library: bool = False


DEVICES = {
    "cpu": Device("cpu"),
    "cuda, aten": pytest.param(Device("cuda"), marks=gpus.needs_gpu),
    "cuda, triton": pytest.param(Device("cuda", 0), marks=[gpus.needs_gpu, gpus.needs_triton]),
    "cuda, host": pytest.param(Device("cuda", 0, True), marks=[gpus.needs_gpu, gpus.needs_triton, gpus.needs_cxx]),
}


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request, monkeypatch):
    """The name of a device, for a test that runs on each, by each choice of kernels for it."""
    from syncbn import kernels
    from syncbn.kernels import extension

    name, triton_from_bytes, by_library = request.param
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    monkeypatch.setattr(extension, "library", None)
    if by_library:
        from syncbn.kernels import host

        monkeypatch.setattr(extension, "library", extension.load(request.getfixturevalue("host_library")))
        host.use(extension.library)
        monkeypatch.setattr(kernels, "_tried", {})
    gpus.check_kernels(name, triton_from_bytes)
    return name
