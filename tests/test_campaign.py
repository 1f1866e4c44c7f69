"""A campaign of inputs, good and bad: each equals the oracle, or raises a documented error and changes nothing.

    python -m pytest -m campaign tests/test_campaign.py        the long run; without -m a short one, the same each time

Shares, layouts, dtypes, masks, constructor arguments and groups are drawn by hypothesis; what is valid is said here again, by
the documentation, so that an error for a valid input fails as a wrong number does.
"""

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import oracle
import pytest
import tolerance
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncbn
from syncbn import kernels
from syncbn.collectives import Group

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]

FORMS = {
    "any": (syncbn.SyncBatchNorm, range(2, 7)),
    "1d": (syncbn.SyncBatchNorm1d, (2, 3)),
    "2d": (syncbn.SyncBatchNorm2d, (4,)),
    "3d": (syncbn.SyncBatchNorm3d, (5,)),
}
TORCHS = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ["contiguous", "channels_last", "permuted", "expanded", "sliced", "overlapping", "transposed"]
VALUES = ["normal", "far", "constant", "nan", "inf", "huge"]


class Input(NamedTuple):
    form: str
    channels: int  # of the layer
    given: int  # of the input
    dims: int  # of the input
    shares: tuple[tuple[int, ...], ...]  # by rank: N and the sizes behind the channels, as many as there may be
    dtype: torch.dtype
    param_dtype: torch.dtype
    eps: float
    momentum: float | str | None
    affine: bool
    track: bool
    layout: str
    values: str
    mask: str | None
    compiled: bool  # by the compiled kernels, where they were built, or by ATen's
    seed: int


def inputs(world):
    sizes = st.tuples(st.integers(0, 4), *[st.integers(0, 3)] * 4)
    forms = st.sampled_from(["any", "any", *TORCHS])
    return st.builds(
        Input,
        form=forms,
        channels=st.shared(st.integers(1, 5), key="channels"),
        given=st.one_of(*[st.shared(st.integers(1, 5), key="channels")] * 7, st.integers(0, 5)),
        dims=st.shared(forms, key="form").flatmap(lambda form: st.sampled_from([*FORMS[form][1]] * 3 + [*range(1, 7)])),
        shares=st.tuples(*[sizes] * world),
        dtype=st.sampled_from([*FLOATING * 4, torch.int64, torch.bool, torch.complex64]),
        param_dtype=st.sampled_from(FLOATING),
        eps=st.sampled_from([1e-5] * 6 + [1e-3, 0.1, -1.0]),
        momentum=st.sampled_from([0.1, 0.1, 0.5, 1.0, 0.0, None, "0.1"]),
        affine=st.booleans(),
        track=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        values=st.sampled_from(VALUES),
        mask=st.sampled_from([None] * 5 + ["some", "wide", "none", "all", "float", "short"]),
        compiled=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def make(case, rank):
    """x, dy and mask of a rank."""
    generator = torch.Generator().manual_seed(case.seed + 1000 * rank)
    n, *spatial = case.shares[rank]
    shape = (n, case.given, *spatial)[: case.dims] if case.dims > 1 else (n,)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.values == "far":
        x = x + 50
    if case.values == "constant":
        x = torch.full_like(x, 3.0)
    if case.values == "huge":
        x = x * 1e3
    if case.values in ("nan", "inf") and x.numel() and rank == 0:
        x.view(-1)[case.seed % x.numel()] = float(case.values)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = laid_out((x * 3 if case.dtype == torch.int64 else x).to(case.dtype), case.layout)
    dy = dy.to(case.dtype) if case.dtype in FLOATING else dy
    mask = None
    if case.mask is not None:
        wanted = (shape[0], *((1,) if case.mask == "wide" and len(shape) > 1 else ()), *shape[2:])
        mask = torch.rand(wanted, generator=generator) < {"all": 2.0, "none": -1.0}.get(case.mask, 0.6)
        if case.mask == "float":
            mask = mask.float()
        if case.mask == "short":
            mask = torch.ones(shape[0] + 1, *shape[2:], dtype=torch.bool)
    return x, dy, mask


def laid_out(x, layout):
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if layout == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1 : 2 * x.shape[-1] : 2] = x
        return wide[..., 1 : 2 * x.shape[-1] : 2]
    if layout == "overlapping" and x.numel() and x.dim() > 1:
        return x.contiguous().view(-1).as_strided(x.shape, [1] * x.dim()) if sum(x.shape) - x.dim() < x.numel() else x
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def expected_error(case):
    """What the documentation says of this input: an error for it, or None."""
    if case.eps < 0:
        return ValueError
    if case.dims not in FORMS[case.form][1]:
        return ValueError
    if case.dtype not in FLOATING:
        return TypeError
    if case.track and isinstance(case.momentum, str):
        return TypeError
    if case.given != case.channels:
        return ValueError
    if case.mask == "float":
        return TypeError
    if case.mask == "short":
        return ValueError
    return None


