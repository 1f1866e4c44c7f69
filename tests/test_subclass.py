"""Conversion of users' subclasses, lazy and parametrized layers: what they add stays, and the statistics are synchronized."""

import copy
import pickle

import batches
import oracle
import pytest
import tolerance
import torch
import torch.nn.functional as F
import worlds
from batches import Case
from collectives_seen import CollectivesSeen
from test_convert import classes, snapshot
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import syncbn

C = batches.CHANNELS


class Named(nn.BatchNorm2d):
    """Adds a method, keeps the forward."""

    def describe(self):
        return f"a norm of {self.num_features}"


class Scaled(nn.BatchNorm2d):
    """Ends in super().forward."""

    factor = 2.0

    def forward(self, input, shift=0.0):
        return super().forward(input * 1.0) * self.factor + shift


class Activated(nn.BatchNorm2d):
    """Calls F.batch_norm itself, then dropout and an activation."""

    def __init__(self, num_features, drop=0.0):
        super().__init__(num_features)
        self.drop = nn.Dropout(drop)
        self.act = nn.ReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        return self.act(self.drop(y))


class AnyDimensions(nn.modules.batchnorm._BatchNorm):
    """Directly of torch's base class."""

    def _check_input_dim(self, input):
        pass


class Twice(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(super().forward(input))


class TwiceByFunction(nn.BatchNorm2d):
    def forward(self, x):
        args = self.running_mean, self.running_var, self.weight, self.bias, self.training
        return F.batch_norm(F.batch_norm(x, *args), *args)


class ByHand(nn.BatchNorm2d):
    def forward(self, x):
        return (x - x.mean((0, 2, 3), keepdim=True)) * self.weight.view(1, -1, 1, 1)


class Frozen(nn.BatchNorm2d):
    """Normalizes by its running statistics whatever its mode."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class OfTorchsSync(nn.SyncBatchNorm):
    pass


class LazyScaled(nn.LazyBatchNorm2d):
    cls_to_become = Scaled


class Squared(nn.Module):
    def forward(self, original):
        return original.square()

    def right_inverse(self, value):
        return value.sqrt()


class Split(nn.BatchNorm2d):
    """Normalizes the halves of a batch apart, the second by a layer of its own."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.other = nn.BatchNorm2d(num_features)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        half = len(x) // 2
        return torch.cat([super().forward(x[:half]), self.other(x[half:])])


class Cluttered(nn.BatchNorm2d):
    """Has names that a library might want for itself."""

    wraps = _redirect = "a class attribute"

    def __init__(self, num_features):
        super().__init__(num_features)
        self.process_group = "of the user"
        self._name = self._build = "an attribute"

    def _train(self, x):
        return x + 1

    def _site(self):
        return 2

    def _forward(self, x):
        return super().forward(self._train(x)) * self._site()

    def forward(self, x):
        return self._forward(x)


class Ghost(nn.BatchNorm2d):
    """Normalizes halves of a batch apart, as more channels."""

    def __init__(self, num_features):
        super().__init__(num_features, track_running_stats=False)

    def forward(self, x):
        halves = x.view(-1, 2 * x.shape[1], *x.shape[2:])
        return F.batch_norm(halves, None, None, self.weight.repeat(2), self.bias.repeat(2), self.training).view_as(x)


class Positive(nn.BatchNorm2d):
    """What it is scaled by is not what is kept under the same name."""

    def __init__(self, channels):
        super().__init__(channels)
        self._parameters["weight"].data.fill_(-2)

    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"].abs() + 1


class WithKeywords(nn.BatchNorm2d):
    def __init_subclass__(cls, registry, **kwargs):
        super().__init_subclass__(**kwargs)


class Permissive(nn.Module):
    """Has every attribute, as wrappers that pass on what they do not know may."""

    original_name = None

    def __getattr__(self, name):
        return super().__getattr__(name) if name.startswith("_") else None


USERS = {"Named": Named, "Scaled": Scaled, "Activated": Activated, "AnyDimensions": AnyDimensions}


@pytest.mark.parametrize("name", USERS)
def test_convert_and_revert_change_the_class_alone(name):
    model = nn.Sequential(nn.Identity(), USERS[name](C))
    before, old = snapshot(model), classes(model)
    syncbn.convert(model)
    layer = model[1]
    assert isinstance(layer, USERS[name])
    assert isinstance(layer, syncbn.SyncBatchNorm if name == "AnyDimensions" else syncbn.SyncBatchNorm2d)
    assert type(layer) is type(syncbn.convert(USERS[name](C))), "one class for all layers of a class"
    assert snapshot(model) == before
    assert repr(layer).startswith(f"Sync{name}(")
    syncbn.revert(syncbn.convert(model))
    assert (snapshot(model), classes(model)) == (before, old)


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_of_the_same_class_and_revert(name, way):
    layer = syncbn.convert(USERS[name](C), group_size=2)
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert type(twin) is type(layer)
    assert twin._syncbn == layer._syncbn
    assert list(twin.state_dict()) == list(layer.state_dict())
    assert type(syncbn.revert(twin)) is USERS[name]


class Reduced(nn.BatchNorm2d):
    """Pickled in its own way, by its name."""

    def __reduce__(self):
        return Reduced, (self.num_features,), vars(self)


class ReducedByType(Reduced):
    """And by the class that it has."""

    def __reduce__(self):
        return type(self), (self.num_features,), vars(self)


@pytest.mark.parametrize("cls", [Reduced, ReducedByType])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_made_in_the_way_of_a_users_class_are_synchronized(cls, way):
    layer = syncbn.convert(cls(C))
    layer.running_mean.fill_(3)
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert type(twin) is type(layer)
    assert twin._syncbn == layer._syncbn
    assert twin.running_mean.tolist() == [3] * C
    assert type(syncbn.revert(twin)) is cls


def test_what_only_looks_converted_is_converted():
    """A layer with the attributes of a converted one, or given its class of before by hand."""
    layer = syncbn.convert(nn.BatchNorm2d(C), group_size=2)
    twin = nn.BatchNorm2d(C)
    vars(twin).update(vars(layer))
    layer.__class__ = nn.BatchNorm2d
    assert type(syncbn.revert(copy.deepcopy(layer))) is nn.BatchNorm2d
    for one in (layer, twin):
        assert type(syncbn.convert(one)) is syncbn.SyncBatchNorm2d
        assert one._syncbn.group == syncbn.collectives.Group(group_size=2)
        assert type(syncbn.revert(one)) is nn.BatchNorm2d


@pytest.mark.parametrize("name", USERS)
def test_alone_and_in_eval_it_computes_what_the_class_computes(name):
    theirs = USERS[name](C)
    mine = syncbn.convert(copy.deepcopy(theirs))
    for training in (True, True, False):
        x = torch.randn(4, C, 3, 3)
        assert torch.equal(mine.train(training)(x), theirs.train(training)(x))
    for (key, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def around(name):
    """What each class does to the normalized value, written for the oracle."""
    return {"Scaled": lambda y: y * 2 + 0.5, "Activated": torch.relu}.get(name, lambda y: y)


def _user_layer(world, name, case):
    xs, dys = batches.make(case)
    layer = syncbn.convert(USERS[name](C).double(), world.group)
    x = xs[world.rank].requires_grad_()
    y = layer(x, shift=0.5) if name == "Scaled" else layer(x)
    y.backward(dys[world.rank])
    tracked = int(layer.num_batches_tracked)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, tracked


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("shares", ["unequal", "empty"])
def test_over_processes_it_is_the_class_on_the_whole_batch(name, shares):
    case = Case(3, shares, dtype=torch.float64)
    xs, dys = batches.make(case)
    after = around(name)
    plain = oracle.batch_norm(xs, dys, running_mean=torch.zeros(C), running_var=torch.ones(C))
    inner = []
    for y, dy in zip(plain.y, dys, strict=True):
        leaf = y.clone().requires_grad_()
        after(leaf).backward(dy)
        inner.append(leaf.grad)
    expected = oracle.batch_norm(xs, inner, running_mean=torch.zeros(C), running_var=torch.ones(C))
    for rank, (y, dx, dweight, dbias, mean, var, tracked) in enumerate(worlds.run(3, _user_layer, name, case)):
        size = max(1.0, *(g.abs().sum().item() for g in inner))
        tolerance.check("y", y, after(expected.y[rank]))
        tolerance.check("dx", dx, expected.dx[rank], scale=5.0)
        tolerance.check("dweight", dweight, expected.dweight[rank], scale=size)
        tolerance.check("dbias", dbias, expected.dbias[rank], scale=size)
        tolerance.check("running_mean", mean, expected.running_mean)
        tolerance.check("running_var", var, expected.running_var)
        assert tracked == 1


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("outer", [Split, Activated])
def test_a_batch_norm_inside_a_users_batch_norm_counts_for_itself(outer, forced):
    theirs = Split(C) if outer is Split else nn.Sequential(Activated(C), Split(C))
    mine = syncbn.convert(copy.deepcopy(theirs))
    for layer in mine.modules():
        layer._force_sync = forced
    for training in (True, False):
        x = torch.randn(8, C, 3, 3)
        expected = theirs.train(training)(x)
        assert (mine.train(training)(x) - expected).abs().max() <= (2e-6 if forced else 0) * expected.abs().max()
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7, msg=name)


class AroundFrozen(nn.BatchNorm2d):
    """Behind a batch norm that goes by its running statistics, in training too."""

    def __init__(self, channels):
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)
        self.inner.running_mean += 2
        self.inner.running_var *= 3

    def train(self, mode=True):
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, x):
        return super().forward(self.inner(x) * 2)


