"""Population statistics: for any number of ranks, those that one process finds on the whole batches, from the definition."""

import dataclasses

import pytest
import torch
import worlds
from collectives_seen import CollectivesSeen
from populations import STEPS, Network, batch, check, inputs_of, loader, network, population, whole_batches
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import syncbn
from syncbn.population import update_bn_stats


def _updated(world, steps, dtype, pooled, options):
    model = syncbn.convert(network(dtype), world.group)
    data = loader(steps, world.rank, world.size, dtype)
    update_bn_stats(model, data, pooled=pooled, progress=False, **options)
    return model.state_dict()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_find_what_one_process_finds(world, steps, pooled):
    """float64 leaves rounding alone, 1e-12; float32 that of three layers, 1e-6."""
    table = STEPS[steps]
    if world == 1:
        table = [step for step in table if step[0] is not None]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6))[: 2 if world in (1, 4) else 1]:
        calls = inputs_of(network(dtype).double(), [x.double() for x in whole_batches(table, world, dtype)[0]])
        for state in worlds.run(world, _updated, table, dtype, pooled, {}):
            check(state, network(dtype).state_dict(), calls, pooled, tolerance)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_alone(converted, pooled):
    """Without a distributed job, layers of torch and ours are the same."""
    model = syncbn.convert(network()) if converted else network()
    batches = whole_batches(STEPS["unequal"], 4)[0]
    update_bn_stats(model, batches, pooled=pooled, progress=False)
    check(model.state_dict(), network().state_dict(), inputs_of(network(), batches), pooled, 1e-12)


def test_the_estimates_differ():
    """The one over all samples contains the variance of the means."""
    calls = inputs_of(network(), whole_batches(STEPS["equal"], 4)[0])["stem.1.0"]
    assert (population(calls, True)[1] > 1.1 * population(calls, False)[1]).any()


@pytest.mark.parametrize(
    ("num_batches", "table"), [(1, STEPS["unequal"][:1]), (2, STEPS["unequal"][:2]), (9, STEPS["unequal"])]
)
def test_so_many_batches_and_no_more_are_taken(num_batches, table):
    taken = []
    batches = whole_batches(STEPS["unequal"], 2)[0]
    model = syncbn.convert(network())
    stream = (taken.append(1) or x for x in batches)
    update_bn_stats(model, stream, num_batches=num_batches, progress=False)
    assert len(taken) == len(table)
    check(model.state_dict(), network().state_dict(), inputs_of(network(), batches[: len(table)]), False, 1e-12)
    table = STEPS["ranks run out"]
    for state in worlds.run(3, _updated, table, torch.float64, False, {"num_batches": 2}):
        calls = inputs_of(network(), whole_batches(table[:2], 3)[0])
        check(state, network().state_dict(), calls, False, 1e-12)


def _local(world, steps, pooled):
    model = network()
    update_bn_stats(model, loader(steps, world.rank, world.size, torch.float64), pooled=pooled, progress=False)
    assert type(model.twice) is nn.BatchNorm2d
    return model.state_dict()


@pytest.mark.parametrize("pooled", [False, True])
def test_layers_of_torch_have_the_ranks_shares_as_mini_batches(pooled):
    table = [(2, 3, 4, 2), (3, 2, None, 3), (4, None, None, 2)]
    seen = [inputs_of(network(), loader(table, rank, 4, torch.float64)) for rank in range(4)]
    calls = {name: [call for one in seen for call in one[name]] for name in seen[0]}
    for state in worlds.run(4, _local, table, pooled):
        check(state, network().state_dict(), calls, pooled, 1e-12)


def _lazy(world, steps):
    model = syncbn.convert(nn.Sequential(nn.LazyBatchNorm2d(dtype=torch.float64)), world.group)
    update_bn_stats(model, loader(steps, world.rank, world.size, torch.float64), progress=False)
    assert type(model[0]) is syncbn.SyncBatchNorm2d
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_stays_converted_and_has_the_population_of_all_ranks():
    table = STEPS["unequal"]
    model = nn.Sequential(nn.BatchNorm2d(2, dtype=torch.float64))
    calls = inputs_of(model, whole_batches(table, 2)[0])
    for state in worlds.run(2, _lazy, table):
        check(state, model.state_dict(), calls, False, 1e-12)


def _pairs(world, table):
    model = syncbn.convert(network(), group_size=2)
    update_bn_stats(model, loader(table, world.rank, 4, torch.float64), progress=False)
    return model.state_dict()