class Outcome(NamedTuple):
    """What a rank got: an error and whether anything changed, or values."""

    error: str | None
    message: str
    unchanged: bool
    values: tuple  # y, dx, dγ, dβ, running mean and variance


def run(case, rank, group=None):
    """One layer's forward and backward on a rank's share."""
    with contextlib.nullcontext() if case.compiled else mock.patch.object(kernels, "compiled", return_value=None):
        return _run(case, rank, group)


def _run(case, rank, group):
    x, dy, mask = make(case, rank)
    layer = None
    try:
        layer = FORMS[case.form][0](
            case.channels, case.eps, case.momentum, case.affine, case.track, dtype=case.param_dtype, process_group=group
        )
        layer._force_sync = True
        if case.affine:
            torch.manual_seed(case.seed)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        if case.dtype in (*FLOATING, torch.complex64):
            x.requires_grad_()
        y = layer(x, mask)
    except Exception as error:
        same = layer is None or all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        return Outcome(type(error).__name__, str(error), same, ())
    y.backward(dy)
    grads = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
    return Outcome(None, "", False, (y.detach(), x.grad, *grads, layer.running_mean, layer.running_var))


def flat_valid(t, mask):
    """(values, C) of the positions that count."""
    values = oracle.flat(t)
    return values if mask is None else values[(mask if mask.dim() < t.dim() else mask[:, 0]).reshape(-1)]


def compare(case, outcomes):
    """Assert that every rank's outcome is the documented one."""
    wanted = expected_error(case)
    if wanted is not None:
        for outcome in outcomes:
            assert outcome.error == wanted.__name__, f"{outcome} for {case}"
            assert outcome.unchanged, f"buffers changed: {case}"
            assert "given" in outcome.message or "expected" in outcome.message, outcome.message
            assert case.eps < 0 or "rank" in outcome.message, outcome.message
        return
    made = [make(case, rank) for rank in range(len(outcomes))]
    xs = [flat_valid(x.detach(), mask) for x, _, mask in made]
    dys = [flat_valid(dy, mask) for _, dy, mask in made]
    layer = nn.BatchNorm1d(case.channels, affine=case.affine)
    torch.manual_seed(case.seed)
    weight = bias = None
    if case.affine:
        weight = nn.init.uniform_(torch.empty(case.channels, dtype=case.param_dtype), 0.5, 1.5)
        bias = nn.init.uniform_(torch.empty(case.channels, dtype=case.param_dtype), -0.5, 0.5)
    momentum = {None: 1.0, "0.1": 0.0}.get(case.momentum, case.momentum)
    expected = oracle.batch_norm(xs, dys, weight, bias, layer.running_mean, layer.running_var, momentum, case.eps)
    inv = (expected.var + case.eps).rsqrt()
    ratio = (expected.mean.abs() * inv).nan_to_num(0, 0, 0).max().item()
    gain = inv if weight is None else inv * weight.double().abs()
    largest_dy = max((dy.double().abs().max().item() for dy in dys if dy.numel()), default=0.0)  # the sums are of all ranks
    for rank, (outcome, (x, _, mask)) in enumerate(zip(outcomes, made, strict=True)):
        assert outcome.error is None, f"{outcome.error}: {outcome.message} for {case}"
        y, dx, dweight, dbias, mean, var = outcome.values
        assert y.dtype == dx.dtype == case.dtype
        assert y.stride() == torch.empty_like(x).stride(), case
        if mask is not None:
            outside = ~(mask if mask.dim() == x.dim() else mask.unsqueeze(1)).expand(x.shape)
            assert not y[outside].count_nonzero(), f"y outside of the mask: {case}"
            assert not dx[outside].count_nonzero(), f"dx outside of the mask: {case}"
        size = dys[rank].double().abs()
        xhat = ((xs[rank].double() - expected.mean) * inv).abs().clamp(min=1)

        def near(name, value, want, scale, rank=rank):
            top = scale.nan_to_num(0, 0, 0).abs().max().item() if scale.numel() else 0.0
            computed = torch.float64 if case.dtype == torch.float64 else torch.float32
            want = torch.where(want.abs() > torch.finfo(value.dtype).max, want.sign() * math.inf, want)
            tolerance.check(f"{name} of rank {rank} in {case}", value, want, None, ratio, top, computed)

        # A constant channel has y = β, a sum of terms of the size of γ.
        size_of_y = torch.cat([expected.y[rank].flatten(), torch.ones(1) if weight is None else weight.double()])
        near("y", flat_valid(y, mask), expected.y[rank], size_of_y)
        # Three terms, dy, G1/n and x̂·G2·i/n, each of the size of dy or less, but for |x̂|.
        near("dx", flat_valid(dx, mask), expected.dx[rank], 3 * gain * largest_dy)
        if case.affine:
            # 0 · i: a share without values has NaN where the statistics are.
            near("dweight", dweight, expected.dweight[rank] + 0 * inv, (size * xhat).sum(0))
            near("dbias", dbias, expected.dbias[rank], size.sum(0))
        if case.track:
            # A mean near 0 is the difference of sums as large as the values.
            near("running_mean", mean, expected.running_mean, expected.running_mean.abs() + momentum * expected.var.sqrt())
            near("running_var", var, expected.running_var, expected.running_var)


