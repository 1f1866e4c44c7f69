"""The kernels in Triton: values by its interpreter on the CPU, in a process of its own, and compilation for an absent GPU.

On a machine with a GPU, test_cuda.py runs them on it.
"""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import batches
import numpy as np
import pytest
import tolerance
import torch
from allpairspy import AllPairs
from batches import Case
from test_kernels import _moved, check_bits_of_the_relu, over_shares

import syncbn
from syncbn.kernels import Affine, Running, aten, in_triton, plans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(in_triton() is None, reason="needs triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_by_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="needs a compiler, not the interpreter")

FUNCTIONS = ("moments", "normalize", "gradient_sums", "input_gradient")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {
    "shares": ["unequal", "empty first", "all empty", "single"],
    "space": ["0d", "2d", "3d", "ragged"],
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "affine": ["both", "weight", "bias", "none"],
    "param_dtype": [None, torch.float64, torch.bfloat16],
    "eps": [1e-5, 0.3],
    "fused": batches.FUSED,
    "tile": [16, 2048],  # values: many tiles, or all of a share in one
    "programs": [1024, 8],  # 8: a program sums several tiles
    "team": [64, 2],  # 2: what the splits leave is added by teams
    "wide": [2**31, 0],  # 0: offsets of 64 bits
}


@pytest.fixture(autouse=True)
def _launched_by(request, monkeypatch):
    """Python, whatever was built here, or the host side in C++ where host_by_addresses.py is a plugin."""
    if not hasattr(request.config, "host"):
        monkeypatch.setattr(syncbn.kernels.extension, "library", None)


@pytest.fixture
def poisoned():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def the_interpreter_lacks() -> str:
    """What Triton's interpreter needs and has not, if anything."""
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"needs {error.name}"
    ours, theirs = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
    return "needs triton 3.7, or numpy before 2.4" if ours < (3, 7) and theirs >= (2, 4) else ""


def by_the_interpreter(*options: str, **more: str) -> str:
    """What pytest prints of this file, where nothing is compiled; `more` in its environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, "-k", "not interpreter and not compiles", __file__],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"} | more,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    return done.stdout


@not_interpreted
@pytest.mark.skipif(bool(the_interpreter_lacks()), reason=the_interpreter_lacks())
@pytest.mark.timeout(300)
def test_by_the_interpreter():
    by_the_interpreter()


def small(monkeypatch, tile: int = 16, programs: int = 8, wide: int = 2**31, team: int = 2):
    """The kernels with tiles of another size than a GPU wants, and teams of fewer splits."""
    kernels = in_triton()
    share = kernels.plans.Share(tile, 64, programs)
    monkeypatch.setattr(kernels.plans, "shares", lambda s, itemsize: (share, share))
    monkeypatch.setattr(kernels.plans, "WIDE", wide)
    monkeypatch.setattr(kernels.plans, "TEAM", team)
    monkeypatch.setattr(kernels.plans, "of", functools.cache(kernels.plans.of.__wrapped__))
    return kernels


@interpreted
@pytest.mark.parametrize("number", range(len(list(AllPairs(list(AXES.values()))))))
def test_every_pair_of_values_of_two_axes_equals_the_whole_batch(number, monkeypatch, poisoned):
    row = dict(zip(AXES, list(AllPairs(list(AXES.values())))[number], strict=True))
    kernels = small(monkeypatch, row.pop("tile"), row.pop("programs"), row.pop("wide"), row.pop("team"))
    case = Case(4, **row)
    taken = [kernels.takes(x) for x in batches.make(case)[0]]
    assert all(taken)
    batches.check(case, over_shares(kernels, case))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_precision_where_the_mean_is_far_from_zero(layout, ratio, monkeypatch):
    kernels = small(monkeypatch, tile=128, programs=50)  # several to a plane, and up to 25 splits of a sum
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 2, 20, 20, generator=generator).double() + ratio).float()
    dy = torch.randn(x.shape, generator=generator) + 0.3
    if layout == "channels_last":
        x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
    wide, gradient, dims, n = x.double(), dy.double(), (0, 2, 3), 4 * 400
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, keepdim=True, correction=0)
    xhat = (wide - mean) / var.sqrt()
    dx = (gradient - gradient.mean(dims, keepdim=True) - xhat * (gradient * xhat).mean(dims, keepdim=True)) / var.sqrt()

    s1, s2, count = kernels.moments(x).split([2, 2, 1])
    assert count.item() == n
    assert ((s2 / n - (s1 / n).square() - var.flatten()) / var.flatten()).abs().max() <= 1e-6
    message = torch.cat([wide.sum(dims), wide.square().sum(dims), count])
    y, saved = kernels.normalize(x, message, Affine(None, None, 0.0), None)
    sums = kernels.gradient_sums(dy, x, saved)
    exact = torch.cat([gradient.sum(dims), (gradient * (wide - mean)).sum(dims)])
    tolerance.check("gradient sums", sums.message, exact, computed=torch.float32, ratio=1.0, scale=float(n))
    for name, got, want in (("y", y, xhat), ("dx", kernels.input_gradient(dy, x, saved, exact), dx)):
        off = tolerance.error(got, want) / want.abs().max().item()
        assert off <= 5e-7, f"{name} off by {off:.2g} of its largest value"


@interpreted
def test_counts_of_zero_and_one_and_the_average_of_all_batches():
    kernels = in_triton()
    for momentum in (0.5, None):
        for values in ([], [5.0], [5.0, 7.0]):
            assert _moved(kernels, values, momentum) == pytest.approx(_moved(aten, values, momentum), rel=1e-6)
    assert _moved(kernels, [5.0, 7.0]).batches == 5


@interpreted
def test_momentum_and_eps_reach_the_device_in_full():
    x = torch.randn(8, 3)
    message = aten.moments(x)
    moved = []
    for kernels in (in_triton(), aten):
        running = Running(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), None, 0.1)
        _, saved = kernels.normalize(x, message, Affine(None, None, 1e-5), running)
        moved.append(torch.cat([running.mean, running.var, saved.statistics]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-14, atol=0)


@interpreted
@pytest.mark.parametrize("momentum", [0.5, None])
def test_autograd_sees_that_buffers_moved(momentum):
    x = torch.randn(8, 3)
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), momentum)
    before = [buffer._version for buffer in running[:3]]
    in_triton().normalize(x, aten.moments(x), Affine(None, None, 1e-5), running)
    assert all(buffer._version > version for buffer, version in zip(running[:3], before, strict=True))
    with torch.inference_mode():
        running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), momentum)
        in_triton().normalize(x, aten.moments(x), Affine(None, None, 1e-5), running)
        assert running.num_batches_tracked == 1


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, where the interpreter computes with infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_in_its_channel(value, monkeypatch):
    kernels = small(monkeypatch)
    for row in (0, 7, 39):
        x = torch.randn(40, 3)
        x[row, 1] = value
        y, _ = kernels.normalize(x, kernels.moments(x), Affine(None, None, 1e-5), None)
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()
        s1 = kernels.moments(x)[1].item()
        assert s1 == value or (value != value and s1 != s1)


@interpreted
@pytest.mark.parametrize("fused", ["relu", "add relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_relu_of_backward_is_that_of_forward_to_the_bit(dtype, layout, fused, monkeypatch, poisoned):
    check_bits_of_the_relu(small(monkeypatch, tile=64), (4, 16, 5, 3), dtype, layout, fused)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_what_is_no_number_passes_a_relu_as_in_torch(dtype, layout, added, monkeypatch):
    kernels = small(monkeypatch, tile=64)
    x = batches.lay_out(torch.randn(4, 3, 10).to(dtype), layout)
    x[2, 1, 7] = math.nan
    residual, ones = torch.zeros_like(x) if added else None, torch.ones_like(x)
    y, saved = kernels.normalize(x, kernels.moments(x), Affine(None, None, 1e-5, True, residual), None)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()
    sums = kernels.gradient_sums(ones, x, saved)
    assert sums.message[1].item() == 40
    assert (sums.dy is not None) == added
    assert sums.dy is None or torch.equal(sums.dy, torch.where(y <= 0, 0, ones))


@interpreted
def test_what_the_kernels_do_not_take():
    kernels = in_triton()
    x = torch.randn(4, 3, 5)
    assert kernels.takes(x)
    for other in (x.double(), x[..., ::2], x.transpose(0, 1), x[:, :0], torch._neg_view(x)):
        assert not kernels.takes(other)


@interpreted
@pytest.mark.parametrize("fused", batches.FUSED)
def test_what_lies_otherwise_than_the_kernels_read_it(fused):
    x = torch.randn(4, 3, 5)
    dy, residual = torch.randn(2, 4, 5, 3).transpose(2, 3)
    vector = torch.arange(1.0, 7.0)[::2]
    affine = Affine(vector, vector - 3, 1e-5, fused != "none", residual if fused == "add relu" else None)
    message = aten.moments(x)
    results = []
    for kernels in (in_triton(), aten):
        buffers = torch.ones(3, 2)
        running = Running(buffers[:, 0], buffers[:, 1], torch.tensor(4), None)
        y, saved = kernels.normalize(x, message, affine, running)
        if saved.y is not None:
            saved = saved._replace(y=batches.lay_out(saved.y, "channels_last"))
        sums = kernels.gradient_sums(dy, x, saved)
        dx = kernels.input_gradient(dy if sums.dy is None else sums.dy, x, saved, sums.message)
        grads = (part.float() for part in sums[:3])
        results.append((y, dx, *grads, buffers, running.num_batches_tracked))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("nbytes", "tried", "taken"), [(2, True, True), (2**33, True, True), (2, True, False), (2, False, True)]
)
def test_cuda_tensors_of_all_sizes_go_by_them_where_they_can(nbytes, tried, taken, monkeypatch):
    x = mock.Mock(is_cpu=False, is_cuda=True, nbytes=nbytes, get_device=lambda: 3)
    fast, asked = mock.Mock(takes=lambda given: given is x and taken), []

    def in_triton(gpu=None):
        asked.append(gpu)
        return fast if gpu is None or (tried and gpu == 3) else None

    monkeypatch.setattr(syncbn.kernels, "in_triton", in_triton)
    assert syncbn.kernels.pick(x) is (fast if tried and taken else aten)
    assert asked == ([None, 3] if taken else [None]), "nothing is tried for a tensor that has no memory, say"


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pivot_is_not_one_pixel_of_all_images(layout):
    """A corner that is blank in all images, as where they are padded: 0, and the rest a thousand standard deviations away."""
    x = torch.randn(16, 2, 56, 56) + 1000
    x[:, :, 0, 0] = 0
    s1, s2, count = in_triton().moments(batches.lay_out(x, layout)).split([2, 2, 1])
    var, expected = s2 / count - (s1 / count).square(), x.double().var([0, 2, 3], correction=0)
    assert ((var - expected) / expected).abs().max() <= 1e-7


@interpreted
def test_the_trial_of_a_device_is_of_kernels_that_work():
    assert in_triton().problem("cpu") is None


@not_interpreted
def test_where_nothing_compiles_it_is_said_once_and_all_is_composed(monkeypatch, caplog):
    """As where a machine has no C compiler, which Triton finds out when it launches for the first time."""
    kernels, asked = in_triton(), []

    def moments(x):
        asked.append(x)
        subprocess.run(["no-such-compiler"], check=True)

    monkeypatch.setattr(kernels, "moments", moments)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: device)
    monkeypatch.setattr(syncbn.kernels, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [in_triton(3), in_triton(3)] == [None, None]
    assert in_triton() is kernels
    assert asked == ["cuda:3"], "its own GPU, once: on another it would hold memory"
    (record,) = caplog.records
    assert "do not work here (FileNotFoundError: [Errno 2] No such file" in record.getMessage()
    assert "C compiler on the path" in record.getMessage()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")], ids=str)
def test_a_trial_without_memory_is_none(error, monkeypatch):
    """Whether torch says so, or the driver, which loads a program."""
    monkeypatch.setattr(syncbn.kernels, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        in_triton(3)
    monkeypatch.setattr(in_triton(), "problem", lambda device: None)
    assert in_triton(3) is in_triton()


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch, caplog):
    """A kernel cannot be loaded then; what failed for that reason would count as a GPU on which none works."""
    kernels, capturing, tried = in_triton(), [True, True, False], []
    monkeypatch.setattr(syncbn.kernels, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.pop(0))
    monkeypatch.setattr(kernels, "problem", tried.append)
    assert [in_triton(3), in_triton(3)] == [None, None]
    assert tried == [] == caplog.records
    assert [in_triton(3), in_triton(3)] == [kernels, kernels]
    assert tried == ["cuda:3"]


@not_interpreted
def test_nothing_compiles_for_a_gpu_that_they_were_never_run_on(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert in_triton().problem("cpu") == "they were never run on an AMD GPU"


SHARED = [(2, 3, 1), (7, 2048, 49), (2**27, 16, 1), (3, 16, 2**26)]
SHARED += [(1, 1, 2**31), (2**31 - 1, 1, 1), (2**31 - 4096, 1, 1), (plans.WIDE - 1, 1, 1)]


@pytest.mark.parametrize("contiguous_channels", [True, False])
@pytest.mark.parametrize("shape", SHARED)
def test_how_a_tensor_is_shared_out(shape, contiguous_channels):
    """Every tile is somebody's, nobody adds too many in float32, teams are whole, and positions reach beyond the last tile."""
    kernels = in_triton().plans
    n, c, s = (shape[0] * shape[2], shape[1], 1) if contiguous_channels else shape
    for number, itemsize in itertools.product(range(2), (2, 4)):
        plan = kernels.planned(n, c, s, itemsize, kernels.shares(s, itemsize)[number])
        *_, tiles, splits = plan.numbers
        cut, blocks = plan.cut, math.ceil(c / plan.cut.BLOCK_C)
        positions = tiles * cut.BLOCK_P if cut.IS_ROWS else tiles // n * cut.BLOCK_P
        assert (n if cut.IS_ROWS else s) <= positions < (n if cut.IS_ROWS else s) + cut.BLOCK_P
        assert plan.grid == (blocks * splits, 1, 1)
        assert math.ceil(tiles / splits) <= kernels.TILES
        teams = math.ceil(splits / plan.team)
        assert max(plan.team, teams) <= max(kernels.TEAM, math.ceil(math.sqrt(splits)))
        assert splits == 1 or (plan.counters, plan.partials) == (blocks * (1 + teams), 2 * c * (splits + teams))
        if not cut.IS_WIDE:
            ahead = 5 * splits  # tiles whose positions a program has before it is there, past its last one too
            assert positions + (1 + ahead) * cut.BLOCK_P < 2**31
            assert tiles + ahead < 2**31


def what_triton_looks_at(parameter, value):
    """What a program is compiled for: a type, a constant, of an integer its size, whether it is 1 and whether 16 divides it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if parameter.is_constexpr or value is None:
        return value
    if isinstance(value, float):
        return float
    return value < 2**31, not parameter.do_not_specialize and (value == 1, value % 16 == 0)


class Program:
    """Stands for one that Triton compiles when it has to, and for what it compiled."""

    def __init__(self, kernel):
        self.kernel, self.__name__ = kernel, kernel.__name__
        self.compiled = set()
        self.given = ()  # to the launch: tensors, whose addresses are all that a compiled one gets

    def looks(self, arguments):
        return tuple(itertools.starmap(what_triton_looks_at, zip(self.kernel.params, arguments, strict=True)))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.compile(self.looks(arguments))

    def compile(self, looks):
        self.compiled.add(looks)
        return SimpleNamespace(run=functools.partial(self.launch, looks), function="of the driver", packed_metadata="packed")

    def launch(self, looks, *given):
        blocks, y, z, stream, function, metadata, *hooks = given[:9]
        arguments = given[9:]
        assert (y, z, stream, function, metadata, hooks) == (1, 1, 0, "of the driver", "packed", [None] * 3)
        assert 1 <= blocks <= 924
        assert self.looks(self.given) == looks, "launched for other arguments than it was compiled for"
        assert [given.data_ptr() if isinstance(given, torch.Tensor) else given for given in self.given] == list(arguments)


@pytest.fixture
def compiled(monkeypatch):
    kernels = in_triton()
    stand_ins = [Program(getattr(kernels.programs, name)) for name in FUNCTIONS]
    launch = kernels.launch

    def watched(program, x, plan, tensors, more=(), constants=()):
        program.given = (*tensors, *more, *plan.numbers, *constants, *plan.cut)
        launch(program, x, plan, tensors, more, constants)

    monkeypatch.setattr(kernels, "launch", watched)
    for program in stand_ins:
        monkeypatch.setattr(kernels.programs, program.kernel.__name__, program)
    monkeypatch.setattr(kernels, "_launchers", {})
    return lambda: [len(program.compiled) for program in stand_ins]


def step(x, affine=None, running=None, kernels=None):
    kernels = kernels or in_triton()
    affine = Affine(None, None, 1e-5, True, x) if affine is None else affine
    message = kernels.moments(x)
    _, saved = kernels.normalize(x, message, affine, running)
    kernels.gradient_sums(x, x, saved)
    kernels.input_gradient(x, x, saved, message[:-1])


@not_interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("space", [(), (7, 7), (8, 8), (40, 40)], ids=str)
def test_no_size_of_a_batch_compiles_programs_of_its_own(space, layout, compiled):
    for n in (1, 2, 3, 5, 16, 17, 32, 47, 100):
        step(batches.lay_out(torch.empty(n, 32, *space), layout))
    assert compiled() == [1, 1, 1, 1]


def all_that_differs() -> Iterator[tuple[torch.Tensor, Affine, Running | None]]:
    """Every pair of what makes the arguments of two launches differ, twice."""
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
    for shape, dtype, layout, offset, parameters, momentum, eps, fused in [*cases, *cases]:
        x = torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)
        c, residual = shape[1], None
        if layout == "channels_last":
            x = batches.lay_out(x, layout)
        if fused == "add relu":
            residual = torch.empty_like(x)
        vector = None if parameters is None else torch.empty(c + offset, dtype=parameters)[offset:]
        running = None if momentum is None else Running(torch.empty(c), torch.empty(c), torch.tensor(0), momentum)
        yield x, Affine(vector, vector, eps, fused != "none", residual), running


@not_interpreted
@pytest.mark.parametrize("value", [1e-5, 0.5, math.inf])
def test_a_number_of_numpy_compiles_as_one_of_python(value):
    """Triton knows no others; its parts add up to it."""
    for kind in (np.float32, np.float64, float):
        parts = in_triton()._pair(kind(value))
        assert [type(part) for part in parts] == [float, float]
        assert sum(parts) == kind(value)


@not_interpreted
def test_what_it_compiles_for_some_arguments_is_launched_for_no_others(compiled, monkeypatch):
    """Every pair of all that makes arguments differ, twice, the second time by what was compiled."""
    for x, affine, running in all_that_differs():
        step(x, affine, running)
    for offset in (0, 4, 8):  # of 2 bytes: 16 and then 8 divide the address
        step(torch.empty(6 * 48 + offset, dtype=torch.bfloat16)[offset:].view(6, 48))
    assert min(compiled()) > 10
    monkeypatch.setattr(in_triton().plans, "WIDE", 0)
    monkeypatch.setattr(in_triton().plans, "of", functools.cache(in_triton().plans.of.__wrapped__))
    for planes in ((2**31 - 1, 1, 1), (2**31, 1, 1), (2, 1, 2**30), (1, 1, 2**31)):
        monkeypatch.setattr(in_triton(), "planes", lambda x, planes=planes: planes)
        step(torch.empty(6, 1))


@not_interpreted
@pytest.mark.parametrize("hooked", [None, "launch_enter_hook", "launch_exit_hook"])
def test_what_it_compiles_is_launched_as_triton_would(hooked, monkeypatch):
    """Up to the driver; and where somebody has a hook, by Triton itself."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = in_triton()
    x, dx, message = torch.ones(4, 32, 20, 20), torch.empty(4, 32, 20, 20), torch.ones(65, dtype=torch.float64)
    plan = kernels.plans.of(4, 32, 400, 4).elements
    program = kernels.programs.input_gradient
    pointers = {"dy": "*fp32", "x": "*fp32", "dx": "*fp32", "message": "*fp64", "statistics": "*fp64"}
    signature = {name: {**SIZES, **pointers}.get(name, "constexpr") for name in program.arg_names}
    constants = {"weight": None, "bias": None, "RELU": False, **plan.cut._asdict()}
    compiled = triton.compile(ASTSource(program, signature, constants), GPUTarget("cuda", 90, 32), kernels.OPTIONS)
    launched: list[tuple[object, ...]] = []
    stand_ins = {"module": "loaded", "function": "of the driver", "_run": lambda *given: launched.append(given)}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(compiled, name, stand_in)
    stand_in = mock.MagicMock(__name__="input_gradient")
    stand_in.__getitem__.return_value.return_value = compiled
    monkeypatch.setattr(kernels, "_launchers", {})
    tensors = (x, x, dx, message, message, None, None)
    kernels.launch(stand_in, x, plan, tensors, (), (False,))
    assert stand_in.__getitem__.call_count == 1
    assert launched == [], "Triton launches what it compiles"
    if hooked:
        monkeypatch.setattr(getattr(triton.knobs.runtime, hooked), "calls", [lambda metadata: None])
    kernels.launch(stand_in, x, plan, tensors, (), (False,))
    assert stand_in.__getitem__.call_count == 1
    compiled[plan.grid](*launched[0][9:], stream=0)
    by_us, by_triton = launched
    assert by_us[:6] == by_triton[:6] == (*plan.grid, 0, "of the driver", compiled.packed_metadata)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    assert by_us[9:] == by_triton[9:] == (*addresses, *plan.numbers, False, *plan.cut)
    assert by_us[7:9] == (by_triton[7:9] if hooked else (None, None))
    assert (by_us[6] is None) == (hooked is None), "the metadata are for hooks"


@not_interpreted
def test_the_trial_of_a_gpu_compiles_and_launches_as_training_does(compiled, monkeypatch):
    """Triton itself launches what it compiles; what comes after that is ours to try as well."""
    assert in_triton().problem("cpu") is None
    monkeypatch.setattr(in_triton(), "_launchers", {})
    monkeypatch.setattr(Program, "launch", mock.Mock(side_effect=TypeError("other arguments")))
    assert in_triton().problem("cpu").startswith("TypeError: other arguments;")


SIZES = {"n": "i32", "c": "i32", "s": "i32", "tiles": "i32", "splits": "i32"}
STATISTICS = {"message": "*fp64", "statistics": "*fp64"}
MERGE = {"message": "*fp64", "partials": "*fp64", "arrived": "*i32", "team": "i32"}
FLOATS = dict.fromkeys(("eps", "eps_rest", "momentum", "momentum_rest"), "fp32")
VECTORS = ("weight", "bias", "running_mean", "running_var")
OPTIONAL = (*VECTORS, "tracked", "residual", "y", "passed_dy")


# The mean as float32 and wide again, then what that leaves of it.
REST_OF_THE_MEAN = re.compile(
    r"cvt\.rn\.f32\.f64\s+(%\w+), (%\w+);.*cvt\.f64\.f32\s+(%\w+), \1;.*sub(?:\.rn)?\.f64\s+%\w+, \2, \3;", re.DOTALL
)


def programs_at_once(made, directory: Path) -> int:
    """How many of a compiled program an H100 or H200 holds: 132 multiprocessors, each of 65536 registers and 227 kB."""
    import triton

    binary = directory / "program.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+)", said)
    assert found is not None, said
    threads = 32 * made.metadata.num_warps
    registers = threads * 8 * math.ceil(int(found[1]) / 8)
    return 132 * min(65536 // registers, 227 * 1024 // (made.metadata.shared + 1024), 2048 // threads)


@not_interpreted
@pytest.mark.parametrize("fused", batches.FUSED)
@pytest.mark.parametrize(
    ("space", "element", "wide", "aligned"),
    [
        ("rows", "*bf16", False, True),
        ("rows", "*fp32", False, True),
        ("planes", "*fp32", False, True),
        ("short", "*fp32", False, True),
        ("short", "*bf16", False, True),
        ("rows", "*fp16", False, True),
        ("planes", "*bf16", False, True),
        ("short", "*bf16", False, False),
        ("short", "*fp32", True, True),
    ],
)
def test_every_program_compiles_for_a_gpu(space, element, wide, aligned, fused, tmp_path):
    """And as many as share a large tensor run at once: else the last few would take a time of their own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from syncbn.kernels import programs

    dtype = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16}[element]
    s = {"rows": 1, "planes": 3136, "short": 49}[space]
    shares = in_triton().plans.shares(s, dtype.itemsize)
    forward, backward = {"x": element, "y": element, **STATISTICS, **FLOATS}, {"dy": element, "x": element}
    sums = {**backward, "statistics": "*fp64", "dweight": "*fp32", "dbias": "*fp32", **MERGE}
    all_vectors = dict.fromkeys(VECTORS, "*fp32") | {"tracked": "*i64"}
    by_x = {"weight": "*bf16", "bias": "*fp32"} if fused == "relu" else {}
    added = {"residual": element} if fused == "add relu" else {}
    by_y = {"y": element, "passed_dy": element} if fused == "add relu" else {}
    sources = [
        (programs.moments, {"x": element, **MERGE}, {}),
        (programs.normalize, forward | all_vectors | added, {"RELU": fused != "none"}),
        (programs.normalize, forward | all_vectors | added, {"RELU": fused != "none", "IS_CUMULATIVE": True}),
        (programs.normalize, forward | added, {"RELU": fused != "none"}),
        (programs.gradient_sums, sums | by_x | by_y, {"RELU": fused == "relu"}),
        (
            programs.input_gradient,
            {**backward, "dx": element, **STATISTICS, "weight": "*bf16"} | by_x,
            {"RELU": fused == "relu"},
        ),
    ]
    for program, pointers, more in sources:
        share = shares[program in (programs.normalize, programs.input_gradient)]
        cut = in_triton().plans.tiling(256, s, dtype.itemsize, wide, share)
        constants = {"IS_CUMULATIVE": False, **cut._asdict()}
        signature = {name: {**SIZES, **pointers}.get(name, "constexpr") for name in program.arg_names}
        absent = dict.fromkeys(set(OPTIONAL) - set(pointers))
        known = {name: (absent | constants | more)[name] for name, kind in signature.items() if kind == "constexpr"}
        at = [(place,) for place, kind in enumerate(signature.values()) if aligned and kind.startswith("*")]
        source = ASTSource(program, signature, known, {place: [["tt.divisibility", 16]] for place in at})
        made = triton.compile(source, GPUTarget("cuda", 90, 32), in_triton().OPTIONS)
        assert made.asm["cubin"]
        if program is programs.normalize:
            assert REST_OF_THE_MEAN.search(made.asm["ptx"]), (
                "of the mean as it is saved, and not of a product that was not rounded"
            )
        assert "approx" not in "".join(line for line in made.asm["ptx"].splitlines() if ".f64" in line)
        if program is programs.moments and space != "short":
            assert "cp.async" in made.asm["ptx"], "loads are under way while others are added"
        if aligned and not wide:
            held = programs_at_once(made, tmp_path)
            assert share.programs <= held, f"{program.__name__}: {share.programs} programs are more than a wave of {held}"
