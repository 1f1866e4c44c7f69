"""Population statistics: for any number of ranks, those that one process finds on the whole batches, from the definition."""

import dataclasses
import io
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
import worlds
from collectives_seen import CollectivesSeen
from oracle import flat
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.population import pool_running_stats, update_bn_stats

# Samples of each of up to four ranks at each step; None: that rank has run out.
STEPS = {
    "equal": [(2, 2, 2, 2)] * 3,
    "unequal": [(2, 4, 1, 3), (3, 2, 5, 0), (2, 1, 2, 1)],
    "empty shares": [(3, 0, 2, 0), (0, 4, 0, 1), (2, 2, 0, 0)],
    "ranks run out": [(2, 3, 1, 2), (3, 1, None, 3), (4, None, None, 2), (2, None, None, None)],
    "the first runs out": [(2, 1, 1, 2), (None, 3, 2, 1), (None, 2, None, 1)],
}


class Network(nn.Module):
    """Nested, with a layer called twice in a forward, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU()))
        self.twice = nn.BatchNorm2d(4, affine=False)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(nn.Flatten(1), nn.Linear(16, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 2))

    def forward(self, x):
        x = self.stem(self.frozen(x))
        x = self.twice(x * 2 + 1)
        return self.head(self.pool(self.untracked(torch.relu(self.twice(x.tanh() - 2)))))


def network(dtype=torch.float64, frozen=True):
    torch.manual_seed(0)
    model = Network()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
        elif "frozen" in name:
            buffer.fill_(3)
    model.train()
    if frozen:
        model.frozen.eval()
    return model.to(dtype)


def batch(step, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64) * (1 + step) + 2 * step).to(dtype)


def whole_batches(steps, world, dtype=torch.float64):
    """The batches of one process, and of each rank, by step."""
    sizes = [[size or 0 for size in step[:world]] for step in steps]
    return [batch(number, sum(shares), dtype) for number, shares in enumerate(sizes)], sizes


def loader(steps, rank, world, dtype):
    """The batches of one rank."""
    wholes, sizes = whole_batches(steps, world, dtype)
    pairs = zip(wholes, sizes, steps, strict=True)
    return [whole.split(shares)[rank] for whole, shares, step in pairs if step[rank] is not None]


def inputs_of(model, batches):
    """What each batch norm layer of a model of torch's layers is called with: by name, (m, C) float64 for each call."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.running_mean is not None:
            seen[name] = []
            layer.register_forward_hook(lambda layer, args, y, name=name: seen[name].append(flat(args[0].detach().double())))
    for x in batches:
        model(x)
    return seen


def population(calls, pooled):
    """Mean and variance from the definition, and the number of mini-batches."""
    calls = [values for values in calls if len(values)]
    every = torch.cat(calls)
    if pooled:
        return every.mean(0), every.var(0), len(calls)
    several = [values for values in calls if len(values) > 1]
    mean = sum(values.mean(0) * len(values) for values in calls) / len(every)
    return mean, sum(values.var(0) * len(values) for values in several) / sum(map(len, several)), len(calls)


def check(state, before, calls, pooled, tolerance):
    """The state of each layer that was called is that of its population, and all else is as it was."""
    expected = dict(before)
    for name, values in calls.items():
        mean, var, count = population(values, pooled)
        expected |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
        expected[f"{name}.num_batches_tracked"] = torch.tensor(count)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if name.rpartition(".")[0] not in calls or "running" not in name:
            assert torch.equal(state[name].double(), value.double()), name
        else:
            off = ((state[name].double() - value).abs().max() / value.abs().max()).item()
            assert off <= tolerance, f"{name} off by {off:.2g}"


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


@pytest.mark.parametrize(("num_batches", "table"), [(2, STEPS["unequal"][:2]), (9, STEPS["unequal"])])
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


def _wrapped_in_eval_mode(world):
    model = DistributedDataParallel(syncbn.convert(network(frozen=False), world.group), process_group=world.group)
    model.module.eval()
    assert model.training
    update_bn_stats(model, loader(STEPS["unequal"], world.rank, world.size, torch.float64), progress=False)
    return model.module.state_dict()


def test_a_wrapped_model_in_eval_mode_is_one_in_eval_mode():
    """Though its wrapper, which nobody has told, is in training mode: then all layers are updated."""
    batches = whole_batches(STEPS["unequal"], 2)[0]
    model = network(frozen=False).eval()
    update_bn_stats(model, batches, progress=False)
    assert (model.frozen[1].running_mean - network().frozen[1].running_mean).abs().min() > 1e-3
    for state in worlds.run(2, _wrapped_in_eval_mode):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


class TroubleError(Exception):
    pass


def traces(model):
    """What must be as it was."""
    modes = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return modes, [getattr(m, "momentum", None) for m in model.modules()], [vars(m).keys() for m in model.modules()]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("trouble", ["none", "model", "loader", "layer"])
