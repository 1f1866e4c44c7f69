"""Every implementation of the compute seam, and the equations, against the oracle: all ranks in one process."""

import itertools
import math
from typing import NamedTuple

import batches
import oracle
import pytest
import tolerance
import torch
from allpairspy import AllPairs
from batches import Case, Result

from syncbn import equations
from syncbn.kernels import Affine, GradientSums, Running, aten, compiled, keep, pick


class Equations:
    """The equations behind the seam of the kernels."""

    moments = staticmethod(equations.moments)

    @staticmethod
    def normalize(x, message, affine, running):
        stats = equations.statistics(message)
        if running is not None:
            mean, var = equations.running_statistics(running.mean, running.var, stats, running.momentum)
            running.mean.copy_(mean)
            running.var.copy_(var)
        y = equations.normalize(x, stats, affine.weight, affine.bias, affine.eps, affine.relu, affine.residual)
        out = torch.empty_like(x).copy_(y)
        saved = torch.cat([stats.mean, equations.invstd(stats.var, affine.eps), stats.count.view(1)])
        return out, keep(affine, saved, out)

    @staticmethod
    def unpacked(saved):
        c = saved.statistics.numel() // 2
        mean, invstd, count = saved.statistics.split([c, c, 1])
        return equations.Statistics(mean, invstd.pow(-2), count)

    @staticmethod
    def passed(dy, x, saved):
        stats = Equations.unpacked(saved)
        y = equations.normalize(x, stats, saved.weight, saved.bias, 0.0) if saved.y is None else saved.y
        return torch.where(y <= 0, 0, dy) if saved.relu else dy

    @staticmethod
    def gradient_sums(dy, x, saved):
        dy = Equations.passed(dy, x, saved)
        stats = Equations.unpacked(saved)
        message = equations.gradient_sums(dy, x, stats.mean)
        sum_dy, sum_dy_xmu = message.chunk(2)
        return GradientSums(message, sum_dy_xmu * equations.invstd(stats.var, 0.0), sum_dy, None if saved.y is None else dy)

    @staticmethod
    def input_gradient(dy, x, saved, message):
        stats = Equations.unpacked(saved)
        dy = dy if saved.y is not None else Equations.passed(dy, x, saved)
        return torch.empty_like(x).copy_(equations.input_gradient(dy, x, stats, saved.weight, 0.0, message))


class Picked:
    """What a layer takes: the compiled kernels where the input lies in memory as they read it, else the others."""

    moments = staticmethod(lambda x: pick(x).moments(x))
    normalize = staticmethod(lambda x, *rest: pick(x).normalize(x, *rest))
    gradient_sums = staticmethod(lambda dy, x, saved: pick(x).gradient_sums(dy, x, saved))
    input_gradient = staticmethod(lambda dy, x, *rest: pick(x).input_gradient(dy, x, *rest))


KERNELS = {
    "compiled": pytest.param(Picked, marks=pytest.mark.skipif(compiled() is None, reason="needs the compiled kernels")),
    "aten": aten,
    "equations": Equations,
}
every_kernel = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
real_kernel = pytest.mark.parametrize("kernels", [KERNELS["compiled"], aten], ids=["compiled", "aten"])


def over_shares(kernels, case: Case, seed: int = 0) -> list[Result]:
    """What the ranks of `case` compute together."""
    xs, dys = batches.make(case, seed)
    weight, bias = batches.parameters(case, seed)
    message = torch.stack([kernels.moments(x) for x in xs]).sum(0)
    assert message.shape == (2 * batches.CHANNELS + 1,)
    assert message.dtype == torch.float64
    applied = []
    added = batches.residuals(case, seed) or [None] * case.world
    for x, residual in zip(xs, added, strict=True):
        running = Running(*batches.buffers(case, seed), None, batches.momentum_of(case))
        affine = Affine(weight, bias, case.eps, case.fused != "none", residual)
        applied.append((*kernels.normalize(x, message, affine, running), running))
    sums = [kernels.gradient_sums(dy, x, saved) for dy, x, (_, saved, _) in zip(dys, xs, applied, strict=True)]
    total = torch.stack([s.message for s in sums]).sum(0)
    return [
        Result(
            y,
            kernels.input_gradient(dy if s.dy is None else s.dy, x, saved, total),
            None if weight is None else s.weight.to(weight.dtype),
            None if bias is None else s.bias.to(bias.dtype),
            running.mean,
            running.var,
            s.dy,
        )
        for x, dy, s, (y, saved, running) in zip(xs, dys, sums, applied, strict=True)
    ]


