"""Sharded parameters and meshes over Gloo: FSDP2, its mixed precision, a 2-D mesh, FSDP1, against one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
import worlds
from tolerance import assert_same_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.analysis import gradient_landscape

STEPS = 3
SIZES = [(3, 5), (4, 0), (1, 6)]  # samples of each data-parallel rank in each step


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Flatten(1), nn.Linear(96, 5), nn.BatchNorm1d(5)),
    ).double()


def data(step, sizes):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 2, 6, 6, generator=generator).double() * 2 + torch.arange(sum(sizes)).view(-1, 1, 1, 1) / 4
    return x, torch.randint(5, (sum(sizes),), generator=generator)


def train(wrapped, rank=None, world=1, sizes=SIZES):
    """Losses of this rank's share, as parts of the mean of all; gradients are averaged over `world` ranks."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step, shares in enumerate(sizes):
        x, target = data(step, shares)
        if rank is not None:
            x, target = x.split(shares)[rank], target.split(shares)[rank]
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x), target, reduction="sum") / sum(shares)
        (loss * world).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model):
    """Plain tensors, gathered."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in model.state_dict().items()
    }


def assert_trained_alike(results, sizes=SIZES):
    """To rounding, 1e-16 grown over three steps."""
    model = network()
    losses = train(model, sizes=sizes)
    for losses_of_ranks in zip(*(found for found, _ in results), strict=True):
        assert sum(losses_of_ranks) == pytest.approx(losses.pop(0), rel=1e-12)
    for _, state in results:
        assert_same_state(state, model.state_dict())


def units():
    """A converted model of which each block and each batch norm are units of their own, and the root."""
    model = syncbn.convert(network())
    for block in model:
        for layer in block:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                fully_shard(layer)
        fully_shard(block)
    return fully_shard(model)


def _fully_sharded(world):
    model = units()
    assert isinstance(model[0][1].weight, DTensor)
    losses = train(model, world.rank, world.size)
    return losses, state_of(model)


def _after_sharding(world):
    """The other order: the blocks are sharded, then converted."""
    model = network()
    for block in model:
        fully_shard(block)
    syncbn.convert(fully_shard(model))
    return train(model, world.rank, world.size), state_of(model)


def _fsdp1(world):
    model = syncbn.convert(network())
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    losses = train(wrapped, world.rank, world.size)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return losses, state_of(model)


def _mixed_precision(world):
    """The running statistics of one step, and what the layer was given, in bfloat16."""
    torch.manual_seed(0)
    model = syncbn.convert(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=1.0), nn.Linear(6, 2)))
    given = []
    model[1].register_forward_pre_hook(lambda layer, args: given.append(args[0].detach().double()))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    weight = model[1].weight.full_tensor().clone()
    x = torch.randn(5 + world.rank, 4, generator=torch.Generator().manual_seed(world.rank)) * 3 + world.rank
    y = model(x)
    (y.float().square().sum() * world.size).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grad = model[1].weight.grad.full_tensor().clone()
    optimizer.step()
    moved = model[1].weight.full_tensor() - weight
    layer = model[1]
    return given[0], y.dtype, layer.running_mean.clone(), layer.running_var.clone(), grad.detach(), moved.detach()


def _reverted(world):
    """Layers sharded as ours: torch's again they are still units, and every rank trains on the whole batch."""
    model = syncbn.revert(units())
    layers = model[0][1], model[1][2]
    names = [(type(layer).__name__, isinstance(layer, FSDPModule)) for layer in layers]
    return names, train(model), state_of(model)


def _sharded(world):
    return {case.__name__: case(world) for case in (_fully_sharded, _after_sharding, _fsdp1, _mixed_precision, _reverted)}


@functools.cache
def sharded():
    return worlds.run_fresh(2, _sharded, timeout=100, group_timeout=30)


@pytest.mark.parametrize("case", [_fully_sharded, _after_sharding, _fsdp1])
def test_sharded_training_equals_one_process(case):
    assert_trained_alike([rank[case.__name__] for rank in sharded()])


