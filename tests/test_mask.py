"""Masked and padded input: the statistics are those of the valid positions of all ranks, whatever the padding holds."""

import itertools

import batches
import oracle
import pytest
import tolerance
import torch
import worlds
from collectives_seen import CollectivesSeen
from host_sync import NoHostSync
from test_autograd import Definition
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

C = batches.CHANNELS
# The lengths of each rank's sequences, padded to the longest of that rank; rank 2 has nothing valid, rank 3 no sequence.
LENGTHS = [(5, 2, 7), (3, 1), (0, 0), ()]
PADDINGS = [float("nan"), float("inf"), 1e30, 0.0]


def sequences(rank, dtype=torch.float32, ratio=1.0, seed=0):
    """The valid values of each sequence, (C, L) each, and their output gradients."""
    generator = torch.Generator().manual_seed(seed + 17 * rank)
    normal = [torch.randn(2, C, n, generator=generator, dtype=torch.float64) for n in LENGTHS[rank]]
    return [(x + ratio).to(dtype) for x, _ in normal], [(dy + 0.3).to(dtype) for _, dy in normal]


def pad(values, dtype, padding):
    """(N, C, L) with `padding` behind each sequence, and the mask (N, L)."""
    longest = max((v.shape[1] for v in values), default=4) + 1
    x = torch.full((len(values), C, longest), padding, dtype=torch.float64).to(dtype)
    mask = torch.zeros(len(values), longest, dtype=torch.bool)
    for number, v in enumerate(values):
        x[number, :, : v.shape[1]] = v
        mask[number, : v.shape[1]] = True
    return x, mask


def flat(values, dtype):
    """The valid values of one rank as (M, C)."""
    return torch.cat([v.t() for v in values]) if values else torch.zeros(0, C, dtype=dtype)


def layer_for(dtype, group=None, momentum=0.5):
    torch.manual_seed(1)
    layer = nn.BatchNorm1d(C, momentum=momentum, dtype=dtype)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return syncbn.convert(layer, group)


def on_a_rank(rank, layer, dtype, padding, wide, ratio=1.0):
    """y and dx at the valid positions, whether they are 0 at the others, parameter gradients and buffers."""
    values, gradients = sequences(rank, dtype, ratio)
    x, mask = pad(values, dtype, padding)
    dy, _ = pad(gradients, dtype, 3.0)
    if wide:  # (N, C, H, W) with a mask of (N, 1, H, W)
        layer.__class__ = syncbn.SyncBatchNorm
        x, dy, mask = (t.unsqueeze(-1).expand(*t.shape, 1) for t in (x, dy, mask.unsqueeze(1)))
    x.requires_grad_()
    y = layer(x, mask)
    y.backward(dy)
    channels_last = [t.detach().flatten(2).movedim(1, -1) for t in (y, x.grad)]
    mask = mask.flatten(1)
    zero = all(bool((t[~mask] == 0).all()) for t in channels_last)
    inside = [t[mask] for t in channels_last]
    return *inside, zero, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var


def check(results, dtype, ratio=1.0):
    shares, dys = zip(*([flat(v, dtype) for v in sequences(r, dtype, ratio)] for r in range(len(results))), strict=True)
    layer = layer_for(dtype)
    expected = oracle.batch_norm(
        list(shares), list(dys), layer.weight, layer.bias, torch.zeros(C), torch.ones(C), layer.momentum
    )
    largest = max(d.abs().sum().item() for d in dys)
    for rank, (y, dx, zero, dweight, dbias, mean, var) in enumerate(results):
        assert zero, "0 where the mask is false"
        tolerance.check(f"y of rank {rank}", y, expected.y[rank], None, ratio)
        tolerance.check(f"dx of rank {rank}", dx, expected.dx[rank], None, ratio, scale=6.0)
        tolerance.check("dweight", dweight, expected.dweight[rank], None, ratio, scale=largest)
        tolerance.check("dbias", dbias, expected.dbias[rank], None, ratio, scale=largest)
        tolerance.check("running_mean", mean, expected.running_mean, None, ratio)
        tolerance.check("running_var", var, expected.running_var, None, ratio)