PRODUCT = [
    Case(world, shares, space, dtype, layout)
    for world, shares, space, dtype, layout in itertools.product(
        (1, 2, 3, 4), batches.SHARES, batches.SPACES, batches.DTYPES, batches.LAYOUTS
    )
]


@every_kernel
@pytest.mark.parametrize("space", batches.SPACES)
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_every_split_dtype_and_layout_equals_the_whole_batch(kernels, space, dtype):
    cases = [case for case in PRODUCT if case.space == space and case.dtype == dtype]
    assert len(cases) == 4 * len(batches.SHARES) * len(batches.LAYOUTS)
    for case in cases:
        batches.check(case, over_shares(kernels, case))


@every_kernel
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_affine_parameters_and_eps(kernels, affine, eps):
    for dtype, param_dtype in itertools.product(batches.DTYPES, (None, *batches.DTYPES)):
        case = Case(3, dtype=dtype, param_dtype=param_dtype, affine=affine, eps=eps)
        batches.check(case, over_shares(kernels, case))


FUSED_AXES = {
    "world": [1, 2, 3, 4],
    "shares": list(batches.SHARES),
    "space": list(batches.SPACES),
    "layout": batches.LAYOUTS,
    "affine": ["both", "weight", "bias", "none"],
    "param_dtype": [None, torch.float32, torch.bfloat16],
}


@every_kernel
@pytest.mark.parametrize("fused", ["relu", "add relu"])
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_with_a_relu_behind_it(kernels, dtype, fused):
    for row in AllPairs(list(FUSED_AXES.values())):
        case = Case(**dict(zip(FUSED_AXES, row, strict=True)), dtype=dtype, fused=fused)
        batches.check(case, over_shares(kernels, case))


@real_kernel
@pytest.mark.parametrize("fused", ["relu", "add relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_the_relu_of_backward_is_that_of_forward_to_the_bit(kernels, dtype, layout, fused):
    check_bits_of_the_relu(kernels, (6, 32, 40, 13), dtype, layout, fused)


def check_bits_of_the_relu(kernels, shape, dtype, layout, fused, device="cpu"):
    """dβ of dy = 1 counts the values that passed, of which in each channel many are 0 but for the last bits of two terms."""
    steps, channels = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)), shape[1]
    x = batches.place(batches.lay_out((1 + steps.double() * torch.finfo(dtype).eps).to(dtype), layout), device)
    weight = torch.full((channels,), 0.1, device=device)
    mean, var = x.double().mean([0, 2, 3]), x.double().var([0, 2, 3], correction=0)
    bias = (mean - x[0, :, 0, 0]) * (var + 1e-5).rsqrt() * weight.double()
    residual, ones = torch.zeros_like(x) if fused == "add relu" else None, torch.ones_like(x)
    y, saved = kernels.normalize(x, kernels.moments(x), Affine(weight, bias, 1e-5, True, residual), None)
    sums = kernels.gradient_sums(ones, x, saved)
    passed = (y > 0).double().sum([0, 2, 3])
    assert 0 < passed.sum() < x.numel()
    assert torch.equal(sums.message[:channels], passed)
    zeros = torch.zeros(2 * channels, dtype=torch.float64, device=device)
    dx = kernels.input_gradient(ones if sums.dy is None else sums.dy, x, saved, zeros)
    assert torch.equal(dx != 0, y > 0)


@real_kernel
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_what_is_no_number_passes_a_relu_as_in_torch(kernels, dtype, sign, added):
    x = torch.randn(40, 3).to(dtype)
    x[7, 1] = math.copysign(float("nan"), sign)
    affine = Affine(None, None, 1e-5, True, torch.zeros(40, 3, dtype=dtype) if added else None)
    y, saved = kernels.normalize(x, kernels.moments(x), affine, None)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()
    assert (y[:, ::2] >= 0).all()
    assert not y[:, ::2].signbit().any(), "zeros are positive"
    assert kernels.gradient_sums(torch.ones(40, 3, dtype=dtype), x, saved).message[1].item() == 40