@pytest.mark.parametrize("forced", [True, False])
def test_a_frozen_batch_norm_inside_a_users_batch_norm_counts_for_nothing(forced):
    x, layer = torch.randn(8, C, 3, 3), syncbn.convert(AroundFrozen(C).train())
    for each in layer.modules():
        each._force_sync = forced
    share = (x - 2) / (3 + 1e-5) ** 0.5 * 2
    expected = oracle.batch_norm([share], [torch.zeros_like(share)])
    torch.testing.assert_close(layer(x).double(), expected.y[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.double(), expected.running_mean, rtol=1e-5, atol=1e-5)
    assert layer.inner.running_mean.tolist() == [2.0] * C


def test_dropout_inside_a_users_forward_stays():
    layer = syncbn.convert(Activated(C, drop=0.5))
    layer._force_sync = True
    y = layer(torch.randn(64, C, 4, 4))
    assert 0.7 < (y == 0).float().mean() < 0.8, "half dropped, and half of the rest cut by the ReLU"


@pytest.mark.parametrize(
    ("cls", "how"),
    [
        (Twice, "more than once"),
        (TwiceByFunction, "more than once"),
        (ByHand, r"without F.batch_norm or super\(\).forward"),
    ],
)
@pytest.mark.parametrize("forced", [True, False])
def test_a_forward_that_does_not_normalize_exactly_once_is_named(cls, how, forced):
    model = syncbn.convert(nn.Sequential(cls(C)))
    model[0]._force_sync = forced
    model.eval()(torch.randn(2, C, 3, 3))
    with pytest.raises(ValueError, match=rf"forward normalizes {how}; expected one call .* \(layer '0', rank 0 of 1\)"):
        model.train()(torch.randn(2, C, 3, 3))


def test_a_class_that_normalizes_by_running_statistics_is_left_to_do_so():
    layer = syncbn.convert(Frozen(C))
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(layer(x), Frozen(C)(x))
    assert layer.running_mean.tolist() == [0.0] * C


@pytest.mark.parametrize("make", [lambda: OfTorchsSync(C), lambda: torch.jit.script(nn.BatchNorm2d(C))])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_cannot_be_converted_is_named_and_nothing_changes(make):
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ModuleList([make()]))
    old = classes(model)
    with pytest.raises(ValueError, match=r"expected .*layer '1.0'"):
        syncbn.convert(model)
    assert classes(model) == old
    syncbn.convert(model, skip=lambda name, layer: name == "1.0")
    assert type(model[0]) is syncbn.SyncBatchNorm2d


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("lazy", "ours", "becomes"),
    [
        (nn.LazyBatchNorm1d, syncbn.SyncBatchNorm1d, nn.BatchNorm1d),
        (nn.LazyBatchNorm2d, syncbn.SyncBatchNorm2d, nn.BatchNorm2d),
        (nn.LazyBatchNorm3d, syncbn.SyncBatchNorm3d, nn.BatchNorm3d),
        (LazyScaled, None, Scaled),
    ],
)
def test_lazy_layers_stay_lazy_and_become_ours(lazy, ours, becomes):
    model = nn.Sequential(lazy())
    before = snapshot(model)
    syncbn.convert(model)
    assert isinstance(model[0], lazy)
    assert snapshot(model) == before
    assert type(syncbn.revert(pickle.loads(pickle.dumps(model)))[0]) is lazy
    twin = pickle.loads(pickle.dumps(model))
    for one in (model, twin):
        dimensions = {nn.LazyBatchNorm1d: 0, nn.LazyBatchNorm3d: 3}.get(lazy, 2)
        one(torch.randn(4, C, *[2] * dimensions))
        assert type(one[0]) is (ours or type(syncbn.convert(Scaled(C))))
        assert one[0]._syncbn.path == "0"
        assert one[0].num_features == C
        assert type(syncbn.revert(one)[0]) is becomes