def test_groups_have_populations_and_numbers_of_batches_of_their_own():
    table = [(2, 3, 1, 2), (2, 1, 2, 3), (None, None, 2, 2), (None, None, None, 2)]
    states = worlds.run(4, _pairs, table)
    wholes, sizes = whole_batches(table, 4)
    for pair, count in ((0, 2), (2, 4)):
        both = [torch.cat(x.split(s)[pair : pair + 2]) for x, s in zip(wholes, sizes, strict=True)][:count]
        calls = inputs_of(network(), both)
        for state in states[pair : pair + 2]:
            check(state, network().state_dict(), calls, False, 1e-12)


class Counting(nn.BatchNorm2d):
    """A user's class whose forward normalizes and counts by itself."""

    def forward(self, input):
        self.num_batches_tracked = self.num_batches_tracked + 1
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        ).relu()


def made_as_ours():
    torch.manual_seed(1)
    layers = [syncbn.SyncBatchNorm2d(2), nn.Conv2d(2, 2, 1), syncbn.SyncBatchNorm2d(2), nn.Conv2d(2, 2, 1), Counting(2)]
    return nn.Sequential(*layers).double()


def test_layers_of_one_name_and_users_classes():
    """Two layers made as ours have the same name in their collectives."""
    batches = whole_batches(STEPS["unequal"], 3)[0]
    calls = inputs_of(made_as_ours(), batches)
    model = made_as_ours()
    syncbn.convert(model[4])
    update_bn_stats(model, batches, progress=False)
    check(model.state_dict(), made_as_ours().state_dict(), calls, False, 1e-12)


def test_batches_of_one_value_and_of_none():
    """A single value counts for the mean; where nothing has a variance, or a value, what was there stays."""
    model = syncbn.SyncBatchNorm1d(3).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    update_bn_stats(model, [x[:1], x[1:2], x[:0]], progress=False)
    assert torch.equal(model.running_mean, x[:2].mean(0))
    assert torch.equal(model.running_var, torch.ones(3).double())
    assert model.num_batches_tracked == 2
    update_bn_stats(model, [x[:0]], progress=False)
    assert torch.equal(model.running_mean, x[:2].mean(0))
    assert model.num_batches_tracked == 2
    update_bn_stats(model, [x[:1], x[1:5]], progress=False)
    check(model.state_dict(), model.state_dict(), {}, False, 0)
    torch.testing.assert_close(model.running_mean, x[:5].mean(0))
    torch.testing.assert_close(model.running_var, x[1:5].var(0))
    update_bn_stats(model, [x[:1], x[1:2]], pooled=True, progress=False)
    torch.testing.assert_close(model.running_var, x[:2].var(0))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 7), lambda x: [x, "label"], lambda x: {"x": x}])
def test_forms_of_batches(wrap):
    batches = whole_batches(STEPS["unequal"], 3)[0]
    model = network()
    update_bn_stats(model, [wrap(x) for x in batches], progress=False)
    check(model.state_dict(), network().state_dict(), inputs_of(network(), batches), False, 1e-12)


def _mappings(world, table):
    """Runs out with keyword arguments, one of them not a tensor and one nested."""

    class Keywords(Network):
        def forward(self, x, pair, scale):
            assert len(pair[0]) == len(x)
            return super().forward(x * scale)

    model = network()
    model.__class__ = Keywords
    syncbn.convert(model, world.group)
    data = loader(table, world.rank, world.size, torch.float64)
    keywords = [{"x": x, "pair": (x[:, 0], "a"), "scale": torch.tensor(1.0)} for x in data]
    update_bn_stats(model, keywords, progress=False)
    return model.state_dict()


def test_a_rank_that_ran_out_goes_on_with_keyword_arguments():
    table = STEPS["ranks run out"]
    calls = inputs_of(network(), whole_batches(table, 2)[0])
    for state in worlds.run(2, _mappings, table):
        check(state, network().state_dict(), calls, False, 1e-12)


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor


class Hidden:
    """Tensors that cannot be reached."""

    def __init__(self, x):
        self.x = x


class Unpacking(Network):
    def forward(self, inputs):
        return super().forward(inputs.x)


def _objects(world, kind, table):
    model = network()
    model.__class__ = Unpacking
    syncbn.convert(model, world.group)
    data = loader(table, world.rank, world.size, torch.float64)
    try:
        update_bn_stats(model, [(kind(x), 0) for x in data], progress=False)
    except TypeError as error:
        return str(error)
    return model.state_dict()


