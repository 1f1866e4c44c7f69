"""Real architectures: whatever a rank's share, a converted network is the one that sees the whole batch."""

import functools
from typing import NamedTuple

import pytest
import tolerance
import torch
import worlds
import zoo
from torch import Tensor, nn

import syncbn

SAMPLES = 8
SHARES = {"unequal": (3, 5), "empty": (7, 0, 1)}  # the second one also has a rank with one sample
PASSES = 2
CONVERTED = {
    nn.BatchNorm1d: syncbn.SyncBatchNorm1d,
    nn.BatchNorm2d: syncbn.SyncBatchNorm2d,
    nn.BatchNorm3d: syncbn.SyncBatchNorm3d,
}

# Both sides take the same float64 operations in another order, which leaves a few units in the last place at each layer; up to
# 15 layers of batch norm, each dividing by the standard deviation of as few as 8 values, enlarge the rounding of those before.
# How much, torch tells: its own results for a batch in reverse order differ by up to 1.2e-13 of a tensor's largest value, over
# 24 draws of the parameters. This factor makes 6e-13 of the table's floor, 3e-14; anything in float32 on the way leaves 1e-7.
AMPLIFICATION = 20


class Seen(NamedTuple):
    """What one process computes from its share."""

    outputs: list[Tensor]  # of each pass, in training mode
    dinputs: list[Tensor]  # of each pass, of the inputs that are not integers
    dparameters: dict[str, Tensor | None]  # sums over the passes
    evaluated: list[Tensor]  # outputs in eval mode after the passes
    buffers: dict[str, Tensor]  # at the end


class OnARank(NamedTuple):
    """What a rank reports: values of the converted network, then classes of all its modules, and what reverting does."""

    seen: Seen
    converted: list[type]
    reverted: list[type]
    evaluated: list[Tensor]  # reverted


def share(tensors, start, stop):
    return [t[start:stop].clone() for t in tensors]


def batch(family, number):
    """The inputs of the whole batch, the same on every rank."""
    return zoo.FAMILIES[family].inputs(SAMPLES, torch.Generator().manual_seed(number))


def outputs_of(model, inputs):
    y = model(*inputs)
    return y if isinstance(y, tuple) else (y,)


def projections(outputs, number):
    """Random gradients for the outputs of the whole batch: a sample's share of the loss is its outputs times these."""
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(SAMPLES, *y.shape[1:], generator=generator, dtype=torch.float64) for y in outputs]


def see(model, family, start=0, stop=SAMPLES):
    """Forward and backward of samples start to stop of each batch, then a forward in eval mode."""
    outputs, dinputs = [], []
    for number in range(PASSES):
        inputs = share(batch(family, number), start, stop)
        leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
        ys = outputs_of(model, inputs)
        directions = share(projections(ys, number), start, stop)
        sum((y * direction).sum() for y, direction in zip(ys, directions, strict=True)).backward()
        outputs += [y.detach() for y in ys]
        dinputs += [x.grad for x in leaves]
    dparameters = {name: p.grad for name, p in model.named_parameters()}
    return Seen(outputs, dinputs, dparameters, evaluate(model, family, start, stop), dict(model.named_buffers()))


def evaluate(model, family, start, stop):
    with torch.no_grad():
        return list(outputs_of(model.eval(), share(batch(family, PASSES), start, stop)))


@functools.cache
def expected(family):
    """One process, the whole batch, torch's batch norm."""
    return see(zoo.make(family), family)


def classes(model):
    return [type(module) for module in model.modules()]


def _on_a_rank(world, family, sizes):
    start, stop = sum(sizes[: world.rank]), sum(sizes[: world.rank + 1])
    model = syncbn.convert(zoo.make(family), world.group)
    converted = classes(model)
    seen = see(model, family, start, stop)
    syncbn.revert(model)
    return OnARank(seen, converted, classes(model), evaluate(model, family, start, stop))


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_shares_of_the_batch_give_what_the_whole_batch_gives(family, shares):
    sizes = SHARES[shares]
    ranks = worlds.run(len(sizes), _on_a_rank, family, sizes)
    whole = expected(family)
    for rank, (seen, *_) in enumerate(ranks):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for field in ("outputs", "dinputs", "evaluated"):
            for number, (got, want) in enumerate(zip(getattr(seen, field), getattr(whole, field), strict=True)):
                check(f"{field}[{number}] of rank {rank}", got, want[mine], want)
        assert seen.buffers.keys() == whole.buffers.keys()
        for name, want in whole.buffers.items():
            check(f"{name} of rank {rank}", seen.buffers[name], want, want)
    for name, want in whole.dparameters.items():
        parts = [seen.dparameters[name] for seen, *_ in ranks]
        if want is None:
            assert parts == [None] * len(ranks), name
        else:
            check(f"gradient of {name}", torch.stack(parts).sum(0), want, want)
    before = classes(zoo.make(family))
    for rank in ranks:
        assert rank.converted == [CONVERTED.get(cls, cls) for cls in before]
        assert rank.reverted == before
        assert all(torch.equal(a, b) for a, b in zip(rank.evaluated, rank.seen.evaluated, strict=True))


def check(name, result, expected, whole):
    """`whole` is the tensor of the whole batch that `expected` is a share of: errors are relative to its largest value."""
    if whole.is_floating_point():
        tolerance.check(name, result, expected, scale=AMPLIFICATION * whole.abs().max().item())
    else:
        assert torch.equal(result, expected), f"{name} is {result}, expected {expected}"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_family_has_what_the_comparison_needs(family):
    """No gradient that is zero but for rounding, and outputs that depend on the samples of other ranks."""
    whole = expected(family)
    for name, gradient in whole.dparameters.items():
        assert gradient is None or gradient.abs().max() > 1e-6, f"the gradient of {name} is rounding"
    assert all(dx.abs().max() > 1e-6 for dx in whole.dinputs)
    alone = see(zoo.make(family), family, 0, 3).outputs
    assert all((a - y[:3]).abs().max() > 1e-3 for a, y in zip(alone, whole.outputs, strict=True))
