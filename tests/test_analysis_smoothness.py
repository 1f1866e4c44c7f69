"""Smoothness: the identities of layers against dense Hessians, the landscape and the spectrum, ranks, and the claims."""

import math

import analysis_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn

import syncbn
from syncbn.analysis import batch_norm_smoothness, gradient_landscape, hessian_spectrum
from syncbn.analysis.experiments import inequalities
from syncbn.analysis.experiments import smoothness as experiment

SEEDS = (31,)


class Net(nn.Module):
    """A layer whose input is used beside it too, and whose output is written to."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, eps=eps)
        self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.flat = nn.BatchNorm1d(4, eps=eps)

    def forward(self, x):
        return self.behind(self.norm(y := self.first(x)), y)

    def behind(self, z, y):
        h = self.second((F.softplus(z.mul_(1.5)) + y.tanh()).mean(2))
        return self.last(torch.tanh(self.flat(h)))


def net(eps=1e-5):
    torch.manual_seed(7)
    model = Net(eps).double()
    with torch.no_grad():
        for layer in (model.norm, model.flat):
            layer.weight.copy_(torch.linspace(-1.0, 1.3, len(layer.weight)))
            layer.bias.copy_(torch.linspace(-0.3, 0.2, len(layer.weight)))
    return model


def whole_batch():
    generator = torch.Generator().manual_seed(8)
    return 2 * torch.randn(6, 2, 4, dtype=torch.float64, generator=generator) + 0.5, torch.arange(6) % 3


def cross_entropy(model, batch):
    x, labels, ranks = batch
    return F.cross_entropy(model(x), labels, reduction="sum") * ranks / 6


def share_of(world, sizes):
    x, labels = whole_batch()
    return x.split(sizes)[world.rank], labels.split(sizes)[world.rank], world.size


SIZES = [(6,), (2, 4), (1, 4, 1)]


def _smoothness(world, sizes, eps, converted):
    model = net(eps)
    if converted:
        syncbn.convert(model, world.group)
    return batch_norm_smoothness(model, cross_entropy, share_of(world, sizes), world.group)


def expected_around(eps):
    model, (x, labels) = net(eps), whole_batch()
    y = model.first(x).detach()
    first = oracle.around(model.norm, lambda z: F.cross_entropy(model.behind(z.clone(), y), labels), y)
    h = model.second((F.softplus(1.5 * model.norm(y)) + y.tanh()).mean(2)).detach()
    second = oracle.around(model.flat, lambda z: F.cross_entropy(model.last(torch.tanh(z)), labels), h)
    return {"norm": first, "flat": second}


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("sizes", SIZES)
def test_layers_against_dense_hessians_on_any_number_of_ranks(sizes, eps):
    expected = expected_around(eps)
    for layers in worlds.run(len(sizes), _smoothness, sizes, eps, True):
        assert [layer.name for layer in layers] == ["norm", "flat"]
        for layer in layers:
            for name, value in expected[layer.name]._asdict().items():
                assert getattr(layer, name) == pytest.approx(value, rel=1e-9), (layer.name, name)
            assert layer.gradient_error <= 1e-12
            assert layer.curvature_error <= 1e-10
            gap = layer.scaled_sq - layer.slack_sq - layer.gradient_sq  # the bound, and how near it is
            assert -1e-12 * layer.scaled_sq <= gap <= (1e-4 if eps == 1e-5 else 1) * layer.scaled_sq
            assert (gap > 1e-3 * layer.scaled_sq) == (eps == 0.3)


def test_ranks_that_do_not_synchronize_have_their_own_statistics():
    """Torch's layers: the identities hold for each rank's share."""
    for layers in worlds.run(2, _smoothness, (3, 3), 0.3, False):
        assert max(layer.gradient_error for layer in layers) <= 1e-12
        assert max(layer.curvature_error for layer in layers) <= 1e-10
        assert layers[0].gradient_sq != pytest.approx(expected_around(0.3)["norm"].gradient_sq, rel=1e-3)


def test_the_published_gradient_bound_is_an_equality_for_eps_of_zero_alone():
    """What the tools say: with ε it stays a bound."""
    small, large = (batch_norm_smoothness(net(eps), cross_entropy, (*whole_batch(), 1))[1] for eps in (1e-30, 0.3))
    assert small.gradient_sq == pytest.approx(small.scaled_sq - small.slack_sq, rel=1e-11)
    assert large.gradient_sq < (large.scaled_sq - large.slack_sq) * (1 - 1e-3)
    assert large.curvature_error <= 1e-10


def test_layers_that_do_not_normalize_by_their_batch_are_left_out():
    model = net()
    model.norm.eval()
    assert [layer.name for layer in batch_norm_smoothness(model, cross_entropy, (*whole_batch(), 1))] == ["flat"]
    assert not model.norm.training
    with pytest.raises(ValueError, match="no batch norm layer normalizes by its batch"):
        batch_norm_smoothness(net().eval(), cross_entropy, (*whole_batch(), 1))


class Calling(nn.Module):
    """`net()` of ours, whose first layer is called in a way: call(norm, y, mask)."""

    def __init__(self, call):
        super().__init__()
        self.net, self.call = syncbn.convert(net(0.3)), call

    def forward(self, x):
        y = self.net.first(x)
        return self.net.behind(self.call(self.net.norm, y, torch.arange(18).view(6, 3) % 4 > 0), y)


def test_masked_calls_are_left_out_however_the_mask_is_given():
    batch = (*whole_batch(), 1)
    ways = [lambda norm, y, mask: norm(y, mask), lambda norm, y, mask: norm(y, mask=mask)]
    ((one,), (other,)) = (batch_norm_smoothness(Calling(call), cross_entropy, batch) for call in ways)
    assert one == other
    assert one.name == "net.flat"
    assert max(one.gradient_error, one.curvature_error) <= 1e-10


def test_a_call_without_a_mask_is_seen_however_the_input_is_given():
    batch, expected = (*whole_batch(), 1), expected_around(0.3)["norm"]
    for call in (
        lambda norm, y, mask: norm(input=y),
        lambda norm, y, mask: norm(y, None),
        lambda norm, y, mask: norm(y, mask=None),
    ):
        layers = batch_norm_smoothness(Calling(call), cross_entropy, batch)
        assert [layer.name for layer in layers] == ["net.norm", "net.flat"]
        assert layers[0].curvature == pytest.approx(expected.curvature, rel=1e-9)
        assert layers[0].gradient_sq == pytest.approx(expected.gradient_sq, rel=1e-9)


class Distilled(nn.Module):
    """A student beside a teacher in training mode that needs no gradient."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = net(0.3), net(0.3)

    def forward(self, x):
        with torch.no_grad():
            self.teacher(x)
        return self.student(x)