def test_layers_sharded_and_reverted_are_torchs_and_sharded():
    model = network()
    losses = train(model)
    for names, found, state in (rank["_reverted"] for rank in sharded()):
        assert names == [("FSDPBatchNorm2d", True), ("FSDPBatchNorm1d", True)]
        assert found == pytest.approx(losses, rel=1e-12)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def test_mixed_precision_keeps_statistics_exact():
    """bfloat16 input and parameters; the statistics are those of the bfloat16 values of both ranks."""
    found = [rank["_mixed_precision"] for rank in sharded()]
    whole = torch.cat([given for given, *_ in found])
    for _, dtype, mean, var, grad, moved in found:
        assert dtype == torch.bfloat16
        assert (mean.dtype, var.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), whole.var(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moved, -0.1 * grad)


BATCHES = [(2, 3, 1, 2), (1, 2, 4, 3), (None, None, 2, 0), (None, None, None, 2)]  # samples of each rank; None: has run out


def _population_of_pairs(world):
    """Parameters are gathered from all ranks in each forward, statistics are of two of them."""
    torch.manual_seed(0)
    model = syncbn.convert(network(), group_size=2)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    mine = [data(step, [shares[world.rank]])[0] for step, shares in enumerate(BATCHES) if shares[world.rank] is not None]
    syncbn.update_bn_stats(model, [x + world.rank for x in mine], progress=False)
    return state_of(model)


def test_groups_in_one_sharded_model_may_have_other_numbers_of_batches():
    for rank, state in enumerate(worlds.run_fresh(4, _population_of_pairs, timeout=100, group_timeout=20)):
        pair = (0, 1) if rank < 2 else (2, 3)
        model, seen = network(), {1: [], 4: []}
        model[0][1].register_forward_hook(lambda layer, args, y, seen=seen: seen[1].append(args[0].transpose(0, 1).flatten(1)))
        model[1][2].register_forward_hook(lambda layer, args, y, seen=seen: seen[4].append(args[0].t()))
        with torch.no_grad():
            for step, shares in enumerate(BATCHES):
                parts = [data(step, [shares[of]])[0] + of for of in pair if shares[of] is not None]
                if parts:
                    model(torch.cat(parts))
        for name, calls in (("0.1", seen[1]), ("1.2", seen[4])):
            several = [x for x in calls if x.shape[1] > 1]
            n = sum(x.shape[1] for x in several)
            mean = torch.cat(calls, 1).mean(1)
            var = sum(x.var(1) * x.shape[1] for x in several) / n
            assert state[f"{name}.num_batches_tracked"] == len(calls)
            torch.testing.assert_close(state[f"{name}.running_mean"], mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state[f"{name}.running_var"], var, rtol=1e-12, atol=1e-12)


def _two_dimensions(world):
    """2 × 2 ranks: the two of a "tp" row hold the same data, so statistics and gradients go over "dp" alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results = {}
    for way in ("fsdp", "ddp"):
        model = syncbn.convert(network(), mesh["dp"])
        if way == "fsdp":
            for block in model:
                fully_shard(block, mesh=mesh["dp"])
            wrapped = fully_shard(model, mesh=mesh["dp"])
        else:
            wrapped = DistributedDataParallel(model, device_mesh=mesh["dp"])
        # The rows see other data: statistics that crossed "tp" would show.
        row = mesh["tp"].get_local_rank()
        losses = train(wrapped, mesh["dp"].get_local_rank(), 2, SIZES[row:])
        results[way] = losses, state_of(model), row
    return results


@pytest.mark.parametrize("way", ["fsdp", "ddp"])
def test_a_dimension_of_a_mesh(way):
    found = [rank[way] for rank in two_dimensions()]
    for row in range(2):
        assert_trained_alike([(losses, state) for losses, state, of in found if of == row], SIZES[row:])


@functools.cache
def two_dimensions():
    return worlds.run_fresh(4, _two_dimensions, timeout=100, group_timeout=30)


def _measured(world):
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (world.size,)))
    try:
        gradient_landscape(model, lambda model, x: model(x).square().mean(), torch.zeros(3, 2, 3, 3).double(), 0.1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_measure_of_analysis_refuses_what_is_sharded():
    """Forward takes what is gathered: the parameters that the model shows would have no gradient."""
    for message in worlds.run_fresh(2, _measured):
        assert "sharded over DeviceMesh" in message
        assert message.endswith("measure the model before fully_shard, or a copy with the same state")
