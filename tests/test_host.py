"""The host side of the GPU kernels in C++: values by Triton's interpreter, what it launches and when, and how it is built."""

import gc
import itertools
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import batches
import pytest
import torch
from gpus import needs_cxx
from test_triton import FUNCTIONS, INTERPRETED, all_that_differs, by_the_interpreter, step, the_interpreter_lacks
from torch._subclasses import FakeTensorMode

import syncbn
from syncbn import build, kernels
from syncbn.__main__ import main
from syncbn.kernels import Affine, Running, extension, in_triton

pytestmark = [
    pytest.mark.skipif(in_triton() is None, reason="needs triton"),
    needs_cxx,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter is for test_triton.py"),
]

if in_triton() is not None:
    import host_by_addresses

    from syncbn.kernels import host, triton


@pytest.mark.skipif(bool(the_interpreter_lacks()), reason=the_interpreter_lacks())
@pytest.mark.timeout(300)
def test_values_by_the_interpreter(host_library):
    library = {"HOST_LIBRARY": str(host_library), "PYTHONPATH": str(Path(__file__).parent)}
    said = by_the_interpreter("-p", "host_by_addresses", **library)
    *_, calls = (line for line in said.splitlines() if line.startswith("by addresses: "))
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
    monkeypatch.setattr(extension, "library", found.functions())
    monkeypatch.setattr(triton, "INTERPRETED", True)  # takes tensors of a CPU
    seen.clear()
    return found


def given_to(x, affine, running):
    tensors = [x, affine.weight, affine.bias, affine.residual, *(running or ())]
    return {tensor.data_ptr(): tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)}


def test_what_is_made_for_some_arguments_is_launched_for_no_others(library, monkeypatch):
    """Every pair of all that makes arguments differ, twice: by the same numbers, on the same grids, as Python launches them."""
    by_python, sizes, workspace = [], [], triton.workspace
    monkeypatch.setattr(triton, "_launchers", Known(by_python))
    monkeypatch.setattr(triton, "workspace", lambda x, *given: sizes.append(given) or workspace(x, *given))
    library.use()
    for x, affine, running in all_that_differs():
        monkeypatch.setattr(Launched, "dtypes", given_to(x, affine, running))
        seen.clear()
        by_python.clear()
        step(x, affine, running, host)
        asked = {*sizes[:2], *sizes[-2:]}
        sizes.clear()
        step(x, affine, running, triton)
        assert asked == {*sizes}
        sizes.clear()
        given = set(Launched.dtypes)
        assert [launch_of(*of_one, given) for of_one in seen] == [launch_of(*of_one, given) for of_one in by_python]
    assert len(by_python) >= 3


def launch_of(name, grid, addresses, dtypes, numbers, given):
    """What two launches of the same have in common: not the addresses of results."""
    same = [None if address is None else address if address in given else "another" for address in addresses]
    return name, tuple(grid), same, list(dtypes), [*map(str, numbers)]


def test_what_is_made_for_an_odd_address_is_launched_for_no_other(library):
    """Of each tensor by itself, and of every two."""

    def tensor(shape, is_odd):
        return torch.empty(math.prod(shape) + 4)[is_odd : math.prod(shape) + is_odd].view(shape)

    for odd in [*itertools.product([0, 1], repeat=7)] * 2:
        x, residual, dy = (tensor((6, 4), is_odd) for is_odd in odd[:3])
        vectors = [tensor((4,), is_odd) for is_odd in odd[3:]]
        running = Running(vectors[2], vectors[3], torch.tensor(0), 0.1)
        for fused in (None, residual):
            affine = Affine(vectors[0], vectors[1], 1e-5, True, fused)
            _, saved = host.normalize(x, host.moments(x), affine, running)
            sums = host.gradient_sums(dy, x, saved)
            host.input_gradient(dy if fused is None else sums.dy, x, saved, sums.message)
    assert len(seen) == 2 * 2**7 * 2 * 4


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
    apart, message = torch.rand(3, 2)[:, 0], host.moments(x)
    _, saved = host.normalize(x, message, affine, None)
    if what == "running":
        host.normalize(x, message, affine, running._replace(mean=apart))
        host.normalize(x, message, affine, running._replace(var=apart))
    elif what == "average":
        host.normalize(x, message, affine, running._replace(momentum=None))
    elif what == "weight":
        host.normalize(x, message, affine._replace(weight=apart), running)
        host.gradient_sums(x, x, saved._replace(bias=apart))
        host.input_gradient(x, x, saved._replace(weight=apart), message)
    else:
        for bias in (torch._neg_view(vector), FakeTensorMode().from_tensor(vector)):
            host.normalize(x, message, affine._replace(bias=bias), running)
    expected = {"weight": ["normalize", "gradient_sums", "input_gradient"], "average": ["normalize"]}
    assert left == expected.get(what, ["normalize"] * 2)