def test_calls_without_a_graph_are_left_out():
    expected = expected_around(0.3)
    layers = batch_norm_smoothness(Distilled(), cross_entropy, (*whole_batch(), 1))
    assert [layer.name for layer in layers] == ["student.norm", "student.flat"]
    for layer in layers:
        assert layer.curvature == pytest.approx(expected[layer.name.removeprefix("student.")].curvature, rel=1e-9)
    with pytest.raises(ValueError, match="no batch norm layer normalizes by its batch"):
        batch_norm_smoothness(OnlyTeacher(), lambda model, x: model(x).square().mean(), whole_batch()[0][:, 0, :3])


class OnlyTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        with torch.no_grad():
            x = self.norm(x)
        return self.last(x)


def _torchs_own(world):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net(), world.group)
    try:
        batch_norm_smoothness(model, cross_entropy, share_of(world, (3,) * world.size), world.group)
    except ValueError as error:
        return str(error)
    return "no error"


def test_torchs_synchronized_layer_is_refused():
    for told in worlds.run(2, _torchs_own):
        assert told.startswith("given layer 'norm', a torch.nn.SyncBatchNorm of 2 ranks; expected layers of syncbn")


def test_a_layer_on_the_data_itself():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    (layer,) = batch_norm_smoothness(model, lambda model, x: model(x).square().mean(), whole_batch()[0][:, 0, :3])
    assert layer.gradient_sq > 0
    assert layer.curvature_error < 1e-10


def _landscape(world, sizes):
    model = syncbn.convert(net(), world.group)
    return gradient_landscape(model, cross_entropy, share_of(world, sizes), 0.2, (0.5, 1, 4), world.group)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_landscape_on_any_number_of_ranks(sizes):
    model, batch = net(), (*whole_batch(), 1)
    points = [oracle.along_the_gradient(model, cross_entropy, batch, 0.2 * factor) for factor in (0.5, 1, 4)]
    losses = [value for value, _, _ in points]
    distances = [(start - there).norm().item() for _, start, there in points]
    norm = points[0][1].norm().item()
    for seen in worlds.run(len(sizes), _landscape, sizes):
        assert seen.steps == pytest.approx((0.1, 0.2, 0.8))
        assert seen.losses == pytest.approx(losses, rel=1e-11)
        assert seen.distances == pytest.approx(distances, rel=1e-10)
        assert seen.cosines == pytest.approx([F.cosine_similarity(a, b, dim=0).item() for _, a, b in points], rel=1e-10)
        assert seen.gradient_norm == pytest.approx(norm, rel=1e-11)
        assert seen.loss_range == pytest.approx(max(losses) - min(losses), rel=1e-10)
        assert seen.predictiveness == pytest.approx(max(distances), rel=1e-10)
        betas = [distance / (step * norm) for distance, step in zip(distances, (0.1, 0.2, 0.8), strict=True)]
        assert seen.effective_beta == pytest.approx(max(betas), rel=1e-10)


