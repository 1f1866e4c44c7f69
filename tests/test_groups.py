"""Groups of ranks: by size, by mesh, by layer, unequal, changed, destroyed and made again."""

import copy
import datetime
import os
import pickle
import warnings

import batches
import pytest
import torch
import torch.distributed as dist
import worlds
from batches import Case, Result
from test_layer import layer_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from uneven import network

import syncbn
from syncbn import collectives
from syncbn.collectives import Group

CASE = Case(4, "unequal")


def step(layer, rank, device="cpu") -> Result:
    x, dy = (batches.place(t[rank], device) for t in batches.make(CASE))
    y = layer.to(device)(x.requires_grad_())
    y.backward(dy)
    return Result(y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var).cpu()


def check(groups, results):
    """Each group of ranks is a batch of its own."""
    xs, dys = batches.make(CASE)
    for ranks in groups:
        batches.check(CASE, [results[r] for r in ranks], data=([xs[r] for r in ranks], [dys[r] for r in ranks]))


def _by_size(world, size):
    return step(syncbn.convert(layer_for(CASE, "module"), group_size=size), world.rank, world.device)


@pytest.mark.parametrize(("size", "groups"), [(2, [(0, 1), (2, 3)]), (4, [(0, 1, 2, 3)])])
def test_contiguous_groups_of_a_size(size, groups):
    check(groups, worlds.run(4, _by_size, size))


def _of_one(world):
    mine, torchs = syncbn.SyncBatchNorm2d(3, group_size=1), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2)
    return torch.equal(mine(x), torchs(x)), mine.process_group


def test_groups_of_one_are_torchs_own_layer():
    assert worlds.run(4, _of_one) == [(True, None)] * 4


def _wrong_size(world):
    try:
        syncbn.SyncBatchNorm2d(3, group_size=3)(torch.randn(2, 3, 2, 2))
    except ValueError as error:
        return str(error)


def test_a_size_that_does_not_divide_the_world():
    for rank, message in enumerate(worlds.run(4, _wrong_size)):
        assert message == (
            "given group_size=3 in a world of 4; expected a divisor of the world size "
            f"(layer 'SyncBatchNorm2d(3)', rank {rank} of 4)"
        )


def _made_once(world):
    made = []
    original = dist.new_subgroups

    def counted(*args, **kwargs):
        made.append(args)
        return original(*args, **kwargs)

    dist.new_subgroups = counted
    try:
        collectives._groups_by_size.clear()
        model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)), group_size=2)
        twin = copy.deepcopy(model)
        for one in (model, twin):
            one(torch.randn(4, 2))
        groups = {id(layer.process_group) for one in (model, twin) for layer in one}
        waits = collectives.timeout(model[0].process_group) == collectives.timeout(dist.group.WORLD)
        return len(made), len(groups), waits
    finally:
        dist.new_subgroups = original


def test_groups_of_a_size_are_made_once_and_wait_as_long_as_the_default_group():
    assert worlds.run(4, _made_once) == [(1, 1, True)] * 4


def _by_mesh(world, kind):
    if kind == "1-D":
        mesh = init_device_mesh("cpu", (4,))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
        with pytest.raises(ValueError, match=r"a DeviceMesh of 2 dimensions \('tp', 'dp'\); expected one dimension: slice it"):
            syncbn.convert(nn.BatchNorm2d(3), mesh)
        mesh = mesh["dp"]
    return step(syncbn.convert(layer_for(CASE, "module"), mesh), world.rank)


@pytest.mark.parametrize(("kind", "groups"), [("1-D", [(0, 1, 2, 3)]), ("2-D", [(0, 1), (2, 3)])])
def test_a_device_mesh_of_one_dimension(kind, groups):
    check(groups, worlds.run(4, _by_mesh, kind))


def _unequal(world):
    three, one = dist.new_group([0, 1, 2]), dist.new_group([3])
    return step(syncbn.convert(layer_for(CASE, "module"), three if world.rank < 3 else one), world.rank)


def test_groups_of_unequal_size():
    check([(0, 1, 2), (3,)], worlds.run(4, _unequal))


