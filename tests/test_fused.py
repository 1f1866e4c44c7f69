"""Batch norm, what is added to it and the ReLU behind as one layer: every value is that of one process with three modules."""

import contextlib
import copy
import functools

import batches
import oracle
import pytest
import test_layer
import tolerance
import torch
import torch.nn.functional as F
import worlds
from allpairspy import AllPairs
from batches import Case, Result
from collectives_seen import CollectivesSeen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import SyncBatchNormReLU, kernels
from syncbn.analysis import batch_norm_smoothness

AXES = {
    "fused": ("relu", "add relu"),
    "shares": tuple(batches.SHARES),
    "space": tuple(batches.SPACES),
    "dtype": batches.DTYPES,
    "layout": batches.LAYOUTS,
    "affine": ("both", "weight", "bias", "none"),
    "momentum": (0.1, None),
    "form": ("eager", "create_graph"),
}
pytestmark = pytest.mark.timeout(300)


def pairs(world: int) -> list[tuple[Case, str]]:
    """Cases for a world size in which every pair of values of two axes occurs."""
    rows = [dict(zip(AXES, row, strict=True)) for row in AllPairs(list(AXES.values()))]
    return [(Case(world, **{k: v for k, v in row.items() if k != "form"}), row["form"]) for row in rows]


def layer_for(case: Case) -> SyncBatchNormReLU:
    weight, bias = batches.parameters(case)
    layer = SyncBatchNormReLU(
        batches.CHANNELS, eps=case.eps, momentum=case.momentum, affine=case.affine != "none", dtype=case.dtype
    )
    for name, value in (("weight", weight), ("bias", bias)):
        setattr(layer, name, None if value is None else nn.Parameter(value))
    mean, var = batches.buffers(case)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    layer._force_sync = True
    return layer


def plain_or_fused(case: Case) -> nn.Module:
    """The layer of a case, which synchronizes alone too."""
    layer = test_layer.layer_for(case, "module") if case.fused == "none" else layer_for(case)
    layer._force_sync = True
    return layer


def on_a_rank(rank: int, case: Case, form: str, group=None, device: str = "cpu") -> Result:
    xs, dys = batches.make(case)
    added = batches.residuals(case)
    layer = syncbn.convert(plain_or_fused(case), group).to(device)
    leaves = [batches.place(t[rank], device).requires_grad_() for t in (xs, added) if t is not None]
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False) if form == "compiled" else layer
    y = run(*leaves)
    leaves += [p for p in (layer.weight, layer.bias) if p is not None]
    found = torch.autograd.grad(y, leaves, batches.place(dys[rank], device), create_graph=form == "create_graph")
    grads = dict(zip(map(id, leaves), found, strict=True))
    dx, *dresidual = (grads[id(leaf)].detach() for leaf in leaves[: 1 + (added is not None)])
    if form == "create_graph":  # whose strides are autograd's
        dx = torch.empty_like(leaves[0]).copy_(dx)
    dweight, dbias = (None if p is None else grads[id(p)].detach() for p in (layer.weight, layer.bias))
    return Result(y, dx, dweight, dbias, layer.running_mean, layer.running_var, *dresidual).cpu()


def _on_a_rank(world, chosen):
    torch._dynamo.reset()
    return [on_a_rank(world.rank, case, form, world.group, world.device) for case, form in chosen]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_pair_of_variants_equals_the_whole_batch(world):
    check_pairs(world, functools.partial(worlds.run, timeout=200))


def check_pairs(world, run):
    """`run` calls a case on the ranks of a world."""
    chosen = pairs(world)
    assert len(chosen) >= len(batches.SHARES) * len(batches.SPACES)
    by_rank = run(world, _on_a_rank, chosen)
    for (case, _), results in zip(chosen, zip(*by_rank, strict=True), strict=True):
        batches.check(case, list(results))


@pytest.mark.parametrize("fused", ["relu", "add relu"])
def test_compiled(fused):
    case = Case(2, fused=fused)
    by_rank = worlds.run(2, _on_a_rank, [(case, "compiled")])
    batches.check(case, [result for (result,) in by_rank])


def _collectives(world, case, masked):
    xs, dys = batches.make(case)
    layer = syncbn.convert(layer_for(case), world.group)
    x, residual = xs[world.rank], (batches.residuals(case) or [None] * world.size)[world.rank]
    if residual is None:
        x.requires_grad_()
    else:  # alone wants its gradient: the other ranks may want more
        residual.requires_grad_()
        layer.requires_grad_(False)
    mask = torch.ones_like(x[:, 0], dtype=torch.bool) if masked else None
    with CollectivesSeen() as forward:
        y = layer(x, residual, mask)
    with CollectivesSeen() as backward:
        y.backward(dys[world.rank])
    return forward.seen, backward.seen


