"""The host side of the GPU kernels in C++: values by Triton's interpreter, what it launches and when, and how it is built."""

import gc
import logging
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import ClassVar

import batches
import pytest
import torch
from allpairspy import AllPairs
from gpus import needs_cxx
from test_triton import DTYPES, FUNCTIONS, INTERPRETED, LAYOUTS, the_interpreter_lacks
from torch._subclasses import FakeTensorMode

import syncbn.__main__
from syncbn import kernels
from syncbn.kernels import Affine, Running, in_triton

pytestmark = [
    pytest.mark.skipif(in_triton() is None, reason="needs triton"),
    needs_cxx,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter is for test_triton.py"),
]
TESTS = Path(__file__).parent
OPTIONS = ("-q", "-n0", "-p", "no:cacheprovider", "-p", "host_by_addresses", "-k")

if in_triton() is not None:
    import host_by_addresses

    from syncbn.kernels import host, triton


@pytest.mark.skipif(bool(the_interpreter_lacks()), reason=the_interpreter_lacks())
@pytest.mark.timeout(300)
def test_values_by_the_interpreter(host_library):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "not interpreter and not compiles", str(TESTS / "test_triton.py")],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "HOST_LIBRARY": str(host_library), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    *_, calls = (line for line in done.stdout.splitlines() if line.startswith("by addresses: "))
    assert int(calls.split()[2]) > 50, calls


class Launched(host_by_addresses.Made if in_triton() is not None else object):
    """Stands for a compiled program: notes what it is launched for, and runs nothing."""

    dtypes: ClassVar[dict[int, torch.dtype]] = {}  # by the addresses of tensors that the functions were given

    def launch(self, grid, addresses, numbers):
        for address, made_for in zip(addresses, self.tensors, strict=True):
            assert address is None or self.dtypes.get(address, made_for[0]) == made_for[0]
        seen.append((self.name, grid, addresses, [made_for and made_for[0] for made_for in self.tensors], numbers))


seen: list[tuple] = []


@pytest.fixture
def library(host_library, monkeypatch):
    """As loaded, with programs that note their launches."""
    found = host_by_addresses.Library(host_library, Launched)
    monkeypatch.setattr(host, "library", found.functions())
    monkeypatch.setattr(triton, "INTERPRETED", True)  # takes tensors of a CPU
    seen.clear()
    return found


def step(compute, x, affine, running):
    message = compute.moments(x)
    _, saved = compute.normalize(x, message, affine, running)
    compute.gradient_sums(x, x, saved)
    compute.input_gradient(x, x, saved, message[:-1].clone())


def given_to(x, affine, running):
    tensors = [x, affine.weight, affine.bias, affine.residual, *(running or ())]
    return {tensor.data_ptr(): tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)}


def test_what_is_made_for_some_arguments_is_launched_for_no_others(library, monkeypatch):
    """Every pair of all that makes arguments differ, twice: by the same numbers, on the same grids, as Python launches them."""
    axes = {
        "shape": [(6, 33, 5, 5), (6, 48, 5, 5), (6, 33, 4, 4), (6, 1), (6, 48), (5, 32, 64, 64), (0, 3, 2), (2, 3, 2, 2, 2)],
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "offset": [0, 1, 4, 8],
        "parameters": [None, torch.float32, torch.bfloat16, torch.float64],
        "running": [None, 0.1, 1, math.inf],
        "eps": [1, 1e-5, math.inf],
        "fused": batches.FUSED,
    }
    cases = list(AllPairs(list(axes.values())))
    by_python = []
    monkeypatch.setattr(triton, "_launchers", Known(by_python))
    for shape, dtype, layout, offset, parameters, momentum, eps, fused in [*cases, *cases]:
        x = torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)
        c, residual = shape[1], None
        if layout == "channels_last":
            x = batches.lay_out(x, layout)
        if fused == "add relu":
            residual = torch.empty_like(x)
        vector = None if parameters is None else torch.empty(c + offset, dtype=parameters)[offset:]
        running = None if momentum is None else Running(torch.empty(c), torch.empty(c), torch.tensor(0), momentum)
        affine = Affine(vector, vector, eps, fused != "none", residual)
        monkeypatch.setattr(Launched, "dtypes", given_to(x, affine, running))
        seen.clear()
        by_python.clear()
        step(host, x, affine, running)
        step(triton, x, affine, running)
        given = set(Launched.dtypes)
        assert [launch_of(*of_one, given) for of_one in seen] == [launch_of(*of_one, given) for of_one in by_python]
    assert len(by_python) >= 3


def launch_of(name, grid, addresses, dtypes, numbers, given):
    """What two launches of the same have in common: not the addresses of results."""
    same = [None if address is None else address if address in given else "another" for address in addresses]
    return name, tuple(grid), same, list(dtypes), [*map(str, numbers)]