def _masked(world, dtype, padding, wide):
    return on_a_rank(world.rank, layer_for(dtype, world.group), dtype, padding, wide)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_padded_sequences_equal_their_concatenation(world, dtype):
    for padding, wide in zip(PADDINGS, (False, True, False, True), strict=True):
        check(worlds.run(world, _masked, dtype, padding, wide), dtype)


def test_precision_where_the_mean_is_far_from_zero():
    """mean/std of 1e4, most positions padding: the pivot is that of the valid ones."""
    layer = layer_for(torch.float32)
    layer._force_sync = True
    check([on_a_rank(0, layer, torch.float32, 0.0, False, ratio=1e4)], torch.float32, ratio=1e4)


ROWS = torch.arange(7.0 * C, dtype=torch.float64).sin().reshape(7, C)
VALID = torch.tensor([True, True, False, True])


def layer_with_a_zero(group=None):
    """As the last layer of a residual branch begins, in one channel."""
    layer = layer_for(torch.float64, group)
    layer.weight.data[1] = 0
    return layer


def test_gradients_in_eval_mode_are_those_of_the_valid_positions():
    """NaN elsewhere."""
    layer, plain = layer_for(torch.float64).eval(), nn.BatchNorm1d(C).double().eval()
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 1.5)
    plain.load_state_dict(layer.state_dict())
    x = torch.where(VALID.unsqueeze(1), ROWS[:4], torch.nan).requires_grad_()
    valid = ROWS[:4][VALID].requires_grad_()
    layer(x, VALID).pow(3).sum().backward()
    plain(valid).pow(3).sum().backward()
    for name, got, want in (
        ("dx", x.grad[VALID], valid.grad),
        ("dweight", layer.weight.grad, plain.weight.grad),
        ("dbias", layer.bias.grad, plain.bias.grad),
    ):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max(), name
    assert x.grad[~VALID].tolist() == [[0] * C]


def _mask_on_one_rank(world, wanted):
    """Rank 1 has nothing to mask and gives no mask; x without gradient is what a first layer has."""
    layer = layer_with_a_zero(world.group)
    x, mask = (ROWS[:4], (VALID,)) if world.rank == 0 else (ROWS[4:] + 1, ())
    x = x.clone().requires_grad_(wanted)
    with CollectivesSeen() as log:
        layer(x, *mask).pow(3).sum().backward()
    return x.grad, layer.weight.grad, layer.bias.grad, [count for _, _, count in log.seen]


@pytest.mark.parametrize("wanted", [False, True])
def test_ranks_with_and_without_a_mask_exchange_the_same_sums(wanted):
    shares, layer = [ROWS[:4][VALID], ROWS[4:] + 1], layer_with_a_zero()
    forward = oracle.batch_norm(shares, shares, layer.weight, layer.bias)
    expected = oracle.batch_norm(shares, [3 * y.square() for y in forward.y], layer.weight, layer.bias)
    for rank, (dx, dweight, dbias, sizes) in enumerate(worlds.run(2, _mask_on_one_rank, wanted)):
        assert sizes == [2 * C + 1, 2 * C]
        tolerance.check("dweight", dweight, expected.dweight[rank], scale=50.0)
        tolerance.check("dbias", dbias, expected.dbias[rank], scale=50.0)
        if wanted:
            inside = dx[VALID] if rank == 0 else dx
            tolerance.check("dx", inside, expected.dx[rank], scale=50.0)
            assert (inside[:, 1] == 0).all()


def _penalty_with_a_mask_on_one_rank(world):
    layer = layer_with_a_zero(world.group)
    x, mask = (ROWS[:4], (VALID,)) if world.rank == 0 else (ROWS[4:] + 1, ())
    x = x.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(layer(x, *mask).pow(3).sum(), [x, layer.weight], create_graph=True)
    second = torch.autograd.grad(dx.square().sum() + dweight.sum(), [x, layer.weight])
    return [g[VALID] if g.shape == (4, C) else g for g in second]