def test_a_rank_that_ran_out_goes_on_with_objects():
    table = STEPS["ranks run out"]
    calls = inputs_of(network(), whole_batches(table, 2)[0])
    for state in worlds.run(2, _objects, Inputs, table):
        check(state, network().state_dict(), calls, False, 1e-12)
    calls = inputs_of(network(), whole_batches(STEPS["unequal"], 2)[0])
    for state in worlds.run(2, _objects, Hidden, STEPS["unequal"]):
        check(state, network().state_dict(), calls, False, 1e-12)


def test_a_rank_that_cannot_go_on_is_an_error_on_all():
    going_on, out = worlds.run(2, _objects, Hidden, STEPS["ranks run out"])
    assert out.startswith("given a batch with a Hidden that holds tensors; expected tensors in lists")
    assert out.endswith("(rank 1 of 4)")
    assert going_on.startswith("given a batch, and another rank, out of them, none that it can empty; expected as many on each")
    assert going_on.endswith("(rank 0 of 4)")


WRAPPERS = {
    "data parallel": lambda model, group: DistributedDataParallel(model, process_group=group),
    "data parallel in one process": lambda model, group: nn.DataParallel(model),
    "averaged": lambda model, group: AveragedModel(model),
    "averaged, compiled": lambda model, group: torch.compile(AveragedModel(model)),
}


def _wrapped_in_eval_mode(world, wrapper):
    model = WRAPPERS[wrapper](syncbn.convert(network(frozen=False), world.group), world.group)
    model.module.eval()
    assert model.training
    update_bn_stats(model, loader(STEPS["unequal"], world.rank, world.size, torch.float64), progress=False)
    return model.module.state_dict()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_in_eval_mode_is_one_in_eval_mode(wrapper):
    """Though its wrapper, which nobody has told, is in training mode: then all layers are updated."""
    batches = whole_batches(STEPS["unequal"], 2)[0]
    model = network(frozen=False).eval()
    update_bn_stats(model, batches, progress=False)
    assert (model.frozen[1].running_mean - network().frozen[1].running_mean).abs().min() > 1e-3
    for state in worlds.run(2, _wrapped_in_eval_mode, wrapper):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def _collectives(world, wrapped):
    model = syncbn.convert(network(torch.float32), world.group)
    if wrapped:
        model = DistributedDataParallel(model, process_group=world.group)
        model.module.frozen.eval()
    with CollectivesSeen() as seen:
        update_bn_stats(model, loader(STEPS["unequal"], world.rank, world.size, torch.float32), progress=False)
    return seen.seen, wrapped and model.broadcast_buffers, (model.module if wrapped else model).state_dict()


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_step_has_its_layers_collectives_and_one_agreement(wrapped):
    """Frozen layers have none, and DistributedDataParallel does not broadcast."""
    agreement = ("allreduce_", torch.float64, 3)
    layers = [("allreduce_", torch.float64, 2 * channels + 1) for channels in (4, 4, 4, 4, 5)]
    calls = inputs_of(network(), whole_batches(STEPS["unequal"], 2)[0])
    for seen, broadcasts, state in worlds.run(2, _collectives, wrapped):
        assert seen == [agreement, *[*layers, agreement] * 3]
        assert broadcasts == wrapped
        check(state, network(torch.float32).state_dict(), calls, False, 1e-5)


def _without_batches(world, having):
    model = syncbn.convert(network(), world.group)
    try:
        update_bn_stats(model, [batch(0, 2)] if world.rank in having else [], progress=False)
    except ValueError as error:
        return str(error), [module.training for module in model.frozen]
    return None


@pytest.mark.parametrize("having", [(), (0,), (0, 2)])
def test_a_rank_that_never_had_a_batch_is_an_error_on_all(having):
    for rank, (message, frozen) in enumerate(worlds.run(3, _without_batches, having)):
        given = "batches, and another rank none" if rank in having else "no batch"
        assert message == f"given a loader of {given} on rank {rank} of 4; expected one batch or more on each rank"
        assert frozen == [False, False]


def test_wrong_numbers():
    with pytest.raises(ValueError, match="given num_batches=0; expected 1 or more"):
        update_bn_stats(network(), [batch(0, 2)], num_batches=0)
    with pytest.raises(ValueError, match="no batch on rank 0 of 1"):
        update_bn_stats(network(), [], progress=False)
    with pytest.raises(ValueError, match="given an empty list on rank 0 of 1; expected a batch, its input first"):
        update_bn_stats(network(), [[]], progress=False)
    parallel = nn.DataParallel(network())
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"given nn.DataParallel over several devices, .*; expected its module"):
        update_bn_stats(parallel, [batch(0, 2)], progress=False)
