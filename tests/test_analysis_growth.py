"""Gradient growth: the closed forms, and the norms and factors of a network on one to three ranks."""

import functools
import math

import analysis_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn

import syncbn
from syncbn.analysis import advice, gradient_growth, growth_factor
from syncbn.analysis.experiments import growth as experiment
from syncbn.analysis.experiments import growth_limits
from syncbn.analysis.growth import Growth, NormLayer, fitted
from syncbn.analysis.networks import NO_EPS

# λ² by B: derived by hand and measured by another program than this package.
RELU = {4: 3.084, 8: 1.788, 16: 1.590, 32: 1.522, 64: 1.4931, 128: 1.4797, 256: 1.4732, math.inf: 1.46694}
LIMITS = {
    "tanh": (torch.tanh, 1.0, 1.178),
    "sigmoid": (torch.sigmoid, 1.0, 1.034),
    "leaky ReLU": (functools.partial(F.leaky_relu, negative_slope=0.1), 1.0, 1.343),
    "GELU": (F.gelu, 1.0, 1.319),
    "tanh, gain 3": (torch.tanh, 3.0, 2.104),
    "tanh, gain 0.5": (torch.tanh, 0.5, 1.034),
}
SEEDS = (101, 102, 103)


@pytest.mark.parametrize("values", RELU)
def test_closed_forms(values):
    assert growth_factor(values).lambda_sq == pytest.approx(RELU[values], abs=6e-4)
    assert growth_factor(values).lambda_norm == pytest.approx(math.sqrt(RELU[values]), abs=3e-4)
    linear = 1 if math.isinf(values) else (values - 2) / (values - 3)
    assert growth_factor(values, "identity").lambda_sq == pytest.approx(linear, rel=1e-12)
    assert growth_factor(math.inf).lambda_sq == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)


@pytest.mark.parametrize("name", LIMITS)
def test_quadrature_in_the_limit(name):
    phi, gain, expected = LIMITS[name]
    assert growth_factor(math.inf, phi, gain=gain).lambda_sq == pytest.approx(expected, abs=6e-4)


STEEP = {
    "tanh, gain 20": (torch.tanh, 20.0, 0.0),
    "tanh, gain 100": (torch.tanh, 100.0, 0.0),
    "hardtanh": (F.hardtanh, 1.0, 0.0),
    "hardtanh, gain 3": (F.hardtanh, 3.0, 0.0),
    "ReLU, shift -1": (torch.relu, 1.0, -1.0),
    "ReLU, shift -2": (torch.relu, 1.0, -2.0),
}


@pytest.mark.parametrize("name", STEEP)
def test_quadrature_of_what_is_steep_or_has_kinks_beside_zero(name):
    phi, gain, shift = STEEP[name]
    expected = oracle.growth_without_end(lambda a: phi(gain * a + shift))
    assert growth_factor(math.inf, phi, gain, shift).lambda_sq == pytest.approx(expected, rel=3e-4)
    assert growth_factor(1e6, phi, gain, shift).lambda_sq == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("values", "shift"), [(5, -0.5), (8, -1.0), (64, -1.0)])
def test_quadrature_of_kinks_is_the_mean_over_the_sphere(values, shift):
    sampled = oracle.growth_by_sampling(values, lambda x: torch.relu(x + shift), 200_000, seed=values)
    assert growth_factor(values, "relu", shift=shift).lambda_sq == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("values", [4, 5, 8, 16, 64])
def test_quadrature_is_the_closed_form(values):
    assert growth_factor(values, torch.relu).lambda_sq == pytest.approx(growth_factor(values).lambda_sq, rel=2e-4)
    same = growth_factor(values, lambda x: x, gain=2.0, shift=0.7).lambda_sq
    assert same == pytest.approx(growth_factor(values, "identity").lambda_sq, rel=1e-5)


@pytest.mark.parametrize("values", [4, 6, 16])
def test_quadrature_is_the_mean_over_the_sphere(values):
    sampled = oracle.growth_by_sampling(values, lambda x: torch.tanh(2 * x), 400_000, seed=values)
    assert growth_factor(values, torch.tanh, gain=2.0).lambda_sq == pytest.approx(sampled, rel=0.01)


def test_factors_that_do_not_exist():
    assert growth_factor(3).lambda_sq == growth_factor(2, torch.tanh).lambda_norm == math.inf
    for values in (1, 0, math.nan):
        with pytest.raises(ValueError, match=r"given values=.*expected 2 or more"):
            growth_factor(values)
    with pytest.raises(ValueError, match="constant"):
        growth_factor(8, lambda x: 0 * x + 1.0)
    with pytest.raises(ValueError, match=r"too steep for quadrature at gain=3000\.0"):
        growth_factor(64, torch.tanh, gain=3000.0)
    with pytest.raises(ValueError, match="too steep for quadrature"):
        growth_factor(math.inf, torch.tanh, gain=3e4)
    with pytest.raises(ValueError, match="whose derivative is 0"):
        growth_factor(8, torch.sign)
    with pytest.raises(ValueError, match='expected "relu"'):
        growth_factor(8, "swish")


