"""pool_running_stats: the statistics of the mixture of what the ranks had."""

import pytest
import torch
import worlds
from collectives_seen import CollectivesSeen
from populations import network
from torch import nn

import syncbn
from syncbn.population import pool_running_stats

COUNTS = {
    "alike": (5, 5, 5, 5),
    "unequal": (1, 6, 3, 2),
    "one never trained": (4, 0, 2, 1),
    "one batch": (0, 1, 0, 0),
    "uncounted": (0, 0, 0, 0),
}


def trained(rank, counts, dtype):
    """A model whose layers have statistics of their own on each rank, one layer far from zero."""
    torch.manual_seed(rank)
    model = network(dtype)
    torch.manual_seed(100 + rank)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, dtype=torch.float64) + (1e4 if name == "twice.running_mean" else 0.5))
        else:
            buffer.fill_(COUNTS[counts][rank])
    model.twice.num_batches_tracked = None
    return model


def _pooled(world, counts, dtype, converted, twice):
    model = trained(world.rank, counts, dtype)
    if converted:
        syncbn.convert(model, world.group)
    with CollectivesSeen() as seen:
        pool_running_stats(model)
    if twice:
        pool_running_stats(model)
    return model.state_dict(), len(seen.seen)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("world", "converted"), [(4, False), (2, True), (3, True), (1, True)])
def test_pooled_statistics_are_those_of_the_mixture(world, converted, counts):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        states = [trained(rank, counts, dtype).state_dict() for rank in range(world)]
        results = worlds.run(world, _pooled, counts, dtype, converted, dtype == torch.float64)
        for rank, (state, collectives) in enumerate(results):
            assert collectives == (2 if world > 1 else 0)
            expected = states[rank] | (mixtures(states, counts) if world > 1 else {})
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                off = (state[name].double() - value.double()).abs().max().item()
                assert off <= tolerance * value.double().abs().max().item(), f"{name} of rank {rank} off by {off:.2g}"


class OfTheUser(nn.BatchNorm1d):
    """An attribute of a name that torch.nn.SyncBatchNorm has."""

    process_group = "of the user"


def _pooled_users(world):
    model = nn.Sequential(OfTheUser(2), syncbn.convert(OfTheUser(2), world.group))
    for layer in model:
        layer.running_mean.fill_(world.rank)
    pool_running_stats(model)
    return [layer.running_mean.tolist() for layer in model]


def test_an_attribute_of_the_user_is_no_group():
    assert worlds.run(4, _pooled_users) == [[[1.5, 1.5]] * 2] * 4


def mixtures(states, counts):
    """Moments of the mixture, about the first rank's mean, from the definition."""
    expected = {}
    for layer in ("stem.1.0", "twice", "head.2"):
        weights = torch.tensor(COUNTS[counts][: len(states)]).double()
        if layer == "twice" or not weights.any():
            weights = torch.ones(len(states)).double()
        weights = (weights / weights.sum())[:, None]
        means = torch.stack([state[f"{layer}.running_mean"] for state in states]).double()
        variances = torch.stack([state[f"{layer}.running_var"] for state in states]).double()
        mean = (weights * means).sum(0)
        expected[f"{layer}.running_mean"] = mean
        expected[f"{layer}.running_var"] = (weights * variances).sum(0) + (weights * (means - mean) ** 2).sum(0)
    return expected