def _by_layer(world):
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank // 2]
    model = nn.ModuleDict({"wide": layer_for(CASE, "module"), "narrow": layer_for(CASE, "module")})
    syncbn.convert(model, lambda name, layer: pair if name == "narrow" else None)
    both = [step(model[name], world.rank) for name in ("wide", "narrow")]
    kept = [layer.process_group for layer in model.values()]
    syncbn.convert(model)
    assert [layer.process_group for layer in model.values()] == kept, "None keeps a group that a layer has"
    syncbn.convert(model, group_size=4)
    assert {layer.process_group.size() for layer in model.values()} == {4}, "another group changes it"
    return both


def test_a_group_for_each_layer_kept_and_changed():
    results = worlds.run(4, _by_layer)
    check([(0, 1, 2, 3)], [wide for wide, _ in results])
    check([(0, 1), (2, 3)], [narrow for _, narrow in results])


def _of_torchs_layer(world):
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank // 2]
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=pair), nn.SyncBatchNorm(3, process_group=dist.group.WORLD))
    syncbn.convert(model)
    return model[0].process_group is pair, model[1].process_group is dist.group.WORLD, model[1]._syncbn.group == Group()


def test_the_group_of_a_torch_sync_batch_norm_is_kept():
    """The default group becomes "all ranks", which outlives it."""
    assert worlds.run(4, _of_torchs_layer) == [(True, True, True)] * 4


def _again(world):
    """A model with groups of a size outlives its process group."""
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), group_size=2)
    everyone = syncbn.convert(nn.BatchNorm2d(3))
    sizes = []
    for attempt in range(3):
        if attempt:
            dist.destroy_process_group()
            assert everyone.process_group is None
            everyone(torch.randn(4, 3, 2, 2))  # alone for the time being
            store = os.path.join(world.directory, f"again-{attempt}")
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=world.rank,
                world_size=world.size,
                timeout=datetime.timedelta(seconds=20),
            )
        x = torch.full((1, 3, 1, 1), float(world.rank))
        for layer in (*model, everyone):
            layer.reset_running_stats()
            layer(x)
        sizes.append((len(collectives._groups_by_size), model[0].running_mean[0].item(), everyone.running_mean[0].item()))
    return sizes


def test_process_groups_destroyed_and_made_again():
    for rank, sizes in enumerate(worlds.run_fresh(4, _again)):
        pair = pytest.approx(0.1 * (0.5 if rank < 2 else 2.5))
        assert [mean for _, *mean in sizes] == [[pair, pytest.approx(0.15)]] * 3
        assert [kept for kept, *_ in sizes] == [1, 2, 2], "the second is gone; the test processes hold the first"


def _copies(world):
    told = []
    for theirs in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=world.group)):
        layer = syncbn.convert(theirs, world.group)
        twin = copy.deepcopy(layer)
        assert twin.process_group is world.group
        with pytest.raises(TypeError) as raised:
            pickle.dumps(layer)
        told.append(str(raised.value))
    assert syncbn.revert(twin).process_group is world.group, "as torch's layer had it"
    return told


def test_a_process_group_is_shared_by_deepcopy_and_refused_by_pickle():
    for messages in worlds.run(2, _copies):
        assert len(messages) == 2
        for message in messages:
            assert "cannot be pickled; expected no group or a group_size: save model.state_dict()" in message


def _warnings(world, broadcast, size):
    model = DistributedDataParallel(syncbn.convert(network(torch.float32), group_size=size))
    model.broadcast_buffers = broadcast
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(4, 2, 9, 9)).sum().backward()
    return [str(w.message) for w in caught if "broadcasts the buffers" in str(w.message)]


@pytest.mark.parametrize(("broadcast", "size", "expected"), [(True, 2, 1), (False, 2, 0), (True, 4, 0)])
def test_ddp_overwriting_the_statistics_of_groups_is_warned_of_once(broadcast, size, expected):
    for seen in worlds.run(4, _warnings, broadcast, size):
        assert len(seen) == expected
        assert all("layer '1' shares statistics among 2 ranks" in message for message in seen)
