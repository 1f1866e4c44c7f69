"""Whatever happens in a measure, the model is afterwards as it was: parameters, gradients, buffers, modes, random state."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.analysis import (
    BatchNoise,
    batch_norm_smoothness,
    gradient_bias,
    gradient_correlation,
    gradient_growth,
    gradient_landscape,
    hessian_spectrum,
)


class PassError(Exception):
    """Raised in a pass on purpose."""


def network():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        BatchNoise(0, 0),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )
    model[6].eval()
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 0.5)
    model.double()
    return model


def batch(size=9):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, dtype=torch.float64, generator=generator), torch.arange(size) % 3


class Loss:
    """Cross entropy; tramples on what it should leave alone, and raises in its n-th call."""

    def __init__(self, raises_at=None):
        self.calls, self.raises_at, self.seen = 0, raises_at, []

    def __call__(self, model, batch):
        self.calls += 1
        self.seen.append((torch.rand(3), model[1].running_mean.clone(), model[2].step.clone()))
        output = model(batch[0])
        if self.calls == self.raises_at:
            model.eval()
            model[5].bias.requires_grad_(True)
            model[0].weight.grad.mul_(2)
            model[7].weight.grad = torch.ones_like(model[7].weight)
            raise PassError
        return F.cross_entropy(output, batch[1])


MEASURES = {
    "growth": lambda model, loss, batch: gradient_growth(model, loss, batch),
    "shift": lambda model, loss, batch: gradient_correlation(model, loss, batch, 0.1),
    "shift by Adam": lambda model, loss, batch: gradient_correlation(model, loss, batch, torch.optim.Adam(model.parameters())),
    "smoothness": batch_norm_smoothness,
    "landscape": functools.partial(gradient_landscape, lr=0.1),
    "spectrum": functools.partial(hessian_spectrum, iterations=3),
    "bias": lambda model, loss, batch: gradient_bias(model, loss, lambda number: [batch, batch], batch, 2),
}
CALLS = {"growth": 1, "shift": 4, "shift by Adam": 4, "smoothness": 1, "landscape": 5, "spectrum": 1, "bias": 5}


class Snapshot:
    """Of all that a measure could change, by value and by identity."""

    def __init__(self, model):
        self.random = torch.get_rng_state()
        self.modes = [(module, module.training) for module in model.modules()]
        self.tensors = [(t, t.clone(), t.requires_grad) for t in (*model.parameters(), *model.buffers())]
        self.gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]

    def check(self, model):
        assert torch.equal(torch.get_rng_state(), self.random)
        assert [(module, module.training) for module in model.modules()] == self.modes
        for now, (tensor, value, requires_grad) in zip((*model.parameters(), *model.buffers()), self.tensors, strict=True):
            assert now is tensor
            assert torch.equal(now, value)
            assert now.requires_grad == requires_grad
        for parameter, gradient, value in self.gradients:
            assert parameter.grad is gradient
            assert gradient is None or torch.equal(gradient, value)
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == self.hooks


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_leaves_the_model_as_it_was(name):
    model, loss = network(), Loss()
    before = Snapshot(model)
    MEASURES[name](model, loss, batch())
    before.check(model)
    assert loss.calls == CALLS[name]


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, calls in CALLS.items() for at in range(1, calls + 1)])
def test_an_exception_in_any_pass_leaves_the_model_as_it_was(name, at):
    model = network()
    before = Snapshot(model)
    with pytest.raises(PassError):
        MEASURES[name](model, Loss(at), batch())
    before.check(model)


def test_the_snapshot_sees_changes():
    for change in (
        lambda model: model.eval(),
        lambda model: torch.rand(1),
        lambda model: model[1].running_mean.add_(1),
        lambda model: model[0].weight.grad.add_(1),
        lambda model: model[0].weight.data.add_(1),
        lambda model: model[7].bias.requires_grad_(False),
        lambda model: model.zero_grad(),
        lambda model: model.register_forward_hook(print),
    ):
        model = network()
        before = Snapshot(model)
        change(model)
        with pytest.raises(AssertionError):
            before.check(model)


@pytest.mark.parametrize("name", MEASURES)
def test_every_pass_begins_alike(name):
    """The same random numbers, running statistics and steps of noise; and so the same figures twice."""
    model, loss = network(), Loss()
    one, other = (MEASURES[name](model, loss, batch()) for _ in range(2))
    assert repr(one) == repr(other)
    assert len(loss.seen) == 2 * CALLS[name]
    for seen in loss.seen:
        assert all(torch.equal(a, b) for a, b in zip(seen, loss.seen[0], strict=True))


FRESH = ["growth", "smoothness", "spectrum", "bias"]  # which take no steps


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("converted", [False, True])
def test_a_graph_made_before_can_be_differentiated(name, converted):
    """Also by batch norm of torch, which saves its running statistics, and with gradients already there."""
    model = network() if not converted else syncbn.convert(network())
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    random = torch.get_rng_state()
    before = F.cross_entropy(model(batch()[0]), batch()[1])
    expected = torch.autograd.grad(before, model[0].weight, retain_graph=True)[0] + model[0].weight.grad
    torch.set_rng_state(random)
    statistics = model[1].running_mean.clone()
    MEASURES[name](model, Loss(), batch())
    before.backward()
    assert torch.equal(model[0].weight.grad, expected)
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("name", MEASURES)
def test_forwards_of_a_measure_are_no_micro_batches(name):
    """Inside of accumulate_statistics, whose statistics are those of the two calls beside it."""
    with_measure, plain = (syncbn.convert(network()) for _ in range(2))
    noise = torch.get_rng_state()
    for model in (with_measure, plain):
        torch.set_rng_state(noise)
        with syncbn.accumulate_statistics(model):
            model(batch()[0])
            if model is with_measure:
                MEASURES[name](model, Loss(), batch())
            model(batch()[0] + 1)
    assert plain[1].running_mean.abs().max() > 0
    for (path, tensor), other in zip(with_measure.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), path
    assert with_measure[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["growth", "landscape"])
def test_a_measure_counts_the_same_inside_of_accumulate_statistics(name):
    model = syncbn.convert(network())
    expected = MEASURES[name](model, Loss(), batch())
    with syncbn.accumulate_statistics(model):
        assert MEASURES[name](model, Loss(), batch()) == expected


def _wrapped(world):
    """In DistributedDataParallel and out of it; the gradients of a backward of the user's own follow."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    syncbn.convert(model, world.group)
    wrapped = DistributedDataParallel(model, process_group=world.group)
    share = tuple(part.chunk(world.size)[world.rank] for part in batch(8))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    twice = [DistributedDataParallel(torch.compile(model), process_group=world.group), torch.compile(wrapped)]
    ways = (model, wrapped, *twice)
    found = [gradient_correlation(each, loss, share, 0.5, world.group).layers[1] for each in ways]
    loss(wrapped, share).backward()
    return found, model[0].weight.grad