def _spectrum(world, sizes):
    model = syncbn.convert(net(), world.group)
    return hessian_spectrum(model, cross_entropy, share_of(world, sizes), 25, 3, world.group)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_ends_of_the_spectrum_on_any_number_of_ranks(sizes):
    """A biased convolution before batch norm adds zeros; the rest is distinct."""
    exact = torch.linalg.eigvalsh(oracle.hessian(net(), cross_entropy, (*whole_batch(), 1)))
    for ritz in worlds.run(len(sizes), _spectrum, sizes):
        assert ritz.values[0].item() == pytest.approx(exact[-1].item(), rel=1e-8)
        assert ritz.values[1].item() == pytest.approx(exact[-2].item(), rel=1e-6)
        assert ritz.values[-1].item() == pytest.approx(exact[0].item(), rel=1e-6)
        for value, residual in zip(ritz.values, ritz.residuals, strict=True):
            assert (exact - value).abs().min() <= residual + 1e-11


def test_the_effective_beta_of_small_steps_is_within_the_spectrum():
    batch = (*whole_batch(), 1)
    seen = gradient_landscape(net(), cross_entropy, batch, 1e-5)
    ritz = hessian_spectrum(net(), cross_entropy, batch, 40)
    assert 0 < seen.effective_beta <= max(ritz.values[0].item(), -ritz.values[-1].item()) * (1 + 1e-3)


def test_bad_input():
    batch = (*whole_batch(), 1)
    for lr in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected numbers above 0"):
            gradient_landscape(net(), cross_entropy, batch, lr)
    with pytest.raises(ValueError, match="expected numbers above 0"):
        gradient_landscape(net(), cross_entropy, batch, 0.1, ())
    with pytest.raises(ValueError, match="gradient is zero"):
        gradient_landscape(net(), lambda model, x: 0 * model(x).sum(), batch[0], 0.1)
    broken = net()
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = math.nan
    found = hessian_spectrum(broken, cross_entropy, batch, 3)
    assert found.values.isnan().all()
    assert found.residuals.isnan().all()
    with pytest.raises(ValueError, match="given iterations=0"):
        hessian_spectrum(net(), cross_entropy, batch, 0)


@pytest.mark.parametrize("trial", range(20))
def test_minimax_and_initialization(trial):
    random, attained = inequalities.minimax_gap(4000 + trial)
    assert random <= 1 + 1e-12
    assert attained <= 1e-12
    assert inequalities.start_gap(4000 + trial) == pytest.approx(1, abs=1e-12)
    assert inequalities.invariance_error(4000 + trial) <= 1e-11


def test_identities_on_random_networks():
    for eps, gradient, curvature in ((1e-30, 1e-11, 1e-10), (0.1, 1e-11, 1e-10)):
        errors = inequalities.worst_errors((41, 42), 10, eps)
        assert errors[0] <= gradient
        assert errors[1] <= curvature
        assert errors[2] <= 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_is_smoother_with_batch_norm(seed):
    """Learning rate 0.1: largest loss range 5 times, mean ‖ΔG‖ 3 times, largest β 1.5 times that with batch norm, or more."""
    plain, normed = (experiment.landscape(seed, norm, 10, spectrum=False) for norm in (False, True))
    ranges = [max(high - low for low, high in run.ranges) for run in (plain, normed)]
    assert ranges[0] >= 5 * ranges[1]
    assert sum(plain.distances) >= 3 * sum(normed.distances)
    assert max(plain.betas) >= 1.5 * max(normed.betas)


@pytest.mark.parametrize(("gain", "lr"), [(0.5, 0.01), (2.0, 0.3)])
def test_batch_norm_trains_at_learning_rates_and_initializations_where_the_network_without_does_not(gain, lr):
    assert experiment.cell_accuracy(SEEDS[0], True, gain, lr) >= 0.9
    assert experiment.cell_accuracy(SEEDS[0], False, gain, lr) < 0.9