def _lazy(world, name):
    lazy = {"torch": nn.LazyBatchNorm2d, "user": LazyScaled}[name]
    layer = syncbn.convert(lazy(dtype=torch.float64), world.group)
    xs, _ = batches.make(Case(2, dtype=torch.float64))
    with CollectivesSeen() as log:
        y = layer(xs[world.rank])
    return y.detach(), layer.running_mean, len(log.seen)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("name", "factor"), [("torch", 1), ("user", 2)])
def test_the_first_forward_of_a_lazy_layer_is_synchronized(name, factor):
    xs, dys = batches.make(Case(2, dtype=torch.float64))
    expected = oracle.batch_norm(xs, dys, running_mean=torch.zeros(C), running_var=torch.ones(C))
    for rank, (y, mean, collectives) in enumerate(worlds.run(2, _lazy, name)):
        assert collectives == 1
        tolerance.check("y", y / factor, expected.y[rank])
        tolerance.check("running_mean", mean, expected.running_mean)


def _lazy_inside(world):
    """The names that contexts give a lazy model, and the running mean that is moved once for two batches."""
    layer = nn.LazyBatchNorm1d(momentum=0.5, dtype=torch.float64)
    model = syncbn.convert(nn.Sequential(layer), world.group)
    with syncbn.checked(model), syncbn.monitor(model) as watching, syncbn.accumulate_statistics(model):
        for k in range(2):
            model(lazy_input(world.rank, k))
        report = watching.read()
    return list(report.layers), report.collectives, layer.running_mean, layer.num_batches_tracked.item()