def test_a_wrapped_model_is_measured_and_trains_on():
    (found, gradient), (_, other) = worlds.run(2, _wrapped)
    assert found == [found[0]] * 4, "names and figures, wrapped or not"
    assert torch.equal(gradient, other)
    ((alone, expected),) = worlds.run(1, _wrapped)
    assert found[0][1:] == pytest.approx(alone[0][1:], rel=1e-11)
    assert torch.allclose(gradient, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("way", [lambda model: torch.compile(model, backend="eager"), lambda model: model.compile() or model])
def test_a_compiled_model_runs_eagerly(way):
    plain = gradient_growth(network(), Loss(), batch())
    assert gradient_growth(way(network()), Loss(), batch()) == plain


def embedding(sparse):
    torch.manual_seed(4)
    return nn.Sequential(nn.Embedding(5, 4, sparse=sparse), *network()).double()


class OfNumbers(Loss):
    """Of the samples' numbers."""

    def __call__(self, model, batch):
        return F.cross_entropy(model(batch[1]), batch[1])


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "shift by Adam"])
def test_sparse_gradients_are_as_dense_ones(name):
    """Of an embedding that is the first layer; every sample three times."""
    sparse, dense = (MEASURES[name](embedding(flag), OfNumbers(), batch()) for flag in (True, False))
    assert repr(sparse) == repr(dense)