class Known(dict):
    """triton.py's launchers, of which all are there: they note their launches."""

    def __init__(self, into):
        super().__init__()
        self.into = into

    def get(self, key, default=None):
        name, _, dtypes, *_ = key

        def run(*given):
            self.into.append((name, given[:3], given[9 : 9 + len(dtypes)], dtypes, given[9 + len(dtypes) :]))

        return triton.Launcher(None, run, "of the driver", "packed")


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_with_a_hook_triton_launches(hook, library, monkeypatch):
    x, left = torch.ones(2, 3), []
    host.moments(x)
    for wanted in (None, lambda _: None):
        monkeypatch.setattr(triton.HOOKS, hook, wanted)
        seen.clear()
        library.loaded.moments(x)
        left.append((len(seen), len(library.new)))
    assert left == [(1, 0), (0, 1)]


@pytest.mark.parametrize("what", ["running", "average", "weight", "subclass"])
def test_what_is_rare_is_left_to_python(what, library, monkeypatch):
    left = []
    for name in FUNCTIONS:
        monkeypatch.setattr(triton, name, lambda *given, name=name: left.append(name) or (None, None))
    x, vector = torch.randn(4, 3, 5), torch.rand(3)
    running, affine = Running(vector, vector, torch.tensor(0), 0.1), Affine(vector, vector, 1e-5, True)
    apart, step_back = torch.rand(3, 2)[:, 0], host.moments(x)
    _, saved = host.normalize(x, step_back, affine, None)
    if what == "running":
        host.normalize(x, step_back, affine, running._replace(mean=apart))
        host.normalize(x, step_back, affine, running._replace(var=apart))
    elif what == "average":
        host.normalize(x, step_back, affine, running._replace(momentum=None))
    elif what == "weight":
        host.normalize(x, step_back, affine._replace(weight=apart), running)
        host.gradient_sums(x, x, saved._replace(bias=apart))
        host.input_gradient(x, x, saved._replace(weight=apart), step_back)
    else:
        for bias in (torch._neg_view(vector), FakeTensorMode().from_tensor(vector)):
            host.normalize(x, step_back, affine._replace(bias=bias), running)
    expected = {"weight": ["normalize", "gradient_sums", "input_gradient"], "average": ["normalize"]}
    assert left == expected.get(what, ["normalize"] * 2)


def test_a_gradient_is_given_as_x_lies(library, monkeypatch):
    """A program reads it by the address alone: as it is, or copied."""
    x, made = batches.lay_out(torch.randn(4, 3, 2, 2), "channels_last"), []
    _, saved = host.normalize(x, host.moments(x), Affine(None, None, 1e-5), None)
    monkeypatch.setattr(library, "make", lambda *given: made.append(given) or Launched(*given))
    others = [x.contiguous(), x.double(), torch.ones(()).expand(x.shape), torch._neg_view(x)]
    for dy in (x, *others):
        library.forget()
        sums = host.gradient_sums(dy, x, saved)
        host.input_gradient(dy, x, saved, sums.message)
        for _, _, _, (given, *_), _, _ in made:
            assert (given.data_ptr() == x.data_ptr()) == (dy is x)
            assert (given.dtype, given.stride()) == (x.dtype, x.stride())
            assert torch.equal(given, dy.to(x.dtype))
        assert len(made) == 2
        made.clear()


def test_buffers_that_a_program_moves_are_known_to_be_changed(library):
    x, running = torch.randn(4, 3), Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
    before = [tensor._version for tensor in running[:3]]
    library.loaded.normalize(x, host.moments(x), None, None, 1e-5, False, None, *running)
    library.loaded.normalize(x, host.moments(x), None, None, 1e-5, False, None, *running[:2], None, 0.1)
    assert [tensor._version - old for tensor, old in zip(running[:3], before, strict=True)] == [2, 2, 1]


def test_what_a_launch_raises_is_raised_and_nothing_is_kept(library, monkeypatch):
    x = torch.randn(4, 3)
    host.moments(x)

    def fails(*given):
        raise OverflowError("of the driver")

    counts = []
    for launch in (fails, lambda *given: None):
        monkeypatch.setattr(Launched, "launch", launch)
        for _ in range(3):
            gc.collect()
            counts.append([sys.getrefcount(None), sys.getrefcount(Launched.function), sys.getallocatedblocks()])
            for _ in range(200):
                if launch is fails:
                    with pytest.raises(OverflowError, match="of the driver"):
                        library.loaded.moments(x)
                else:
                    library.loaded.moments(x)
        assert all(abs(late - early) < 100 for early, late in zip(*counts[-2:], strict=True)), counts
    message = host.moments(x)
    gone = weakref.ref(message)
    del message
    assert gone() is None


def test_no_more_plans_are_kept_than_there_is_room_for(library):
    asked = []

    def plan(*shape):
        asked.append(shape[0])
        return triton.plans.of.__wrapped__(*shape)

    library.loaded.use(plan, triton.workspace, triton.stream, library.add, triton.HOOKS)
    for n in [*range(1, 4098), 4097, 1, 1]:
        library.loaded.moments(torch.empty(n, 2))
    assert asked == [*range(1, 4098), 1]