def lazy_input(rank, k):
    return torch.randn(2 + rank + k, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * rank + k)) + k + rank


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_one_of_ours_before_its_first_forward():
    every = torch.cat([lazy_input(rank, k) for rank in range(2) for k in range(2)])
    for names, collectives, mean, count in worlds.run(2, _lazy_inside):
        assert (names, collectives, count) == (["0"], 2, 1)
        tolerance.check("running_mean", mean, 0.5 * every.mean(0))


def parametrized():
    model = nn.Sequential(nn.BatchNorm2d(C), Scaled(C))
    for layer in model:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        parametrize.register_parametrization(layer, "weight", Squared())
    return model


def test_parametrized_layers_keep_their_parametrizations():
    model = parametrized()
    before, old = snapshot(model), classes(model)
    x = torch.randn(4, C, 3, 3)
    expected = copy.deepcopy(model)(x)
    syncbn.convert(model)
    assert isinstance(model[0], syncbn.SyncBatchNorm2d)
    assert all(parametrize.is_parametrized(layer, "weight") for layer in model)
    assert snapshot(model) == before
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert torch.equal(one(x), expected)
        one[0]._force_sync = True
        one(x).square().sum().backward()
        assert one[0].parametrizations.weight.original.grad.abs().min() > 0
        del one[0]._force_sync
    syncbn.revert(model)
    assert classes(model) == old, "the exact classes"
    assert [c.__name__ for c in classes(syncbn.revert(twin)).values()] == [c.__name__ for c in old.values()]


def test_parametrizations_removed_after_conversion_stay_removed():
    model = syncbn.convert(parametrized())
    weight = model[0].weight.detach().clone()
    for layer in model:
        parametrize.remove_parametrizations(layer, "weight")
    assert type(model[0]) is syncbn.SyncBatchNorm2d
    assert torch.equal(model[0].weight, weight)
    syncbn.revert(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, Scaled]
    assert torch.equal(model[0].weight, weight)