@every_kernel
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("form", ["NCHW", "NHWC", "NC", "blank first sample"])
def test_precision_where_the_mean_is_far_from_zero(kernels, ratio, world, form):
    """The variance is good to 1e-6 (1e-5 behind a blank sample), y and dx to 5e-7 of their largest value, whatever mean/std."""
    generator = torch.Generator().manual_seed(3)
    channels, rows = 3, 25088
    x = (torch.randn(rows, channels, generator=generator).double() + ratio).float()
    dy = (torch.randn(rows, channels, generator=generator) + 0.7 * (x.double() - ratio) + 0.2).float()
    blank = form == "blank first sample"
    if blank:
        x[0] = 0
    shares, dys = list(x.chunk(world)), list(dy.chunk(world))
    if form in ("NCHW", "NHWC"):
        memory = torch.channels_last if form == "NHWC" else torch.contiguous_format
        shares, dys = (
            [t.reshape(32 // world, 28, 28, channels).permute(0, 3, 1, 2).contiguous(memory_format=memory) for t in ts]
            for ts in (shares, dys)
        )
    expected = oracle.batch_norm(shares, dys)
    message = torch.stack([kernels.moments(t) for t in shares]).sum(0)
    stats = equations.statistics(message)
    off = ((stats.var - expected.var) / expected.var).abs().max().item()
    assert off <= (1e-5 if blank else 1e-6), f"variance off by {off:.2g}"
    if blank:
        return
    applied = [kernels.normalize(t, message, Affine(None, None, 1e-5), None) for t in shares]
    sums = [kernels.gradient_sums(g, t, saved) for g, t, (_, saved) in zip(dys, shares, applied, strict=True)]
    total = torch.stack([s.message for s in sums]).sum(0)
    for rank, (t, g, (y, saved)) in enumerate(zip(shares, dys, applied, strict=True)):
        for name, got, want in (
            ("y", y, expected.y[rank]),
            ("dx", kernels.input_gradient(g, t, saved, total), expected.dx[rank]),
        ):
            off = tolerance.error(got, want) / want.abs().max().item()
            assert off <= 5e-7, f"{name} of rank {rank} off by {off:.2g} of its largest value"


class Moved(NamedTuple):
    mean: float
    var: float
    batches: int


def _moved(kernels, values: list[float], momentum: float | None = 0.5) -> Moved:
    """Running statistics (3, 7 before) and batch count (4 before) after one batch of a single channel."""
    running = Running(torch.full((1,), 3.0), torch.full((1,), 7.0), torch.tensor(4), momentum)
    x = torch.tensor(values).reshape(-1, 1)
    kernels.normalize(x, kernels.moments(x), Affine(None, None, 1e-5), running)
    return Moved(running.mean.item(), running.var.item(), int(running.num_batches_tracked))


@real_kernel
def test_counts_of_zero_and_one_keep_the_buffers_finite(kernels):
    assert _moved(kernels, []) == Moved(3.0, 7.0, 4)
    assert _moved(kernels, [5.0]) == Moved(4.0, 7.0, 5)
    assert _moved(kernels, [5.0, 7.0]) == Moved(4.5, 4.5, 5)
    assert _moved(kernels, [], None) == Moved(3.0, 7.0, 4)
    assert _moved(kernels, [8.0, 13.0], None) == pytest.approx(Moved(3 + (10.5 - 3) / 5, 7 + (12.5 - 7) / 5, 5), rel=1e-6)


@real_kernel
@pytest.mark.parametrize("momentum", [1.0, None])
def test_a_momentum_of_one_leaves_nothing_of_what_was_before(kernels, momentum):
    """As where a network that has diverged is calibrated anew."""
    running = Running(torch.full((1,), 1e30), torch.full((1,), 1e30), torch.tensor(0), momentum)
    x = torch.tensor([[5.0], [7.0]])
    kernels.normalize(x, kernels.moments(x), Affine(None, None, 1e-5), running)
    assert (running.mean.item(), running.var.item()) == (6.0, 2.0)


@real_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_stays_in_its_channel_as_in_torch(kernels, value):
    x = torch.randn(40, 3)
    for row in range(0, 40, 7):  # among the samples of the pivot, and not
        planted = x.clone()
        planted[row, 1] = value
        for laid_out in (planted, planted.t().contiguous()[None]):
            y, _ = kernels.normalize(laid_out, kernels.moments(laid_out), Affine(None, None, 1e-5), None)
            assert y[:, 1].isnan().all()
            assert y[:, ::2].isfinite().all()
            s1 = kernels.moments(laid_out)[1].item()
            assert s1 == value or (value != value and s1 != s1), "the sum is that of the values"