def test_a_gradient_penalty_with_a_mask_on_one_rank():
    layer, gamma = layer_with_a_zero(), layer_with_a_zero().weight.detach()
    shares = [t.clone().requires_grad_() for t in (ROWS[:4][VALID], ROWS[4:] + 1)]
    x, gammas = torch.cat(shares), [gamma.clone().requires_grad_() for _ in shares]
    xhat = (x - x.mean(0)) * (x.var(0, unbiased=False) + layer.eps).rsqrt()
    ys = [part * g + layer.bias for part, g in zip(xhat.split([3, 3]), gammas, strict=True)]
    first = torch.autograd.grad(sum(y.pow(3).sum() for y in ys), [*shares, *gammas], create_graph=True)
    value = sum(g.square().sum() for g in first[:2]) + sum(g.sum() for g in first[2:])
    expected = torch.autograd.grad(value, [*shares, *gammas])
    dxs, dweights = zip(*worlds.run(2, _penalty_with_a_mask_on_one_rank), strict=True)
    for name, got, want in (("dx", torch.cat(dxs), torch.cat(expected[:2])), ("dweight", sum(dweights), sum(expected[2:]))):
        tolerance.check(name, got, want, scale=100 * want.abs().max().item())


def _all_invalid(world):
    layer = layer_for(torch.float32, world.group)
    x = torch.full((2, C, 3), float("nan"), requires_grad=True)
    with CollectivesSeen() as log:
        y = layer(x, torch.zeros(2, 3, dtype=torch.bool))
        y.sum().backward()
    sizes = [count for _, _, count in log.seen]
    kept = layer.running_mean.tolist() == [0.0] * C and layer.running_var.tolist() == [1.0] * C
    return y.abs().sum().item(), x.grad.abs().sum().item(), kept, int(layer.num_batches_tracked), sizes


def test_nothing_valid_anywhere_is_an_empty_batch_with_the_same_collectives():
    assert worlds.run(2, _all_invalid) == [(0.0, 0.0, True, 0, [2 * C + 1, 2 * C])] * 2


def test_a_mask_that_is_true_everywhere_changes_nothing():
    values, _ = sequences(0, torch.float64)
    x = torch.stack([values[0][:, :3], values[2][:, :3]])
    layer = layer_for(torch.float64)
    expected = layer(x)
    assert (layer(x, torch.ones(2, 3, dtype=torch.bool)) - expected).abs().max() <= 1e-13


def test_input_of_two_dimensions_takes_a_mask_of_samples():
    x = torch.randn(8, C, dtype=torch.float64)
    mask = torch.arange(8) % 3 > 0
    for shape in ((8,), (8, 1)):
        y = layer_for(torch.float64)(torch.where(mask[:, None], x, torch.nan), mask.reshape(shape))
        assert (y[mask] - layer_for(torch.float64)(x[mask])).abs().max() <= 1e-13
        assert y[~mask].abs().sum() == 0


@pytest.mark.parametrize("tracked", [True, False])
def test_eval_with_padding(tracked):
    layer = nn.BatchNorm1d(C, track_running_stats=tracked)
    syncbn.convert(layer)
    values, _ = sequences(0)
    x, mask = pad(values, torch.float32, float("nan"))
    x.requires_grad_()
    y = layer.eval()(x, mask)
    inside = y.movedim(1, -1)[mask]
    torch.testing.assert_close(inside, nn.BatchNorm1d(C, track_running_stats=tracked).eval()(flat(values, torch.float32)))
    assert y.movedim(1, -1)[~mask].abs().sum() == 0
    y.sum().backward()
    assert x.grad.movedim(1, -1)[~mask].abs().sum() == 0
    assert x.grad.isfinite().all()


