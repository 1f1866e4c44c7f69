"""The compiled kernels: which tensors they take, threads, bits, memory, and what serves without them. Values: test_kernels."""

import collections
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn import equations, kernels
from syncbn.bench import memory
from syncbn.kernels import Affine, Running, Saved, aten, cpu, pick

needs_library = pytest.mark.skipif(cpu.library is None, reason="needs the compiled kernels")
needs_float16 = pytest.mark.skipif(torch.float16 not in cpu.DTYPES, reason="needs a processor that converts float16")
PLAIN = Affine(None, None, 0.0)


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def layer(channels: int, **options) -> syncbn.SyncBatchNorm:
    made = syncbn.SyncBatchNorm(channels, **options)
    made._force_sync = True
    return made


class Subclass(Tensor):
    pass


@needs_library
def test_what_the_library_reads_goes_by_it():
    assert {torch.bfloat16, torch.float32, torch.float64} <= set(cpu.DTYPES)  # float16 where the processor converts it
    for shape in [(4, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 5, 2, 2), (4, 3, 1, 1), (0, 3, 5), (4, 3, 0), (2, 3, 2, 2, 2, 2)]:
        for layout in ("contiguous", "channels_last"):
            for dtype in cpu.DTYPES:
                assert pick(laid_out(torch.ones(shape, dtype=dtype), layout)) is cpu


@needs_library
def test_what_the_library_cannot_read_goes_by_aten():
    x = torch.ones(4, 3, 5)
    for other in (
        x[..., ::2],
        x.transpose(0, 1),
        x[:1].expand_as(x),
        torch._neg_view(x),
        x.as_subclass(Subclass),
        x.to_mkldnn(),
    ):
        assert pick(other) is aten
    with FlopCounterMode(display=False):  # a dispatch mode has to see the operators
        assert pick(x) is aten
    assert torch.func.vmap(lambda row: row * (pick(row) is aten))(x).equal(x)


@needs_library
@needs_float16
def test_a_processor_without_float16_leaves_it_to_aten(monkeypatch):
    x, weight = torch.randn(6, 4), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    expected, _ = cpu.normalize(x, cpu.moments(x), Affine(weight, None, 1e-5), None)
    monkeypatch.delitem(cpu.DTYPES, torch.float16)
    assert pick(x.half()) is aten
    assert pick(x) is cpu
    y, _ = cpu.normalize(x, cpu.moments(x), Affine(weight, None, 1e-5), None)
    torch.testing.assert_close(y, expected)


@needs_library
def test_a_gradient_of_any_layout():
    x = torch.randn(4, 3, 5, 2)
    dy = torch.randn(4, 3, 5, 2)
    _, saved = cpu.normalize(x, cpu.moments(x), PLAIN, None)
    expected = cpu.gradient_sums(dy, x, saved)
    dx = cpu.input_gradient(dy, x, saved, expected.message)
    transposed = dy.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (laid_out(dy, "channels_last"), transposed, torch._neg_view(-dy)):
        assert cpu.gradient_sums(other, x, saved).message.equal(expected.message)
        assert cpu.input_gradient(other, x, saved, expected.message).equal(dx)
    ones = cpu.gradient_sums(torch.ones(()).expand_as(x), x, saved).message[:3]
    assert ones.tolist() == [40.0] * 3
    zero = torch._efficientzerotensor(x.shape)
    assert cpu.gradient_sums(zero, x, saved).message.count_nonzero() == 0


@needs_library
def test_parameters_and_buffers_of_any_layout():
    x, every = torch.randn(6, 4, dtype=torch.float64), torch.arange(1.0, 9.0)
    second, half = every[::2], every[::2].contiguous()
    message = cpu.moments(x)
    results = []
    for weight, strided, count in itertools.product((half, second), (False, True), (torch.int64, torch.int32)):
        mean, var = (every.clone()[::2] if strided else half.clone() for _ in range(2))
        running = Running(mean, var, torch.tensor(3, dtype=count), None)
        y, saved = cpu.normalize(x, message, Affine(weight, weight, 1e-5), running)
        dx = cpu.input_gradient(x, x, saved, cpu.gradient_sums(x, x, saved).message)
        results.append((y, dx, mean, var, running.num_batches_tracked.long()))
    assert results[0][-1] == 4
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@needs_library
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_share_the_work(layout):
    x, dy = (laid_out(torch.randn(9, 70, 17, 13), layout) for _ in range(2))  # no number of threads divides it
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, saved = cpu.normalize(x, cpu.moments(x), PLAIN, None)
            sums = cpu.gradient_sums(dy, x, saved)
            results.append((y, saved.statistics, *sums, cpu.input_gradient(dy, x, saved, sums.message)))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


STEP = """
import os, re, torch, syncbn
from syncbn.kernels import cpu
torch.set_num_threads(2)
x = torch.empty(8, 64, 32, 32)
before = len(os.listdir("/proc/self/task"))
cpu.moments(x)
print("threads", len(os.listdir("/proc/self/task")) - before)
layer = syncbn.SyncBatchNorm2d(64)
layer._force_sync = True
layer(torch.randn(8, 64, 32, 32).requires_grad_()).square().sum().backward()
{more}
print("runtimes", len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read()))))
"""


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@needs_library
def test_one_openmp_runtime_is_loaded_and_the_threads_are_its():
    assert printed(STEP.format(more="")) == ["threads", "1", "runtimes", "1"]