@given(inputs(1))
def test_one_process(case):
    compare(case, [run(case, 0)])


def _on_ranks(world, cases):
    return [run(case, world.rank, world.group) for case in cases]


@settings(max_examples=settings().max_examples // 20 + 10)  # of eight inputs each
@given(st.integers(2, 4).flatmap(lambda world: st.lists(inputs(world), min_size=8, max_size=8)))
def test_several_processes(cases):
    world = len(cases[0].shares)
    for case, outcomes in zip(cases, zip(*worlds.run(world, _on_ranks, cases), strict=True), strict=True):
        compare(case, list(outcomes))


def torchs(case):
    """Whether torch's class takes the constructor's arguments, and torch.equal the results."""
    real = not case.dtype.is_complex and not isinstance(case.momentum, str)
    return case.form in TORCHS and case.mask is None and case.eps >= 0 and real


@given(inputs(1).filter(torchs))
def test_eval_and_a_process_that_is_alone_are_torchs_to_the_bit_errors_included(case):
    for training in (False, True):
        results = []
        for made in (TORCHS[case.form], FORMS[case.form][0]):
            layer = made(case.channels, case.eps, case.momentum, case.affine, case.track, dtype=case.param_dtype)
            layer.train(training)
            x, _, _ = make(case, 0)
            try:
                results.append((layer(x), *layer.buffers()))
            except (RuntimeError, ValueError, TypeError) as error:
                results.append((type(error), str(error).split(" (layer")[0]))
        theirs, ours = results
        if isinstance(theirs[0], type):
            assert theirs == ours
        elif case.momentum is None and training:
            continue  # moved on the device: to rounding
        else:
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(theirs, ours, strict=True))


GROUPS = st.sampled_from([None, object(), "all", 0, 3.5, [0, 1]])
SIZES = st.sampled_from([None, 1, 2, 7, 0, -1, True, 2.0, "2"])


@given(GROUPS, SIZES)
def test_groups(process_group, group_size):
    """Every combination makes a group or says what is wrong."""
    good_size = group_size is None or (type(group_size) is int and group_size >= 1)
    if process_group is None and good_size:
        assert Group(process_group, group_size).resolve() is None
        return
    with pytest.raises((TypeError, ValueError), match=r"given .*; expected"):
        Group(process_group, group_size)


class Own(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


LEAVES = [
    lambda: nn.BatchNorm1d(3),
    lambda: nn.Linear(3, 3),
    lambda: Own(3),
    lambda: nn.SyncBatchNorm(3),
    lambda: nn.Identity(),
]
TREES = st.recursive(st.integers(0, len(LEAVES) - 1), lambda children: st.lists(children, min_size=1, max_size=3), max_leaves=8)


def grow(tree, shared):
    """A module of the tree; the first leaf of each kind is shared by its later places, every other time."""
    if isinstance(tree, list):
        return nn.Sequential(*(grow(branch, shared) for branch in tree))
    if tree not in shared:
        shared[tree] = LEAVES[tree]()
        return shared[tree]
    return shared.pop(tree)


@given(TREES, st.booleans())
def test_module_trees(tree, skips):
    """Converted and reverted, every module is the same object of the same class; in between batch norms are ours."""
    torch.manual_seed(0)
    model = grow(tree, {})
    before = [(name, module, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    x = torch.randn(6, 3)
    norms = [module for _, module, cls in before if issubclass(cls, nn.modules.batchnorm._BatchNorm)]
    skipped = {id(norms[0])} if norms and skips else set()
    assert syncbn.convert(model, skip=lambda name, layer: id(layer) in skipped) is model
    for module in norms:
        assert isinstance(module, syncbn.module._Synchronized) == (id(module) not in skipped)
    y = model(x) if not any(isinstance(module, nn.SyncBatchNorm) for module in norms) else None
    assert y is None or y.isfinite().all()
    syncbn.revert(model)
    after = list(model.named_modules(remove_duplicate=False))
    assert [(name, id(module), cls) for name, module, cls in before] == [(n, id(m), type(m)) for n, m in after]
    assert not any("_syncbn" in vars(module) for _, module in after)
    assert math.isfinite(x.sum())
