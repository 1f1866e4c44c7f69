"""The layer over processes: every value of every rank is that of one process which sees the whole batch."""

import batches
import pytest
import torch
import worlds
from allpairspy import AllPairs
from batches import Case, Result
from collectives_seen import CollectivesSeen

import syncbn

AXES = {
    "shares": tuple(batches.SHARES),
    "space": tuple(batches.SPACES),
    "dtype": batches.DTYPES,
    "layout": batches.LAYOUTS,
    "affine": ("both", "weight", "bias", "none"),
    "param_dtype": (None, torch.float32, torch.bfloat16),
    "momentum": (0.1, 0.7, None),
    "form": ("module", "function", "no running statistics", "torch's class, converted"),
}

CLASSES = {
    "0d": syncbn.SyncBatchNorm1d,
    "1d": syncbn.SyncBatchNorm1d,
    "2d": syncbn.SyncBatchNorm2d,
    "3d": syncbn.SyncBatchNorm3d,
}


def pairs(world: int) -> list[tuple[Case, str]]:
    """Cases for a world size in which every pair of values of two axes occurs."""
    rows = [dict(zip(AXES, row, strict=True)) for row in AllPairs(list(AXES.values()))]
    return [(Case(world, **{k: v for k, v in row.items() if k != "form"}), row["form"]) for row in rows]


def layer_for(case: Case, form: str) -> torch.nn.Module:
    """A layer of ours with the case's parameters and buffers."""
    cls = CLASSES.get(case.space, syncbn.SyncBatchNorm)
    if form.startswith("torch's"):
        cls = getattr(torch.nn, cls.__name__.removeprefix("Sync"), torch.nn.SyncBatchNorm)
    weight, bias = batches.parameters(case)
    mean, var = batches.buffers(case)
    layer = cls(
        batches.CHANNELS,
        eps=case.eps,
        momentum=case.momentum,
        affine=case.affine != "none",
        track_running_stats=form != "no running statistics",
        dtype=case.param_dtype or case.dtype,
    )
    for name, value in (("weight", weight), ("bias", bias)):
        setattr(layer, name, None if value is None else torch.nn.Parameter(value))
    if layer.track_running_stats:
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return layer


def on_a_rank(world, case: Case, form: str) -> Result:
    xs, dys = batches.make(case)
    x, dy = (batches.place(t[world.rank], world.device) for t in (xs, dys))
    x.requires_grad_()
    if form == "function":
        weight, bias = (None if p is None else p.to(world.device).requires_grad_() for p in batches.parameters(case))
        mean, var = (buffer.to(world.device) for buffer in batches.buffers(case))
        y = syncbn.sync_batch_norm(
            x, mean, var, weight, bias, True, batches.momentum_of(case), case.eps, world.group, _force_sync=True
        )
    else:
        layer = syncbn.convert(layer_for(case, form), world.group).to(world.device)
        layer._force_sync = True
        y = layer(x)
        weight, bias, mean, var = layer.weight, layer.bias, layer.running_mean, layer.running_var
        if mean is not None:
            counted = int(sum(s.numel() for s in xs) > 0)
            assert layer.num_batches_tracked.tolist() == counted, "batches counted"
    assert y.grad_fn is not None
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    y.backward(dy)
    return Result(y, dx, *(None if p is None else p.grad for p in (weight, bias)), mean, var).cpu()


def _on_a_rank(world, chosen):
    """Several cases in one call, so that each costs no round trip."""
    return [on_a_rank(world, case, form) for case, form in chosen]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_pair_of_variants_equals_the_whole_batch(world):
    check_pairs(world, worlds.run)


def check_pairs(world, run):
    """`run` calls a case on the ranks of a world."""
    chosen = pairs(world)
    assert len(chosen) >= len(batches.SHARES) * len(batches.SPACES)
    by_rank = run(world, _on_a_rank, chosen)
    for (case, _), results in zip(chosen, zip(*by_rank, strict=True), strict=True):
        batches.check(case, list(results))


def _collectives(world, case: Case, no_grad: bool, training: bool):
    xs, dys = batches.make(case)
    layer = syncbn.convert(layer_for(case, "module"), world.group).train(training)
    x = xs[world.rank].detach().requires_grad_(not no_grad)
    with CollectivesSeen() as forward, torch.set_grad_enabled(not no_grad):
        y = layer(x)
    with CollectivesSeen() as backward:
        if not no_grad:
            y.backward(dys[world.rank])
    return forward.seen, backward.seen


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("shares", ["unequal", "empty", "all empty"])
def test_one_all_reduce_each_way_of_constant_size(world, shares):
    """Seen below our code, at the dispatcher: 2C+1 float64 values forward and 2C backward, whatever the world and the share."""
    case = Case(world, shares, affine="none")
    channels = batches.CHANNELS
    for forward, backward in worlds.run(world, _collectives, case, False, True):
        assert forward == [("allreduce_", torch.float64, 2 * channels + 1)]
        assert backward == [("allreduce_", torch.float64, 2 * channels)]
    for forward, backward in worlds.run(world, _collectives, case, True, True):
        assert (forward, backward) == ([("allreduce_", torch.float64, 2 * channels + 1)], [])


def test_eval_issues_no_collective():
    for seen in worlds.run(2, _collectives, Case(2, "equal"), False, False):
        assert seen == ([], [])