def test_the_function_takes_a_mask_in_training_and_without():
    values, _ = sequences(0, torch.float64)
    x, mask = pad(values, torch.float64, float("nan"))
    valid = flat(values, torch.float64)
    for training in (True, False):
        mean, var = torch.ones(C).double(), torch.ones(C).double() * 2
        y = syncbn.sync_batch_norm(x, mean, var, training=training, mask=mask)
        mean, var = torch.ones(C).double(), torch.ones(C).double() * 2
        expected = torch.nn.functional.batch_norm(valid, mean, var, training=training)
        assert (y.movedim(1, -1)[mask] - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("padding", PADDINGS)
def test_double_backward_with_a_mask(padding):
    values, _ = sequences(0, torch.float64)
    x, mask = pad(values, torch.float64, padding)
    layer = layer_for(torch.float64)
    theirs = Definition(C).double()
    theirs.load_state_dict(layer.state_dict())
    leaves = x.requires_grad_(), flat(values, torch.float64)[:, :, None, None].requires_grad_()
    results = []
    for module, leaf, arguments in ((layer, leaves[0], (mask,)), (theirs, leaves[1], ())):
        (g,) = torch.autograd.grad(module(leaf, *arguments).pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [leaf, module.weight]))
    inside = results[0][0].movedim(1, -1)
    expected = results[1][0].flatten(1)
    assert (inside[mask] - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert inside[~mask].abs().sum() == 0
    assert (results[0][1] - results[1][1]).abs().max() <= 1e-10 * results[1][1].abs().max()


def test_vmap_over_masks_of_one_batch():
    values, _ = sequences(0, torch.float64)
    x, mask = pad(values, torch.float64, float("nan"))
    x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    masks = torch.stack([mask, mask.roll(1, 0) & mask])
    layer = layer_for(torch.float64)
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    y = torch.func.vmap(layer, (None, 0))(x, masks)
    assert (y - torch.stack([layer(x, m) for m in masks])).abs().max() <= 1e-12
    with CollectivesSeen() as log, pytest.raises(ValueError, match="given a mask batched by vmap and running statistics that"):
        torch.func.vmap(layer_for(torch.float64), (None, 0))(x, masks)
    assert log.seen == []


def test_a_masked_step_never_waits_for_the_device():
    layer = layer_for(torch.float32, momentum=None)
    values, _ = sequences(0)
    x, mask = pad(values, torch.float32, float("nan"))
    x.requires_grad_()
    with NoHostSync():
        layer(x, mask).sum().backward()
    assert x.grad.isfinite().all()


def _checkpointed(world):
    layer = layer_for(torch.float64, world.group)
    values, _ = sequences(world.rank, torch.float64)
    x, mask = pad(values, torch.float64, float("nan"))
    grads = []
    for context in (None, syncbn.checkpoint_context):
        leaf = x.clone().requires_grad_()
        options = {} if context is None else {"context_fn": context}
        with CollectivesSeen() as log:
            checkpoint(layer, leaf, mask, use_reentrant=False, **options).pow(3).sum().backward()
        grads.append((leaf.grad, len(log.seen), int(layer.num_batches_tracked)))
    return grads


def test_checkpointing_with_a_mask():
    for (plain, many, first), (ours, few, second) in worlds.run(2, _checkpointed):
        assert torch.equal(plain, ours)
        assert (many, few) == (3, 2)
        assert (first, second) == (1, 2), "once a step"


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_with_a_mask():
    torch._dynamo.reset()
    results = []
    for compiled in (True, False):
        layer = layer_for(torch.float32)
        layer._force_sync = True
        values, _ = sequences(0)
        x, mask = pad(values, torch.float32, float("nan"))
        x.requires_grad_()
        y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x, mask)
        y.pow(2).sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.running_var))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


BAD = [
    (torch.ones(2, 3), TypeError, r"given a mask of torch.float32; expected torch.bool"),
    (
        torch.ones(3, 2).bool(),
        ValueError,
        r"shape \(2, 5, 3\) and a mask of shape \(3, 2\); expected a mask of shape \(2, 3\) or \(2, 1, 3\)",
    ),
    (torch.ones(2, 5, 3).bool(), ValueError, r"a mask of shape \(2, 5, 3\); expected"),
    (torch.ones(2, 3, device="meta").bool(), ValueError, r"given input on cpu and a mask on meta; expected one device"),
]


def test_a_batch_of_integers_is_named_in_eval_mode_too():
    layer = layer_for(torch.float32).eval()
    layer.running_mean = layer.running_var = None
    with pytest.raises(
        TypeError, match=r"given input of torch.int32; expected float16.* \(layer 'SyncBatchNorm1d\(5\)', rank 0"
    ):
        layer(torch.ones(2, C, 3, dtype=torch.int32), torch.ones(2, 3).bool())


@pytest.mark.parametrize(("bad", "training"), list(itertools.product(range(len(BAD)), (True, False))))
def test_bad_masks_are_named(bad, training):
    mask, kind, message = BAD[bad]
    layer = layer_for(torch.float32).train(training)
    with pytest.raises(kind, match=message + r".* \(layer 'SyncBatchNorm1d\(5\)', rank 0 of 1\)$"):
        layer(torch.randn(2, C, 3), mask)