def test_a_layer_whose_parametrizations_were_removed_can_be_pickled():
    model = syncbn.convert(parametrized())
    for layer in model:
        parametrize.remove_parametrizations(layer, "weight")
    read = pickle.loads(pickle.dumps(model))
    x = torch.randn(4, C, 3, 3)
    assert torch.equal(read(x), model(x))
    assert [type(layer) for layer in syncbn.revert(read)] == [nn.BatchNorm2d, Scaled]


def test_parametrizations_registered_after_conversion_stay():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(C), Scaled(C)))
    for layer in model:
        parametrize.register_parametrization(layer, "bias", Squared())
    x = torch.randn(4, C, 3, 3)
    expected = model.eval()(x)
    assert torch.equal(syncbn.revert(model)(x), expected)
    assert all(parametrize.is_parametrized(layer, "bias") for layer in model)
    assert parametrize.type_before_parametrizations(model[0]) is nn.BatchNorm2d
    assert parametrize.type_before_parametrizations(model[1]) is Scaled
    assert not any(hasattr(layer, "_syncbn") for layer in model)
    for layer in model:
        parametrize.remove_parametrizations(layer, "bias")
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, Scaled]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model[1].weight = model[0].weight
    syncbn.convert(model)
    assert model[0].weight is model[1].weight
    model(torch.randn(4, C, 2, 2)).square().sum().backward()
    assert syncbn.revert(model)[1].weight.grad is model[0].weight.grad


def test_layers_in_two_parents_and_twice_in_one_stay_one_layer():
    shared = Activated(C)
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": nn.Sequential(shared)})
    syncbn.convert(model)
    assert model["a"][0] is model["a"][1] is model["b"][0] is shared
    assert type(shared).__name__ == "SyncActivated"
    assert shared._syncbn.path == "a.0"
    syncbn.revert(model)
    assert type(shared) is Activated


@pytest.mark.parametrize("made", [Cluttered, Ghost, Positive])
def test_what_a_class_has_of_its_own_works_where_batches_are_synchronized(made):
    x = torch.randn(4, C, 2, 3)
    expected = made(C)(x)
    layer = syncbn.convert(made(C))
    layer._force_sync = True
    torch.testing.assert_close(layer(x), expected)
    assert syncbn.revert(layer)(x).equal(expected)


def test_an_attribute_process_group_of_a_users_class_is_the_users():
    layer = syncbn.convert(nn.Sequential(Cluttered(C)))[0]
    assert layer.process_group == "of the user"
    layer.process_group = "still"
    assert (layer.process_group, layer._syncbn.group) == ("still", syncbn.collectives.Group())


def _group_by_assignment(world):
    layers = [syncbn.convert(nn.SyncBatchNorm(C)), syncbn.SyncBatchNorm(C)]
    for layer in layers:
        layer.process_group = world.group
    return [layer.process_group is layer._syncbn.group.process_group is world.group for layer in layers]


def test_a_group_can_be_assigned():
    assert worlds.run(2, _group_by_assignment) == [[True, True]] * 2


def test_a_pruned_layer_goes_by_its_vectors():
    layer = syncbn.convert(nn.BatchNorm2d(C))
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name).data = getattr(layer, name).data[:2]
    layer._force_sync = True
    assert layer(torch.randn(3, 2, 2, 2)).shape == (3, 2, 2, 2)


def test_a_class_that_cannot_be_derived_from_is_named():
    needy = type("Needy", (WithKeywords,), {}, registry=None)
    with pytest.raises(ValueError, match=r"given class Needy.*registry.*skip= \(layer '0'\)"):
        syncbn.convert(nn.Sequential(needy(C)))


def test_a_module_that_has_every_attribute_is_left_alone():
    model = nn.Sequential(Permissive(), nn.BatchNorm2d(C))
    assert type(syncbn.convert(model)[0]) is Permissive
    assert type(syncbn.revert(model)[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("reentrant", [False, True])
def test_batches_that_a_class_counts_itself_are_counted_once_with_checkpointing(reentrant):
    layer = syncbn.convert(Activated(C))
    x = torch.randn(4, C, 2, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert int(layer.num_batches_tracked) == 1
