"""The equations by themselves: the paper's derivatives, autograd, and the laws of merging, in float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn import equations
from syncbn.equations import channel_dims, per_channel
from syncbn.kernels import aten

SHAPES = [(7, 3), (4, 5, 6), (3, 2, 4, 5), (2, 3, 2, 3, 4)]
EPS = [1e-5, 1e-3, 0.1]


def batch(shape, seed=0):
    """x, dy, weight, bias in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return normal(shape) * 2 + 1, normal(shape), normal(shape[1]), normal(shape[1])


def assert_near(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", EPS)
def test_the_collapsed_backward_is_the_papers_six_derivatives_and_autograds(shape, eps):
    x, dy, weight, bias = batch(shape)
    dims, m = channel_dims(x), x.numel() // x.shape[1]
    bc = functools.partial(per_channel, x=x)
    mean, var = x.mean(dims), x.var(dims, correction=0)
    inv = (var + eps).rsqrt()

    dxhat = dy * bc(weight)
    dvar = (dxhat * (x - bc(mean))).sum(dims) * -0.5 * inv**3
    dmean = -(dxhat.sum(dims) * inv) + dvar * (-2 * (x - bc(mean))).sum(dims) / m
    dx = dxhat * bc(inv) + bc(dvar) * 2 * (x - bc(mean)) / m + bc(dmean) / m
    dweight = (dy * (x - bc(mean)) * bc(inv)).sum(dims)
    dbias = dy.sum(dims)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    stats = equations.statistics(equations.moments(x))
    y = equations.normalize(x, stats, weight, bias, eps)
    own = torch.autograd.grad(y, leaves, dy)
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.1, eps)
    torchs = torch.autograd.grad(expected, leaves, dy)
    assert_near(y, expected)
    stats = equations.Statistics(*(t.detach() for t in stats))
    message = equations.gradient_sums(dy, x.detach(), stats.mean)
    written = equations.input_gradient(dy, x.detach(), stats, weight.detach(), eps, message)
    sum_dy, sum_dy_xmu = message.chunk(2)
    for name, results in {
        "dx": (dx, own[0], torchs[0], written),
        "dweight": (dweight, own[1], torchs[1], sum_dy_xmu * equations.invstd(stats.var, eps)),
        "dbias": (dbias, own[2], torchs[2], sum_dy),
    }.items():
        for result in results[1:]:
            assert (result - results[0]).abs().max() < 1e-12, name


def split(x, sizes):
    return list(x.split(sizes)) if sum(sizes) else [x] * len(sizes)


def merged(shares):
    return functools.reduce(torch.add, [equations.moments(s) for s in shares])


def test_five_ranks_of_very_different_sizes_are_one_batch():
    """theory: ranks of [5, 1, 0, 11, 3] samples."""
    x, dy, weight, bias = batch((20, 3, 4))
    sizes = [5, 1, 0, 11, 3]
    x.requires_grad_()
    whole = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    (dx,) = torch.autograd.grad(whole, x, dy)
    shares, dys = split(x.detach(), sizes), split(dy, sizes)
    stats = equations.statistics(merged(shares))
    assert_near(torch.cat([equations.normalize(s, stats, weight, bias, 1e-5) for s in shares]), whole.detach())
    total = sum(equations.gradient_sums(g, s, stats.mean) for g, s in zip(dys, shares, strict=True))
    parts = [equations.input_gradient(g, s, stats, weight, 1e-5, total) for g, s in zip(dys, shares, strict=True)]
    assert_near(torch.cat(parts), dx)


sizes_strategy = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=sizes_strategy, seed=st.integers(0, 2**16), order=st.randoms(use_true_random=False))
def test_merging_is_commutative_associative_and_blind_to_the_split(sizes, seed, order):
    x, _, _, _ = batch((sum(sizes), 2, 3), seed)
    shares = split(x, sizes) if sum(sizes) else [x] * len(sizes)
    message = merged(shares)
    shuffled = list(shares)
    order.shuffle(shuffled)
    cut = order.randint(0, len(shares))
    halves = [merged(part) for part in (shares[:cut], shares[cut:]) if part]
    whole = equations.moments(x)
    for other in (merged(shuffled), functools.reduce(torch.add, halves), whole):
        assert_near(other, message)
    stats = equations.statistics(message)
    n = sum(sizes) * 3
    assert stats.count.item() == n
    if n:
        assert_near(stats.mean, x.mean([0, 2]))
        assert_near(stats.var, x.var([0, 2], correction=0))
    else:
        assert stats.mean.tolist() == stats.var.tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scale=st.floats(0.01, 100).flatmap(lambda s: st.sampled_from([s, -s])),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 2**16),
)
def test_shift_and_scale_of_the_input_change_nothing_but_the_sign(scale, shift, seed):
    x, _, _, _ = batch((6, 2, 3), seed)

    def normalized(value, eps):
        return equations.normalize(value, equations.statistics(equations.moments(value)), None, None, eps)

    expected = normalized(x, 1e-3) * (1 if scale > 0 else -1)
    assert_near(normalized(x * scale + shift, 1e-3 * scale**2), expected, 1e-14 * (1 + (100 / scale) ** 2) + 1e-12)


def test_counts_are_exact_past_the_integers_of_float32():
    x = torch.zeros(1, 2).expand(2**24 + 1, 2)
    zeros = torch.zeros(2)
    assert equations.pack_moments(x, zeros, zeros, zeros)[-1].item() == 2**24 + 1


@pytest.mark.parametrize("pivot", [equations.pivot, aten.pivot])
@pytest.mark.parametrize("shape", [(1, 3), (40, 3), (2, 3, 50), (3, 3, 9, 9), (1000, 3), (2, 3, 4, 5, 6)])
def test_the_pivot_samples_the_whole_share(shape, pivot):
    """Near the mean of a share that drifts from its first sample to its last."""
    drift = torch.linspace(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (drift + torch.linspace(0, 1, shape[-1]) if len(shape) > 2 else drift).expand(shape).double()
    mean = x.mean(channel_dims(x))
    assert ((pivot(x) - mean).abs() <= 0.3 * (x.std() if x.numel() > 3 else 0) + 1e-12).all()
    assert pivot(x[:0]).tolist() == [0.0, 0.0, 0.0]