class Branched(nn.Module):
    """Layers registered in another order than they run, a branch beside two layers, and a shared one at the end."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.one, self.two, self.beside = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 1), nn.Conv1d(2, 4, 3)
        self.norm, self.norm2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.shared = nn.Linear(4, 5)

    def forward(self, x):
        branch = self.beside(x)
        z = F.relu(self.norm(self.one(x)), inplace=True)
        z = F.relu(self.norm2(self.two(z))) + branch
        return self.last(torch.tanh(self.shared(z.mean(2))))


ORDER = {"beside": 1, "one": 1, "two": 2, "shared": 3, "last": 4}


def branched():
    torch.manual_seed(3)
    return Branched().double()


def whole_batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(12, 2, 6, dtype=torch.float64, generator=generator), torch.arange(12) % 3


def cross_entropy(model, batch):
    """Mean over the samples of the whole batch of 12, of a share."""
    x, labels, ranks = batch
    return F.cross_entropy(model(x), labels, reduction="sum") * ranks / 12


def share_of(world, sizes):
    x, labels = whole_batch()
    return x.split(sizes)[world.rank], labels.split(sizes)[world.rank], world.size


def _growth(world, sizes, synchronized):
    model = branched()
    if synchronized:
        syncbn.convert(model, world.group)
    return gradient_growth(model, cross_entropy, share_of(world, sizes), world.group)


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (3, 8, 1)])
def test_norms_are_those_of_the_whole_batch_on_any_number_of_ranks(sizes):
    model = branched()
    x, labels = whole_batch()
    layers = [model.get_submodule(name) for name in ORDER]
    weights, outputs = oracle.layer_norms(model, layers, cross_entropy, (x, labels, 1))
    for rank, growth in enumerate(worlds.run(len(sizes), _growth, sizes, True)):
        assert {layer.name: layer.depth for layer in growth.layers} == ORDER
        assert [layer.weight_norm for layer in growth.layers] == pytest.approx(weights, rel=1e-12)
        assert [layer.output_norm for layer in growth.layers] == pytest.approx(outputs, rel=1e-12)
        factors = [oracle.growth_over(list(ORDER.values()), norms) for norms in (weights, outputs)]
        assert [growth.lambda_sq, growth.lambda_sq_output] == pytest.approx(factors, rel=1e-10)
        assert growth.lambda_norm == pytest.approx(math.sqrt(factors[0]), rel=1e-10)
        assert growth.first_over_last == pytest.approx(weights[0] / weights[-1], rel=1e-12)
        values, samples = sizes[rank] * 4.0, sizes[rank]
        assert growth.norms == (NormLayer("norm", values, 48.0, samples), NormLayer("norm2", values, 48.0, samples))


def test_ranks_that_do_not_synchronize_average_their_gradients():
    """(5, 7) with torch's own layers: the mean loss is the sum of the parts' own, whose gradients differ from the whole's."""
    growth = worlds.run(2, _growth, (5, 7), False)[0]
    x, labels = whole_batch()
    parts = zip(x.split((5, 7)), labels.split((5, 7)), strict=True)
    found = [oracle.gradients(branched(), cross_entropy, (*part, 1)) for part in parts]
    for layer in growth.layers:
        expected = (found[0][f"{layer.name}.weight"] + found[1][f"{layer.name}.weight"]).norm().item()
        assert layer.weight_norm == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("depth", "span"), [(30, (2, 27)), (8, (2, 5)), (7, (1, 7))])
def test_the_fit_leaves_out_the_ends(depth, span):
    torch.manual_seed(depth)
    norms = torch.rand(depth).double().add(0.1).tolist()
    found = fitted(range(1, depth + 1), [value**2 for value in norms])
    assert found.lambda_sq == pytest.approx(oracle.growth(norms, *span), rel=1e-10)
    assert found.lambda_norm == pytest.approx(math.sqrt(found.lambda_sq), rel=1e-12)


def test_too_few_layers_have_no_fit():
    assert math.isnan(fitted([1], [4.0]).lambda_sq)
    assert math.isnan(fitted([1, 2], [4.0, 0.0]).lambda_sq)
    assert fitted([1, 2], [6.0, 2.0]).lambda_sq == pytest.approx(3)


@pytest.mark.parametrize("values", [4, 8, 16, 64])
def test_relu_networks_grow_by_the_closed_form(values):
    """512 units, 30 layers, 3 fresh seeds: within 2 %, 3 % at 8 values, 12 % at 4."""
    found = experiment.factor_of(nn.ReLU, values, SEEDS).lambda_sq
    assert found == pytest.approx(RELU[values], rel={4: 0.12, 8: 0.03}.get(values, 0.02))


@pytest.mark.parametrize(("values", "expected"), [(8, 1.2), (32, 30 / 29)])
def test_linear_networks_grow_by_the_closed_form(values, expected):
    found = experiment.factor_of(nn.Identity, values, SEEDS).lambda_sq
    assert found == pytest.approx(expected, rel=0.03 if values == 8 else 0.02)


def test_tanh_at_finite_batch_grows_by_quadrature():
    found = experiment.factor_of(nn.Tanh, 8, SEEDS).lambda_sq
    assert found == pytest.approx(growth_factor(8, torch.tanh).lambda_sq, rel=0.03)