@pytest.mark.parametrize("fused", ["relu", "add relu"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_all_reduce_each_way(fused, masked):
    case, channels = Case(3, "empty", fused=fused), batches.CHANNELS
    for forward, backward in worlds.run(3, _collectives, case, masked):
        assert forward == [("allreduce_", torch.float64, 2 * channels + 1)]
        assert backward == [("allreduce_", torch.float64, 2 * channels)]


@pytest.mark.parametrize("fused", ["relu", "add relu"])
def test_derivatives_of_every_order(fused):
    """By numbers, in float64, away from the ReLU's corner."""
    case = Case(1, dtype=torch.float64, fused=fused)
    layer, (x,) = layer_for(case), batches.make(case)[0]
    layer.track_running_stats = False  # torch.func moves no buffer that is not an argument
    inputs = [x[:4].requires_grad_(), *(r[:4].requires_grad_() for r in batches.residuals(case) or [])]
    assert layer(*inputs).eq(0).any()
    assert torch.autograd.gradcheck(layer, inputs, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(layer, inputs, eps=1e-7, atol=1e-5)
    tangents = tuple(torch.randn_like(i) for i in inputs)
    _, forward = torch.func.jvp(layer, tuple(i.detach() for i in inputs), tangents)
    _, backward = torch.autograd.functional.jvp(layer, tuple(inputs), tangents)
    torch.testing.assert_close(forward, backward)


def separate(case: Case) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(batches.CHANNELS, case.eps, case.momentum, dtype=case.dtype)
    layer.load_state_dict(layer_for(case).state_dict())
    return layer


@pytest.mark.parametrize("added", [False, True])
def test_in_eval_mode_it_is_torchs_modules_to_the_bit(added):
    case = Case(1)
    (x,), _ = batches.make(case)
    residual = torch.randn_like(x) if added else None
    y = layer_for(case).eval()(x, residual)
    expected = separate(case).eval()(x)
    assert torch.equal(y, (expected if residual is None else expected + residual).relu())


@pytest.mark.parametrize("by_aten", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_alone_it_is_torchs_modules(added, by_aten, monkeypatch):
    """By the compiled kernels, which are faster than torch's operators, and by these without them, then to the bit."""
    if by_aten:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    case = Case(1)
    (x,), (dy,) = batches.make(case)
    residual = torch.randn_like(x) if added else None
    leaves = [t.clone().requires_grad_() for t in (x, *([] if residual is None else [residual]))]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    layer, theirs = layer_for(case), separate(case)
    layer._force_sync = False
    y = layer(*leaves)
    assert ("SyncBatchNorm" in type(y.grad_fn).__name__) == (not by_aten and kernels.compiled() is not None)
    expected = theirs(twins[0])
    expected = (expected if residual is None else expected + twins[1]).relu()
    y.backward(dy)
    expected.backward(dy)
    same = {"rtol": 0, "atol": 0} if by_aten else {}
    torch.testing.assert_close(y, expected, **same)
    for got, want in zip(leaves, twins, strict=True):
        torch.testing.assert_close(got.grad, want.grad, **same)
    torch.testing.assert_close(dict(layer.state_dict()), dict(theirs.state_dict()), **same)


def test_a_mask_leaves_out_residuals_too():
    case = Case(1, dtype=torch.float64)
    (x,), (dy,) = batches.make(case)
    residual = torch.randn_like(x)
    mask = torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.6
    x, residual = (torch.where(mask, t, float("nan")).requires_grad_() for t in (x, residual))
    y = layer_for(case)(x, residual, mask)
    y.backward(dy)
    kept = mask.expand_as(x)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return oracle.flat(t)[oracle.flat(kept)[:, 0]].detach()

    expected = oracle.batch_norm([rows(x)], [rows(dy)], *batches.parameters(case), relu=True, residuals=[rows(residual)])
    for name, got, want in (
        ("y", y, expected.y),
        ("dx", x.grad, expected.dx),
        ("dresidual", residual.grad, expected.dresidual),
    ):
        assert torch.where(kept, 0, got).eq(0).all(), name
        tolerance.check(name, rows(got), want[0], scale=3 * dy.abs().max().item())


def test_a_mask_in_eval_mode():
    case = Case(1)
    (x,), _ = batches.make(case)
    residual, mask = torch.randn_like(x), torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.6
    y = layer_for(case).eval()(torch.where(mask, x, float("nan")), residual, mask)
    assert torch.equal(y, torch.where(mask, (separate(case).eval()(x) + residual).relu(), 0))


@pytest.mark.parametrize("by_aten", [False, True])
def test_a_residual_that_torch_would_broadcast_is_an_error_alone_too(by_aten, monkeypatch):
    if by_aten:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    expected = r"a residual of shape \(3, 4, 1\); expected one shape \(layer 'SyncBatchNormReLU\(4\)'"
    with pytest.raises(ValueError, match=expected):
        SyncBatchNormReLU(4)(torch.randn(3, 4, 5), torch.randn(3, 4, 1))


def _wrong(world, what):
    layer = syncbn.convert(nn.Sequential(nn.Identity(), SyncBatchNormReLU(4)), world.group)
    x = torch.randn(3, 4, 5)
    residual = {"shape": torch.randn(3, 4, 1), "dtype": x.double(), "device": torch.empty(3, 4, 5, device="meta")}[what]
    messages = []
    for training in (True, False):
        try:
            layer[1].train(training)(x, residual)
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("shape", "ValueError: given input of shape (3, 4, 5) and a residual of shape (3, 4, 1); expected one shape"),
        ("dtype", "TypeError: given input of torch.float32 and a residual of torch.float64; expected one dtype"),
        ("device", "ValueError: given input on cpu and a residual on meta; expected one device"),
    ],
)
def test_a_residual_that_does_not_fit(what, expected):
    for rank, messages in enumerate(worlds.run(2, _wrong, what)):
        assert len(messages) == 2
        assert all(message.startswith(f"{expected} (layer '1', rank {rank} of ") for message in messages), messages


def test_state_dicts_of_torchs_layers():
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(3), SyncBatchNormReLU(3)
    theirs(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    twin = nn.BatchNorm2d(3)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin.running_var, theirs.running_var)


@pytest.mark.parametrize("added", [False, True])
def test_what_is_kept_for_backward(added):
    """x and what is per channel; and y, which the next layer keeps anyway, where something was added."""
    case = Case(1)
    layer, (x,) = layer_for(case), batches.make(case)[0]
    residual = torch.randn_like(x).requires_grad_() if added else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_(), residual)
    large = [t.data_ptr() for t in kept if t.numel() > 2 * batches.CHANNELS + 1]
    assert sorted(large) == sorted([x.data_ptr(), *([y.data_ptr()] if added else [])])


class Watching(TorchDispatchMode):
    """Sees all operators, as selective checkpoints do: what it watches is composed of them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watching", [contextlib.nullcontext, Watching])
def test_backward_passes_what_forward_passed_to_the_bit(watching):
    """Where a value of each channel is zero but for rounding, which other kernels do otherwise; by what dbias counts."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 50, (8, 64, 16, 16), generator=generator).float()
        layer = SyncBatchNormReLU(64)
        layer._force_sync = True
        with torch.no_grad():
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            layer.weight.uniform_(0.5, 2, generator=generator)
            zero = torch.randint(0, 50, (64,), generator=generator).float()
            layer.bias.copy_((mean - zero) * (var + layer.eps).rsqrt() * layer.weight)
        with watching():
            y = layer(x)
        y.sum().backward()
        assert torch.equal(layer.bias.grad, (y > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    case = Case(1, fused="add relu")
    (x,), (dy,) = batches.make(case)
    leaves = [x.requires_grad_(), batches.residuals(case)[0].requires_grad_()]
    layer = layer_for(case)
    y = checkpoint(layer, *leaves, use_reentrant=reentrant)
    y.backward(dy)
    dx, dresidual = (leaf.grad for leaf in leaves)
    result = Result(y.detach(), dx, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, dresidual)
    batches.check(case, [result])


def test_under_autocast():
    case = Case(1, dtype=torch.bfloat16)
    (x,), _ = batches.make(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer_for(case)(x, x)
    assert y.dtype == torch.bfloat16


class Block(nn.Module):
    """A residual block with both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), SyncBatchNormReLU(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), SyncBatchNormReLU(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


class Masked(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1(self.conv1(x), mask=x[:, 0] > 0)


def test_what_is_done_with_models_can_be_done_with_these_layers():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 4, 6, 6)
    assert type(syncbn.convert(model).norm1) is SyncBatchNormReLU
    assert type(syncbn.revert(model).norm1) is SyncBatchNormReLU
    twin = copy.deepcopy(model)
    syncbn.update_bn_stats(model, [x], progress=False)
    y = twin.conv1(x)
    torch.testing.assert_close(model.norm1.running_var, y.var([0, 2, 3]))
    folded = syncbn.fold(model.eval())
    torch.testing.assert_close(folded(x), model(x))
    assert not [layer for layer in folded.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    masked = syncbn.fold(Masked().eval())
    torch.testing.assert_close(masked(x), Masked.forward(masked, x))
    assert masked.norm1.num_features == 4, "with a mask it stays"
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_a_report_of_smoothness_leaves_these_layers_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), SyncBatchNormReLU(4), nn.Linear(4, 2))
    batch = torch.randn(9, 3), torch.arange(9) % 2
    reports = batch_norm_smoothness(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch)
    assert [report.name for report in reports] == ["1"]
    assert reports[0].gradient_error < 1e-3


def test_the_function_of_torch_that_one_would_write():
    """relu(batch_norm(x) + x) of a network, trained for some steps: the loss is that of three modules."""
    torch.manual_seed(0)
    model, data = Block(), torch.randn(5, 8, 4, 6, 6)
    for layer in (model.norm1, model.norm2):
        layer._force_sync = True
    twin = copy.deepcopy(model)

    def by_modules(x: torch.Tensor) -> torch.Tensor:
        def norm(layer: nn.Module, z: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(z, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

        y = norm(twin.norm1, twin.conv1(x)).relu()
        return (norm(twin.norm2, twin.conv2(y)) + x).relu()

    for run, of in ((model, model), (by_modules, twin)):
        optimizer = torch.optim.SGD(of.parameters(), 0.1)
        for x in data:
            optimizer.zero_grad()
            (run(x) - x.flip(0)).square().mean().backward()
            optimizer.step()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want)