def test_a_second_openmp_runtime_is_seen():
    pytest.importorskip("sklearn")
    assert int(printed(STEP.format(more="import sklearn.cluster").replace("cpu.moments(x)", ""))[-1]) > 1


FORK = """
import os, torch
from syncbn.kernels import cpu
torch.set_num_threads(2)
x = torch.randn(8, 64, 32, 32)
expected = cpu.moments(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.moments(x), expected) else 1)
print(os.waitpid(child, 0)[1])
"""


@needs_library
def test_a_process_forked_after_threads_ran_does_not_wait_for_them():
    assert printed(FORK) == ["0"]


def exceptions(seam, layout: str) -> int:
    """Of 10 000 channels, those whose float32 mean or variance depends on the number of shares."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 10_000, 7, generator=generator) * 1.7 + 0.9
    bits = []
    for shares in (1, 2, 3, 4):
        message = torch.stack([seam.moments(laid_out(share, layout)) for share in x.chunk(shares)]).sum(0)
        stats = equations.statistics(message)
        bits.append(torch.stack([stats.mean.float(), stats.var.float()]))
    return int(sum((other != bits[0]).any(0) for other in bits[1:]).clamp(max=1).sum())


@needs_library
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_have_the_same_float32_bits_for_any_number_of_shares(layout):
    assert exceptions(cpu, layout) == 0


def test_float32_sums_do_not_have_them():
    assert exceptions(aten, "contiguous") > 100


def saved_by(made: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        made(x)
    return found


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
def test_x_and_values_per_channel_are_all_that_is_saved(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    input_, *rest = saved_by(layer(3), x)
    assert input_.data_ptr() == x.data_ptr()
    assert sorted(t.untyped_storage().nbytes() for t in rest) == [4 * 3, 8 * 7]  # weight; statistics


def peak(made: nn.Module, x: Tensor) -> int:
    """Bytes that a forward and backward hold at most, beyond what there was."""
    dy, x.grad = torch.randn_like(x), None
    return memory.peak(lambda: made(x).backward(dy), x.device)


@needs_library
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_step_holds_no_more_memory_than_torchs(layout, monkeypatch):
    x = laid_out(torch.randn(8, 16, 32, 32), layout).requires_grad_()
    size = x.numel() * x.element_size()
    torchs, ours = peak(nn.BatchNorm2d(16), x), peak(layer(16), x)
    assert torchs >= 2 * size, "y and dx"
    assert ours <= torchs + 100 * 16, "beyond it only values per channel"
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    by_aten = peak(layer(16), x)
    assert by_aten > ours, "a temporary is seen"
    print(f"peak of a step over the size of x: {ours / size:.2f}, torch {torchs / size:.2f}, ATen {by_aten / size:.2f}")


@needs_library
def test_autograd_sees_that_buffers_moved():
    made = layer(3)
    versions = [b._version for b in made.buffers()]
    made(torch.randn(4, 3))
    assert [b._version for b in made.buffers()] == [v + 1 for v in versions]
    with torch.inference_mode():
        layer(3)(torch.randn(4, 3))


def test_without_the_library_aten_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "LIBRARY", cpu.LIBRARY.with_name("missing.so"))
    monkeypatch.setattr(cpu, "library", cpu.load())
    kernels.compiled.cache_clear()
    try:
        x = torch.randn(4, 3)
        for _ in range(3):
            layer(3)(x)
        assert pick(x) is aten
        assert [r.name for r in caplog.records] == ["syncbn"]
        assert "missing.so" in caplog.text
    finally:
        kernels.compiled.cache_clear()


CALLS = 75  # of functions of ours, 45 of them, in a step of a layer: where it is small they are what it costs


@needs_library
def test_a_step_dispatches_allocations_alone_and_calls_no_more_functions_than_counted():
    made = layer(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    called: list[str] = []

    def count(frame, event, argument):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if event == "call" and path.startswith(os.path.dirname(syncbn.__file__)):
            called.append(name)

    def step():
        made(x).sum().backward()

    step()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    assert 20 < len(called) <= CALLS, called
    dy = torch.randn(4, 3, 2, 2)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:  # older torch warns without
        torch.autograd.grad(made(x), (x, made.weight, made.bias), dy)
    dispatched = collections.Counter(event.name for event in seen.events() if event.name.startswith("aten::"))
    assert dispatched.pop("aten::empty_like") == 7, "two messages, y, statistics, dx, dweight and dbias"
    assert set(dispatched) <= {"aten::empty_strided", "aten::empty", "aten::fill_"}, "what allocates, and poisons"


@needs_library
def test_no_memory_is_an_error():
    x = torch.ones(2, 3)
    channels, address = 1 << 57, x.data_ptr()
    call = [1, channels, 1, 2, 1, 1, address, address, 0, address, address, address, 0, 0, 0, 0]
    with pytest.raises(MemoryError):
        cpu._check(cpu.library.syncbn_input_gradient(cpu.INPUT_GRADIENT.pack(*call)))
    with pytest.raises(MemoryError):
        cpu._check(cpu.library.syncbn_gradient_sums(cpu.GRADIENT_SUMS.pack(*call, 0, 0, 0, 0)))


def test_saved_has_what_the_library_reads():
    x = torch.randn(4, 3)
    _, saved = pick(x).normalize(x, pick(x).moments(x), PLAIN, None)
    assert isinstance(saved, Saved)
    assert (saved.statistics.dtype, saved.statistics.shape) == (torch.float64, (7,))
    assert os.path.basename(cpu.LIBRARY).startswith("_cpu")
