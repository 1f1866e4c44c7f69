"""Data-parallel training: after several steps every rank holds what one process on the whole batch holds."""

import pytest
import torch
import torch.nn.functional as F
import worlds
from tolerance import assert_same_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from uneven import network

import syncbn

SIZES = {"equal": (4, 4, 4, 4), "unequal": (1, 6, 3, 2), "empty": (5, 0, 4, 0), "single": (1, 1, 1, 1)}
STEPS = 4


def data(step, sizes, dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 2, 9, 9, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), torch.randint(3, (sum(sizes),), generator=generator)


def train(model, sizes, dtype, rank=None, world=1, forwards=1):
    """`forwards` batches a step, all forwards before the backward; the loss is the sum over samples × W / N."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    device = next(model.parameters()).device
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype, device=device)
        for part in range(forwards):
            x, target = data(step * 10 + part, sizes, dtype)
            n = len(x)
            if rank is not None:
                x, target = x.split(sizes)[rank], target.split(sizes)[rank]
            x, target = x.to(device), target.to(device)
            total = total + F.cross_entropy(model(x), target, reduction="sum") * world / n
        total.backward()
        optimizer.step()
        losses.append(total.item() / world)
    return losses


def _on_a_rank(world, shares, dtype, forwards, when):
    sizes = SIZES[shares][: world.size]
    model = network(dtype).to(world.device)
    if when == "before":
        syncbn.convert(model, world.group)
    ddp = DistributedDataParallel(model, process_group=world.group)
    if when == "after":
        syncbn.convert(ddp, world.group)
    losses = train(ddp, sizes, dtype, world.rank, world.size, forwards)
    return losses, {k: v.clone().cpu() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("shares", SIZES)
def test_weighted_training_equals_one_process(world, shares):
    check(world, shares, torch.float64, 1, "before", 1e-11)


@pytest.mark.parametrize("forwards", [2, 3])
def test_several_forwards_before_one_backward(forwards):
    check(2, "unequal", torch.float64, forwards, "before", 1e-11)


def test_float32_and_conversion_inside_the_wrapper():
    check(3, "empty", torch.float32, 1, "after", 2e-5)


def check(world, shares, dtype, forwards, when, tolerance, run=worlds.run):
    """float64 leaves rounding alone, 1e-16 grown over four steps; float32 that of 6e-8. `run` calls a case on the ranks."""
    expected = network(dtype)
    losses = train(expected, SIZES[shares][:world], dtype, forwards=forwards)
    results = run(world, _on_a_rank, shares, dtype, forwards, when)
    assert torch.tensor([r[0] for r in results], dtype=torch.float64).sum(0).tolist() == pytest.approx(losses, rel=tolerance)
    for rank, (_, state) in enumerate(results):
        assert_same_state(state, expected.state_dict(), tolerance, f"of rank {rank}")


def _mean_loss(world):
    sizes = SIZES["unequal"][: world.size]
    model = DistributedDataParallel(syncbn.convert(network(torch.float64), world.group), process_group=world.group)
    x, target = data(0, sizes, torch.float64)
    F.cross_entropy(model(x.split(sizes)[world.rank]), target.split(sizes)[world.rank]).backward()
    return [p.grad for p in model.parameters()]


def test_the_mean_loss_of_unequal_shares_is_another_loss():
    """What the docstring warns of: DDP averages the ranks' means."""
    model = network(torch.float64)
    F.cross_entropy(model(data(0, SIZES["unequal"][:2], torch.float64)[0]), data(0, (1, 6), torch.float64)[1]).backward()
    largest = max(
        (p.grad - g).abs().max().item() for p, g in zip(model.parameters(), worlds.run(2, _mean_loss)[0], strict=True)
    )
    assert largest > 0.01


def _refused(world):
    try:
        DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(network(torch.float32)), process_group=world.group)
    except ValueError as error:
        return str(error)
    return None


def test_torchs_own_layer_is_refused_where_ours_is_taken():
    """Keeps the claim honest: should torch take its layer on CPU one day, this fails."""
    assert all("SyncBatchNorm layers only work with GPU" in r for r in worlds.run(2, _refused))