def test_a_gradient_is_given_as_x_lies(library, monkeypatch):
    """A program reads it by the address alone: as it is, or copied."""
    x, made = batches.lay_out(torch.randn(4, 3, 2, 2), "channels_last"), []
    _, saved = host.normalize(x, host.moments(x), Affine(None, None, 1e-5), None)
    monkeypatch.setattr(library, "make", lambda *given: made.append(given) or Launched(*given))
    others = [x.contiguous(), x.double(), torch.ones(()).expand(x.shape), torch._neg_view(x)]
    for dy in (x, *others):
        library.use()
        sums = host.gradient_sums(dy, x, saved)
        host.input_gradient(dy, x, saved, sums.message)
        for _, _, _, (given, *_), _, _ in made:
            assert (given.data_ptr() == x.data_ptr()) == (dy is x)
            assert (given.dtype, given.stride()) == (x.dtype, x.stride())
            assert torch.equal(given, dy.to(x.dtype))
        assert len(made) == 2
        made.clear()


def test_what_python_does_meanwhile_is_seen_by_autograd(library):
    leaf, found = torch.ones(3, requires_grad=True), []

    def workspace(*given):
        with torch.enable_grad():
            found.append((leaf * 2).requires_grad)
        return triton.workspace(*given)

    library.use(workspace=workspace)
    with torch.no_grad():
        host.moments(torch.randn(4, 3))
    assert found == [True, True]


def test_another_thread_goes_on_while_torch_copies(library):
    """A gradient of 64 MB, transposed."""
    x, ended, ticks = torch.empty(2**12, 2**12), threading.Event(), []
    _, saved = host.normalize(x, host.moments(x), Affine(None, None, 1e-5), None)

    def tick():
        while not ended.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    library.loaded.gradient_sums(x.t(), x, *saved)
    other = threading.Thread(target=tick)
    other.start()
    meanwhile = []
    for _ in range(5):  # on a loaded machine the other one may be late
        start = time.perf_counter()
        library.loaded.gradient_sums(x.t(), x, *saved)
        end = time.perf_counter()
        quarter = (end - start) / 4
        meanwhile += [at for at in ticks if start + quarter < at < end - quarter]
    ended.set()
    other.join(60)
    assert meanwhile


def test_buffers_that_a_program_moves_are_known_to_be_changed(library, monkeypatch):
    x, running = torch.randn(4, 3), Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
    before = [tensor._version for tensor in running[:3]]
    library.loaded.normalize(x, host.moments(x), None, None, 1e-5, False, None, *running)
    library.loaded.normalize(x, host.moments(x), None, None, 1e-5, False, None, *running[:2], None, 0.1)
    assert [tensor._version - old for tensor, old in zip(running[:3], before, strict=True)] == [2, 2, 1]
    with torch.inference_mode():
        unversioned = torch.zeros(3), torch.ones(3), torch.tensor(0)
    monkeypatch.setattr(triton, "_launchers", Known([]))
    for compute in (host, triton):
        compute.normalize(x, host.moments(x), Affine(None, None, 1e-5), Running(*unversioned, 0.1))


def test_a_buffer_that_shares_its_memory_until_it_is_written_to_gets_its_own(library):
    x, mean = torch.randn(4, 3), torch._lazy_clone(torch.zeros(3))
    assert torch._C._is_cow_tensor(mean)
    for buffer in (torch.zeros(3), mean):
        library.loaded.normalize(x, host.moments(x), None, None, 1e-5, False, None, buffer, torch.ones(3), None, 0.1)
    assert seen, "it was launched by the address"
    assert not torch._C._is_cow_tensor(mean)


def test_what_was_compiled_is_kept(library):
    """Triton unloads a program when it goes."""
    compiled = []

    class Compiled:
        run, function, metadata = max, 0, 0

    def launch(*given):
        compiled.append(weakref.ref(one := Compiled()))
        return one

    library.use(launch=launch)
    library.loaded.moments(torch.randn(4, 3))
    gc.collect()
    assert compiled[0]() is not None
    library.use()


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

    library.use(plans=plan)
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

    library.use(plans=triton.plans.of.__wrapped__, workspace=workspace, launch=add)
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

    library.use(plans=triton.plans.of.__wrapped__)
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
    monkeypatch.setattr(extension, "library", None)
    assert in_triton() is triton


def test_its_trial_is_of_its_own_functions(library, monkeypatch):
    assert host.problem("cpu") is None
    assert [name for name, *_ in seen] == ["moments", "normalize"] * 2
    monkeypatch.setattr(Launched, "launch", lambda *given: 1 / 0)
    assert host.problem("cpu").startswith("ZeroDivisionError: division by zero;")


def test_where_it_does_not_work_python_launches(library, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(host, "problem", lambda device: "a fault")
    monkeypatch.setattr(triton, "problem", lambda device: None)
    with caplog.at_level(logging.WARNING, "syncbn"):
        assert [in_triton(3), in_triton(3)] == [triton, triton]
    (record,) = caplog.records
    assert "`python -m syncbn build` made does not work here (a fault): Python launches" in record.getMessage()


def test_what_is_no_library_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "syncbn"):
        assert extension.load(tmp_path / "none.so") is None
        assert caplog.records == []
        (tmp_path / "broken.so").write_bytes(b"no library")
        assert extension.load(tmp_path / "broken.so") is None
    (record,) = caplog.records
    assert "broken.so" in record.getMessage()