def test_all_but_the_statistics_is_left_as_it_was(trouble, training, converted):
    model = network()
    if converted:
        syncbn.convert(model)
    if not training:
        model.eval()
    model.head.register_forward_hook(lambda *_: None)
    if trouble == "model":
        model.pool.register_forward_hook(lambda layer, args, y: raise_trouble() if len(y) == 3 else None)
    if trouble == "layer":
        model.twice.register_forward_hook(lambda layer, args, y: raise_trouble() if len(y) == 3 else None)
    before, state = traces(model), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [id(buffer) for buffer in model.buffers()]

    def stream():
        yield batch(0, 2)
        if trouble == "loader":
            raise_trouble()
        yield batch(1, 3)

    if trouble == "none":
        update_bn_stats(model, stream(), progress=False)
    else:
        with pytest.raises(TroubleError):
            update_bn_stats(model, stream(), progress=False)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert traces(model) == before
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(p.grad is None for p in model.parameters())


def raise_trouble():
    raise TroubleError


def test_modes_are_those_of_the_model():
    """Layers in eval mode in a training model are frozen; a model in eval mode is updated whole, its dropout off."""
    modes = []
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())).eval()
    model[2][1].register_forward_hook(lambda layer, args, y: modes.append((model[0].training, layer.training)))
    x = torch.randn(6, 3)
    update_bn_stats(model, [x], progress=False)
    assert model[0].num_batches_tracked == model[2][0].num_batches_tracked == 1
    model.train()
    model[0].eval()
    update_bn_stats(model, [x, x], progress=False)
    assert (model[0].num_batches_tracked, model[2][0].num_batches_tracked) == (1, 2)
    assert modes == [(True, False), (False, True), (False, True)]


@pytest.mark.parametrize("trouble", [False, True])
def test_layers_that_are_no_batch_norm_keep_their_statistics(trouble):
    """In a training model, whose instance norm moves with every forward."""

    lazy = nn.LazyInstanceNorm1d(track_running_stats=True)
    model, x = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3), lazy), torch.randn(4, 3, 5) + 2
    with torch.no_grad():
        model[0].running_mean.fill_(0.25)
        model[0].running_var.fill_(4.0)
    buffers = [id(buffer) for buffer in model[0].buffers()]
    if trouble:
        hook = model[2].register_forward_hook(lambda layer, args, y: raise_trouble())
        with pytest.raises(TroubleError):
            update_bn_stats(model, [x], progress=False)
        hook.remove()
    else:
        update_bn_stats(model, [x, x + 1], progress=False)
        y = nn.functional.instance_norm(x)  # by its own statistics, whatever was added
        torch.testing.assert_close(model[1].running_var, y.transpose(0, 1).flatten(1).var(1))
        assert model[1].num_batches_tracked == 2
    assert model[0].running_mean.eq(0.25).all()
    assert model[0].running_var.eq(4).all()
    assert model[0].num_batches_tracked == 0
    assert [id(buffer) for buffer in model[0].buffers()] == buffers
    model(x)
    assert model[0].running_mean.ne(0.25).all(), "it moves in training as ever"


class Unmeasured(list):
    """Batches whose number is not known."""

    def __init__(self, batches, error):
        super().__init__(batches)
        self.error = error

    def __len__(self):
        raise self.error


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
@pytest.mark.parametrize("num_batches", [None, 2])
def test_a_loader_without_a_length_has_a_bar_without_an_end(error, num_batches):
    model = nn.BatchNorm1d(3)
    x = torch.randn(7, 3)
    with redirect_stderr(io.StringIO()) as shown:
        update_bn_stats(model, Unmeasured([x, x + 1, x + 2], error), num_batches=num_batches)
    torch.testing.assert_close(model.running_mean, x.mean(0) + (1 if num_batches is None else 0.5))
    assert ("3batch" if num_batches is None else "2/2") in shown.getvalue()


def test_nothing_to_update_takes_no_batch():
    def unread():
        raise_trouble()
        yield

    frozen = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False))
    update_bn_stats(frozen, unread(), progress=False)
    update_bn_stats(nn.Linear(2, 3), unread(), progress=False)
    assert frozen[1].running_mean.tolist() == [0.0] * 3
    assert frozen[1].num_batches_tracked == 0


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


def test_a_compiled_model_runs_eagerly():
    batches = whole_batches(STEPS["unequal"], 3)[0]
    model = syncbn.convert(network())
    model.head.compile()
    update_bn_stats(torch.compile(model), batches, progress=False)
    check(model.state_dict(), network().state_dict(), inputs_of(network(), batches), False, 1e-12)


def _with_bar(world, progress):
    model = syncbn.convert(network(), world.group)
    with redirect_stderr(io.StringIO()) as shown:
        update_bn_stats(model, [batch(0, 2)] * 3, num_batches=2, progress=progress)
    return shown.getvalue()


def test_the_progress_bar_is_on_rank_0_alone(monkeypatch):
    first, second = worlds.run(2, _with_bar, True)
    assert "2/2" in first
    assert second == ""
    assert worlds.run(2, _with_bar, False) == ["", ""]
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert _with_bar(SimpleNamespace(group=None), True) == ""


# ---- pool_running_stats

COUNTS = {"alike": (5, 5, 5, 5), "unequal": (1, 6, 3, 2), "one never trained": (4, 0, 2, 1), "uncounted": (0, 0, 0, 0)}


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
