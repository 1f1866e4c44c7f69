"""The compiled kernels' values where size decides how they loop: results past the caches, rows by pages, halves by blocks."""

import oracle
import pytest
import tolerance
import torch
from batches import lay_out

from syncbn.kernels import Affine, Running, cpu

pytestmark = pytest.mark.skipif(cpu.library is None, reason="needs the compiled kernels")

LARGE = [  # 2^22 bytes of float32 and more
    ((2, 24, 152, 152), "contiguous"),
    ((2, 24, 152, 152), "channels_last"),
    ((2, 23, 155, 155), "contiguous"),  # no multiple of what is written at once
    ((2, 23, 155, 155), "channels_last"),
    ((520, 2056), "contiguous"),
]
ROWS = [((131, 300), "contiguous"), ((131, 1030), "contiguous"), ((3, 517, 9, 7), "channels_last")]
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