def test_a_convolution_has_as_many_values_as_positions():
    assert experiment.convolutional(2, 4, SEEDS).holds
    assert experiment.convolutional(2, 4, SEEDS).expected.startswith("1.522")


def test_without_batch_norm_nothing_grows():
    build = experiment.KINDS["no batch norm, He initialization"]
    squares = experiment.squares(lambda seed: build(seed, 30), 64, (*SEEDS, 104, 105), 256)
    assert fitted(range(1, 31), squares).lambda_sq == pytest.approx(1, abs=0.03)


def test_skip_connections_grow_slowly():
    assert experiment.ratio(experiment.KINDS["skip connections"], 80, SEEDS) < 1e3
    assert experiment.ratio(experiment.KINDS["batch norm"], 80, SEEDS[:1]) > 1e10


def _lambda_sq(build, values):
    return fitted(range(1, 31), experiment.squares(build, values, SEEDS)).lambda_sq


def test_constant_statistics_do_not_cure_growth():
    for values, expected in ((8, 2.131), (64, 1.512)):
        found = _lambda_sq(lambda seed: growth_limits.detached(seed, 30, 512), values)
        assert found == pytest.approx(expected, rel=0.04 if values == 8 else 0.02)
        assert found > RELU[values]


def test_the_size_of_the_weights_does_not_matter():
    once = _lambda_sq(lambda seed: growth_limits.scaled(seed, 30, 512, 1.0), 64)
    assert _lambda_sq(lambda seed: growth_limits.scaled(seed, 30, 512, 5.0), 64) == pytest.approx(once, rel=1e-3)


def test_what_explodes_does_not_train():
    assert growth_limits.best(False, 80, SEEDS[0], (1e-2,)) < 0.5
    assert growth_limits.best(True, 80, SEEDS[0], (1e-2,)) > 0.9


def _split_growth(world, synchronized):
    """λ² of this world's ranks, on parts of 64 values."""
    squares = torch.zeros(25, dtype=torch.float64)
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = experiment.growth_network(
            seed, 25, 512, nn.ReLU, functools.partial(nn.BatchNorm1d, 512, eps=NO_EPS, affine=False)
        )
        if synchronized:
            syncbn.convert(model, world.group)
        whole = experiment.projection_data(seed, 16, 512)
        batch = experiment.Projection(*(part.tensor_split(world.size)[world.rank] for part in whole))
        growth = gradient_growth(model, experiment.projection, batch, world.group)
        squares += torch.tensor([layer.weight_norm**2 for layer in growth.layers], dtype=torch.float64)
    return fitted(range(1, 26), squares.tolist()).lambda_sq


def test_ranks_that_synchronize_have_the_growth_of_the_whole_batch():
    """16 values on two ranks: λ(16) synchronized, λ(8) not."""
    assert worlds.run(2, _split_growth, True)[0] == pytest.approx(RELU[16], rel=0.02)
    assert worlds.run(2, _split_growth, False)[0] == pytest.approx(RELU[8], rel=0.03)


def test_advice():
    growth = Growth((), (NormLayer("a", 64, 64, 16), NormLayer("b", 16, 16, 16)), 1.5, 1.22, 1.5, 3.0)
    alone = advice(growth)
    assert "b, the layer of the fewest values" in alone
    assert "4 ranks: unsynchronized, 4 values per channel: lambda_sq 3.08; synchronized, 16 values" in alone
    assert "8 ranks: unsynchronized, 2 values per channel: diverges" in alone
    assert "16 ranks: unsynchronized, 1 value per channel: no batch norm" in alone
    ranks = advice(growth._replace(norms=(NormLayer("a", 4, 64, 4),)))
    assert "unsynchronized, 4 values per channel: lambda_sq 3.08; synchronized, 64 values per channel: lambda_sq 1.49" in ranks
    assert ranks.endswith(": synchronize")
    assert advice(growth._replace(norms=(NormLayer("a", 512, 1024, 8),))).endswith("changes little")
    assert advice(growth._replace(norms=(NormLayer("a", 1, 2, 1),))).endswith(": synchronize"), "one value is no batch norm"
    assert "nothing to synchronize" in advice(growth._replace(norms=()))
    with pytest.raises(ValueError, match=r"given ranks=\(0,\); expected numbers of 1 or more"):
        advice(growth, ranks=(0,))


def test_advice_splits_samples_and_not_positions():
    images = advice(Growth((), (NormLayer("a", 6 * 49, 6 * 49, 6),), 1.5, 1.22, 1.5, 3.0)).splitlines()
    assert [line.split(" ranks: ")[0].strip() for line in images[2:]] == ["2", "4"], "6 images are not shared by 8 ranks"
    assert "4 ranks: unsynchronized, 49 values per channel" in images[3], "the smallest share is of one image"


def test_a_network_without_weights_is_refused():
    with pytest.raises(ValueError, match="runs no module with a weight"):
        gradient_growth(nn.BatchNorm1d(3), lambda model, x: model(x).sum(), torch.randn(4, 3))
