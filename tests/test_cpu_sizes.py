"""The compiled kernels' values where size decides how they loop: results past the caches, rows by pages, halves by strips."""

import oracle
import pytest
import tolerance
import torch
from batches import lay_out

from syncbn import equations
from syncbn.kernels import Affine, Running, cpu

pytestmark = pytest.mark.skipif(cpu.library is None, reason="needs the compiled kernels")

LARGE = [  # 2^22 bytes of float32 and more
    ((2, 24, 152, 152), "contiguous"),
    ((2, 24, 152, 152), "channels_last"),
    ((2, 23, 155, 155), "contiguous"),  # no multiple of what is written at once
    ((2, 23, 155, 155), "channels_last"),
    ((520, 2056), "contiguous"),
]
ROWS = [((131, 300), "contiguous"), ((131, 1030), "contiguous"), ((9, 2067), "contiguous"), ((3, 517, 9, 7), "channels_last")]
PLANES = [((3, 40, 7, 7), "contiguous"), ((2, 3, 50, 50), "contiguous"), ((2, 70, 4, 4), "contiguous")]


@pytest.mark.parametrize("form", ["batch norm", "relu", "add relu"])
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [(*case, torch.float32) for case in LARGE]
    + [(*case, dtype) for case in ROWS + PLANES for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)],
)
def test_values(shape, layout, dtype, form):
    if dtype not in cpu.DTYPES:
        pytest.skip(f"the processor does not convert {dtype}")
    torch.manual_seed(0)
    channels = shape[1]
    x, dy, residual = (lay_out(torch.randn(shape) * 2 + shift, layout).to(dtype) for shift in (3, 0, 0))
    added = residual if form == "add relu" else None
    weight, bias = torch.randn(channels), torch.randn(channels)
    before = oracle.batch_norm([x], [dy], weight, bias, eps=1e-3, residuals=None if added is None else [added])
    if form != "batch norm":  # a rounding of nearly 0 decides for or against the gradient
        dy = torch.where(before.y[0].abs() < 0.05 if dtype.itemsize == 2 else before.y[0].abs() < 1e-4, 0, dy)
        dy = lay_out(dy, layout)
    relu = form != "batch norm"
    expected = oracle.batch_norm([x], [dy], weight, bias, eps=1e-3, relu=relu, residuals=None if added is None else [added])

    running = Running(torch.zeros(channels), torch.ones(channels), torch.tensor(0), 0.1)
    y, saved = cpu.normalize(x, cpu.moments(x), Affine(weight, bias, 1e-3, relu, added), running)
    sums = cpu.gradient_sums(dy, x, saved)
    dx = cpu.input_gradient(dy if sums.dy is None else sums.dy, x, saved, sums.message)

    tolerance.check("y", y, expected.y[0], ratio=2)
    tolerance.check("dx", dx, expected.dx[0], ratio=2)
    for name, result, values in (("weight", sums.weight, expected.dweight[0]), ("bias", sums.bias, expected.dbias[0])):
        tolerance.check(name, result, values, ratio=2)
    tolerance.check("running_mean", running.mean, expected.running_mean, ratio=2)
    tolerance.check("running_var", running.var, expected.running_var, ratio=2)
    if expected.dresidual is not None:
        tolerance.check("dresidual", sums.dy, expected.dresidual[0], ratio=2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 512, 512), (1, 1, 2048, 2048), (16_000_000, 1)], ids=str)
def test_the_variance_of_many_values_whose_mean_is_10_000_standard_deviations(shape, seed):
    """Good to 1e-6, as README.md has it, however many values a channel has."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1e4
    _, var, n = equations.statistics(cpu.moments(x))
    expected = x.double().var(correction=0)
    assert n == x.numel()
    assert abs(var.item() / expected.item() - 1) < 1e-6


@pytest.fixture(params=[512, 256, 128], ids="{} bits".format)
def bits(request):
    cpu.library.syncbn_use_bits(request.param)
    yield request.param
    cpu.library.syncbn_use_bits(512)


@pytest.mark.parametrize("form", ["batch norm", "relu", "add relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_instruction_set_has_the_values_of_rows_and_planes_of_any_length(bits, dtype, form):
    """Strips, what is left over of them, and strips that begin in the one before."""
    if dtype not in cpu.DTYPES or (dtype == torch.float16 and bits == 128):
        pytest.skip(f"no {dtype} there")
    torch.manual_seed(0)
    for length in (1, 2, 15, 16, 17, 18, 19, 31, 32, 33, 35, 64, 67):
        for shape in ((45, length), (24, 3, length)):  # as many that dx is no small difference
            x, dy, residual = ((torch.randn(shape) * 2).to(dtype) for _ in range(3))
            added = residual if form == "add relu" else None
            weight, bias = torch.randn(2, shape[1]).unbind()
            y, saved = cpu.normalize(x, cpu.moments(x), Affine(weight, bias, 1e-3, form != "batch norm", added), None)
            passed = dy if form == "batch norm" else torch.where(y > 0, dy, 0)
            sums = cpu.gradient_sums(dy, x, saved)
            dx = cpu.input_gradient(dy if sums.dy is None else sums.dy, x, saved, sums.message)

            var, mean = torch.var_mean(x.double().transpose(0, 1).flatten(1), 1, correction=0)
            ratio = float((mean.abs() / (var + 1e-3).sqrt()).max())
            expected = oracle.batch_norm([x], [passed], weight, bias, eps=1e-3)
            values = expected.y[0] if added is None else expected.y[0] + added.double()
            tolerance.check("y", y, values if form == "batch norm" else values.relu(), ratio=ratio)
            tolerance.check("dx", dx, expected.dx[0], ratio=ratio)
            tolerance.check("weight", sums.weight, expected.dweight[0], ratio=ratio)
            tolerance.check("bias", sums.bias, expected.dbias[0], ratio=ratio)
            assert sums.dy is None or torch.equal(sums.dy, passed), shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_instruction_set_rounds_halves_alike(bits, dtype):
    """Ties, overflow, subnormal results, infinity; the ReLU's zeros, its NaN, and what it lets pass on the way back.

    In whole strips and in what is left over of them.
    """
    if dtype not in cpu.DTYPES or (dtype == torch.float16 and bits == 128):
        pytest.skip(f"no {dtype} there")
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    for shape in ((65536, 1), (2048, 32), (1, 1, 65536), (8192, 1, 8)):
        x, channels = halves.reshape(shape), shape[1]
        message = torch.tensor([0.0] * channels + [1.0] * (channels + 1), dtype=torch.float64)  # mean 0, variance 1
        bias = torch.full((channels,), -0.0)
        for factor in (1.0, 1.0009765625, -1 / 3, 2.0**-9, 1000.0, 2.0**-20, 2.0**-126):
            for relu in (False, True):
                weight = torch.full((channels,), factor, dtype=torch.float64)
                y, saved = cpu.normalize(x, message, Affine(weight, bias, 0.0, relu), None)
                expected = (x.double() * factor).to(dtype)
                expected = torch.where(expected < 0, 0, expected) if relu else expected
                same = (y == expected) | (y.isnan() & expected.isnan())
                assert same.all(), (x[~same][:5], y[~same][:5], expected[~same][:5])
                if relu:
                    assert not y[y == 0].signbit().any()
                    sums = cpu.gradient_sums(torch.ones_like(x), x, saved)
                    passed = ((y > 0) | y.isnan()).transpose(0, 1).flatten(1).sum(1)
                    assert sums.bias.equal(passed.to(sums.bias.dtype)), factor