def test_a_plan_that_is_forgotten_while_it_is_used_stays(library):
    """As another thread may do where a function calls Python."""
    launched = []

    def workspace(x, *sizes):
        if len(x) == 1:
            for n in range(2, 4200):
                library.loaded.moments(torch.empty(n, 2))
        return triton.workspace(x, *sizes)

    def add(number, x, plan, *more):
        launched.append((len(x), plan.numbers[0]))
        return library.add(number, x, plan, *more)

    library.loaded.use(triton.plans.of.__wrapped__, workspace, triton.stream, add, triton.HOOKS)
    library.loaded.moments(torch.empty(1, 2))
    assert launched == [(n, n) for n in [*range(2, 4200), 1]]


def test_more_shapes_than_are_kept_on_several_threads(library):
    """Whose plans are forgotten while another thread launches by them."""
    wrong = []

    def launch(rows):
        try:
            for n in rows:
                message = library.loaded.moments(torch.empty(n, 2))
                if message.shape != (5,):
                    wrong.append(message.shape)
        except Exception as error:
            wrong.append(error)

    library.loaded.use(triton.plans.of.__wrapped__, triton.workspace, triton.stream, library.add, triton.HOOKS)
    threads = [threading.Thread(target=launch, args=(range(1, 5000),)) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_tensors_that_are_not_what_their_memory_holds_are_not_taken(library):
    x = torch.randn(4, 3, 5)
    assert host.takes(x)
    for shape in ((4, 3), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        assert host.takes(batches.lay_out(torch.randn(shape), "channels_last"))
    zeros = torch._efficientzerotensor(x.shape)
    for other in (
        x.double(),
        x[..., ::2],
        x.transpose(0, 1),
        x[:, :0],
        torch._neg_view(x),
        zeros,
        FakeTensorMode().from_tensor(x),
    ):
        assert (host.takes(other), triton.takes(other)) == (False, False)
    with FakeTensorMode():
        assert not host.takes(x)
    taken = []
    torch.vmap(lambda row: taken.append((host.takes(row), host.takes(x))) or row)(x)
    assert taken == [(False, False)]


def test_it_is_picked_where_it_was_built(library, monkeypatch):
    monkeypatch.setattr(kernels, "_tried", {})
    assert in_triton() is host
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(host, "library", None)
    assert in_triton() is triton


def test_its_trial_is_of_its_own_functions(library, monkeypatch):
    assert host.problem("cpu") is None
    assert [name for name, *_ in seen] == ["moments", "normalize"] * 2
    monkeypatch.setattr(Launched, "launch", lambda *given: 1 / 0)
    assert host.problem("cpu").startswith("ZeroDivisionError: division by zero;")


def test_a_library_of_another_torch_is_not_loaded_and_a_broken_one_said(tmp_path, caplog):
    assert torch.__version__ in host.LIBRARY.name
    with caplog.at_level(logging.WARNING, "syncbn"):
        assert host.load(tmp_path / "none.so") is None
        assert caplog.records == []
        (tmp_path / "broken.so").write_bytes(b"no library")
        assert host.load(tmp_path / "broken.so") is None
    (record,) = caplog.records
    assert "cannot be loaded" in record.getMessage()
    assert "broken.so" in record.getMessage()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_what_a_compiler_says_is_said(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(host.build, "__defaults__", (tmp_path / "library.so",))
    assert syncbn.__main__.main(["build"]) == 1
    said = capsys.readouterr().err
    assert ("given the C++ compiler 'no-such-compiler', which cannot be run" in said) or ("compiler failed: false -O2" in said)
    assert list(tmp_path.iterdir()) == []


def test_the_command_builds_what_processes_load_from_then_on(host_library, tmp_path, monkeypatch, capsys):
    path = tmp_path / host.LIBRARY.name
    monkeypatch.setattr(host, "library", None)
    monkeypatch.setattr(host, "build", lambda: Path(path.write_bytes(host_library.read_bytes()) and path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert syncbn.__main__.main(["build"]) == 0
    assert host.library is not None
    assert list(host_library.parent.iterdir()) == [host_library], "whole, and nothing is left beside it"
    said = capsys.readouterr().out
    assert str(path) in said
    assert "not tried: no GPU here" in said


def test_what_does_not_work_on_the_gpu_is_removed(host_library, tmp_path, monkeypatch, capsys):
    path = tmp_path / host.LIBRARY.name
    monkeypatch.setattr(host, "build", lambda: Path(path.write_bytes(host_library.read_bytes()) and path))
    monkeypatch.setattr(host, "problem", lambda device: "a fault")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(host, "library", None)
    assert syncbn.__main__.main(["build"]) == 1
    assert "removed again, since it does not work on some GPU: a fault" in capsys.readouterr().err
    assert not path.exists()