@pytest.fixture
def compiler(host_library, tmp_path, monkeypatch):
    """In place of a C++ compiler what copies the library; where it is to be is another folder than the package's."""
    program = tmp_path / "compiler.py"
    program.write_text(f"import shutil, sys\nshutil.copy({str(host_library)!r}, sys.argv[sys.argv.index('-o') + 1])\n")
    (folder := tmp_path / "kernels").mkdir()
    monkeypatch.setenv("CXX", shlex.join([sys.executable, str(program)]))
    monkeypatch.setattr(extension, "LIBRARY", folder / extension.LIBRARY.name)
    monkeypatch.setattr(extension, "library", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-compiler -m64", "given the C++ compiler 'no-such-compiler', which cannot be run"),
        ("false -x", "failed: false -x -O2"),
        ("true", "failed: true -O2"),
        ("'c++", 'given CXX="\'c++": No closing quotation; expected a C++ compiler and its options'),
    ],
)
def test_what_a_compiler_says_is_said(command, said, compiler, monkeypatch, capsys):
    monkeypatch.setenv("CXX", command)
    assert main(["build"]) == 1
    assert said in capsys.readouterr().err
    assert list(compiler.iterdir()) == []


def test_what_the_command_builds_takes_the_place_of_what_it_built_before(compiler, capsys):
    of_other_source, of_other_torch = compiler / f"_host-0{extension.ENDING}", compiler / "_host-0-2.0.so"
    for old in (of_other_source, of_other_torch):
        old.write_bytes(b"old")
    assert main(["build"]) == 0
    assert set(compiler.iterdir()) == {extension.LIBRARY, of_other_torch}, "which another environment may load"
    assert extension.library is not None
    said = capsys.readouterr().out
    assert str(extension.LIBRARY) in said
    assert "which works on the CPU" in said


def test_what_another_build_took_away_is_gone(compiler, monkeypatch):
    """Of two at once, as on two machines that share the files, one is the first."""
    (compiler / f"_host-0{extension.ENDING}").write_bytes(b"old")
    found = Path.glob

    def late(directory, pattern):
        for path in (paths := list(found(directory, pattern))):
            path.unlink()
        return paths

    monkeypatch.setattr(Path, "glob", late)
    assert main(["build"]) == 0
    assert list(compiler.iterdir()) == [extension.LIBRARY]


@pytest.mark.parametrize("problem", [None, "a fault"])
def test_what_does_not_work_on_the_gpu_is_not_kept(problem, compiler, monkeypatch, capsys):
    extension.LIBRARY.write_bytes(b"one that worked")
    on_cpu = build.step_problem
    monkeypatch.setattr(build, "step_problem", lambda device: on_cpu(device) if device == "cpu" else None)
    monkeypatch.setattr(host, "problem", lambda device: problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert main(["build"]) == (problem is not None)
    said = capsys.readouterr()
    assert ("does not work on some GPU: a fault" in said.err) == (problem is not None)
    assert ("which works on the CPU and some GPU" in said.out) == (problem is None)
    assert (extension.LIBRARY.read_bytes() == b"one that worked") == (problem is not None)
    assert list(compiler.iterdir()) == [extension.LIBRARY]


@pytest.mark.parametrize("does", ["raises", "another value"])
def test_what_does_not_train_as_python_does_is_not_kept(does, host_library, compiler, monkeypatch, capsys):
    loaded = extension.load(host_library)

    def record(functions, x, *given):
        if does == "raises":
            raise OverflowError("of a node")
        return loaded.record(functions, x, *given) + x

    monkeypatch.setattr(extension, "load", lambda path: SimpleNamespace(record=record, is_in_order=loaded.is_in_order))
    assert main(["build"]) == 1
    reason = "OverflowError: of a node" if does == "raises" else "otherwise than by Python: y, dx"
    assert capsys.readouterr().err == f"not kept, since it does not work on the CPU: {reason}\n"
    assert list(compiler.iterdir()) == []


def test_without_triton_it_is_built_for_the_cpu(compiler):
    put = f"from syncbn.kernels import extension; extension.LIBRARY = pathlib.Path({str(extension.LIBRARY)!r})"
    program = (
        f"import pathlib, sys; sys.modules['triton'] = None; {put}; from syncbn.__main__ import main; sys.exit(main(['build']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "which works on the CPU: used by" in done.stdout


def test_processes_load_what_was_built_for_their_source_alone(compiler, tmp_path):
    package = Path(syncbn.__file__).parent
    shutil.copytree(package, tmp_path / "syncbn", ignore=shutil.ignore_patterns("_host-*", "__pycache__"))

    def run(*arguments):
        command, there = [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    which = ("-c", "from syncbn import kernels; print(kernels.in_triton().__name__)")
    assert run(*which).strip() == "syncbn.kernels.triton"
    assert f"built {tmp_path}" in run("-m", "syncbn", "build")
    assert run(*which).strip() == "syncbn.kernels.host"
    with (tmp_path / "syncbn/kernels/host.cpp").open("a") as source:
        source.write("// changed")
    assert run(*which).strip() == "syncbn.kernels.triton"