@pytest.mark.parametrize("name", MEASURES)
def test_complex_parameters_are_refused(name):
    model = network()
    model[2].register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex128)))
    before, loss = Snapshot(model), Loss()
    with pytest.raises(ValueError, match=r"given parameter '2\.phase' of torch\.complex128; expected real parameters"):
        MEASURES[name](model, loss, batch())
    before.check(model)
    assert loss.calls == 0
    model[2].phase.requires_grad_(False)
    assert repr(MEASURES[name](model, Loss(), batch())) == repr(MEASURES[name](network(), Loss(), batch()))


@pytest.mark.parametrize("name", MEASURES)
def test_sharded_parameters_are_refused(name):
    """Forward takes what fully_shard gathers: those that the model shows have no gradient."""
    model = network()
    model[2].register_parameter("shard", nn.Parameter(torch.ones(3)))
    model[2].shard.device_mesh = "mesh"
    loss = Loss()
    with pytest.raises(ValueError, match=r"given parameter '2\.shard' sharded over mesh, as fully_shard leaves it; expected"):
        MEASURES[name](model, loss, batch())
    assert loss.calls == 0


def _flat(world):
    wrapped = FullyShardedDataParallel(
        network(), process_group=world.group, device_id=torch.device("cpu"), use_orig_params=True
    )
    errors = []
    for model, measure in itertools.product((wrapped, nn.Sequential(wrapped)), MEASURES.values()):
        try:
            measure(model, Loss(), batch())
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_flat_parameters_are_refused():
    (errors, others) = worlds.run(2, _flat)
    expected = "in FullyShardedDataParallel, which shards its parameters; expected whole ones: measure the model before it is "
    said = [f"given {where} {expected}wrapped, or a copy with the same state" for where in ("a model", "module '0'")]
    assert errors == others == [said[0]] * len(MEASURES) + [said[1]] * len(MEASURES)


class Caching(nn.Module):
    """Registers a buffer in its first forward, and has one whose elements are one in memory."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double()
        self.register_buffer("scale", torch.full((1,), 2.0, dtype=torch.float64).expand(3))
        self.made = 0

    def forward(self, x):
        if "cache" not in self._buffers:
            self.made += 1
            self.register_buffer("cache", x.detach().mean(0).sum().expand(3), persistent=False)
        return self.norm(self.linear(x)) * self.scale + self.cache


@pytest.mark.parametrize("name", MEASURES)
def test_buffers_made_in_a_pass_and_buffers_of_one_element_in_memory(name):
    model = Caching()
    before, calls = Snapshot(model), []

    def loss(model, batch):
        calls.append(None)
        return F.cross_entropy(model(batch[0]), batch[1])

    MEASURES[name](model, loss, batch())
    before.check(model)
    assert [*model._buffers] == ["scale"]
    assert model.made == len(calls), "passes begin alike"
    assert not model._non_persistent_buffers_set


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|sparse CSR|Sparse invariant)")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_buffers(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double()
            self.register_buffer("edges", getattr(torch.eye(9, dtype=torch.float64), layout)())

        def forward(self, x):
            return self.norm(self.edges @ self.linear(x))

    model = Graph()
    found = gradient_growth(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch())
    assert found.first_over_last == 1
    assert model.norm.running_mean.tolist() == [0, 0, 0]


def test_an_expanded_buffer_that_a_pass_writes_to_is_as_before():
    model = Caching()

    def loss(model, batch):
        model.scale[:1] = 5.0
        return F.cross_entropy(model(batch[0]), batch[1])

    gradient_growth(model, loss, batch())
    assert model.scale.tolist() == [2.0, 2.0, 2.0]


def test_inside_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside of torch\.inference_mode\(\); expected it outside"):
        gradient_growth(network(), Loss(), batch())


def test_inside_no_grad():
    model = network()
    plain = gradient_growth(model, Loss(), batch()).first_over_last
    with torch.no_grad():
        assert gradient_growth(model, Loss(), batch()).first_over_last == plain
