"""Noise after batch norm, the cost of small mini-batches, and the claims on both."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn.analysis import BatchNoise, NoiseRange, cross_sample_energy, gradient_bias
from syncbn.analysis.experiments import noise as experiment

SEEDS = (51, 52)


def noise_of(layer, steps, shape=(64, 8, 5, 5)):
    """m_ij and s_ij of the steps: what zeros become, and what ones become beyond that."""
    means, scales = [], []
    for _ in range(steps):
        step = layer.step.clone()
        mean = layer(torch.zeros(shape))
        layer.step.copy_(step)
        means.append(mean)
        scales.append(layer(torch.ones(shape)) - mean)
    return torch.stack(means), torch.stack(scales)


def test_the_noise_has_the_distribution_that_is_said():
    means, scales = noise_of(BatchNoise(3, 1), 60)  # (60, 64, 8, 5, 5)
    centres, factors = means.mean((1, 3, 4)), scales.mean((1, 3, 4))  # (60, 8): 480 draws
    assert centres.abs().max() <= 0.5 + 0.01
    assert centres.std().item() == pytest.approx(1 / 12**0.5, rel=0.1)
    assert factors.min() >= 1 - 0.02
    assert factors.max() <= 1.25 + 0.02
    assert factors.mean().item() == pytest.approx(1.125, abs=0.02)
    assert (means - centres[:, None, :, None, None]).abs().max() <= 0.1 + 0.01
    assert (means - centres[:, None, :, None, None]).std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert (scales - factors[:, None, :, None, None]).std().item() == pytest.approx(0.1, rel=0.02)


def test_every_step_layer_and_seed_has_noise_of_its_own():
    drawn = [noise_of(layer, 2)[0] for layer in (BatchNoise(3, 1), BatchNoise(3, 2), BatchNoise(4, 1))]
    every = [part.mean((0, 2, 3)) for each in drawn for part in each]
    for i, one in enumerate(every):
        for other in every[:i]:
            assert (one - other).abs().max() > 0.05
    assert torch.equal(noise_of(BatchNoise(3, 1), 2)[0], drawn[0])


def test_seeds_and_layers_far_apart_have_noise_of_their_own():
    one = noise_of(BatchNoise(0, 0), 1)[0]
    for seed, layer in ((1, 0), (0, 1009), (2**32, 0), (0, 2**32)):
        assert not torch.equal(noise_of(BatchNoise(seed, layer), 1)[0], one)
    assert not torch.equal(noise_of(BatchNoise(1, 0), 1)[0], noise_of(BatchNoise(0, 1009), 1)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_checkpointing_recomputes_has_the_noise_of_the_first(reentrant):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        first, noise, x = nn.Linear(6, 6), BatchNoise(0, 0), torch.randn(8, 6, requires_grad=True)

        def body(x, first=first, noise=noise):
            return torch.tanh(noise(first(x)))

        for _ in range(2):
            y = checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)
            y.square().sum().backward()
        assert noise.step == 2
        found.append(first.weight.grad)
    assert torch.equal(*found)


def test_a_unit_may_be_a_single_activation():
    means, _ = noise_of(BatchNoise(3, 1, per_unit=True), 1, (400, 2, 3, 3))
    assert means.mean((0, 1)).std() > 0.1
    assert means.mean((0, 1)).shape == (2, 3, 3)


def test_no_noise_in_eval_and_the_random_state_stays():
    layer, x = BatchNoise(3, 1), torch.randn(4, 2)
    before = torch.get_rng_state()
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.step == 1


@pytest.mark.parametrize("shape", [(), (4,)])
def test_an_input_without_channels(shape):
    for layer in (BatchNoise(3, 1), BatchNoise(3, 1, per_unit=True)):
        with pytest.raises(ValueError, match=rf"given an input of shape {re.escape(str(shape))}; expected \(N, C, \*\)"):
            layer(torch.ones(shape))
        assert layer.step == 0


def _noise(world):
    means, scales = noise_of(BatchNoise(3, 1), 3, (400, 8))
    return means, scales


def test_ranks_share_the_noise_of_a_unit_and_not_that_of_a_sample():
    (one, scale), (other, other_scale) = worlds.run(2, _noise)
    assert (one.mean(1) - other.mean(1)).abs().max() < 0.02
    assert (scale.mean(1) - other_scale.mean(1)).abs().max() < 0.03
    assert (one - other).abs().max() > 0.1


def test_bad_ranges():
    for arguments in ((-1, 0), (0, -1), (0, 0, NoiseRange(scale=0.5)), (0, 0, NoiseRange(mean=-0.1))):
        with pytest.raises(ValueError, match="expected"):
            BatchNoise(*arguments)


@pytest.mark.parametrize("m", [3, 4, 8, 33])
def test_cross_sample_energy_is_that_of_the_jacobian(m):
    x = torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))

    def normalized(x):
        return (x - x.mean()) / x.var(correction=0).sqrt()

    jacobian = torch.autograd.functional.jacobian(normalized, x).square()
    xhat = normalized(x)
    assert cross_sample_energy(xhat) == pytest.approx(1 - (jacobian.diagonal().sum() / jacobian.sum()).item(), abs=1e-13)
    assert jacobian.sum().item() == pytest.approx((m - 2) / x.var(correction=0).item(), rel=1e-12)


def test_bad_normalized_values():
    with pytest.raises(ValueError, match=r"expected \(m,\)"):
        cross_sample_energy(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="expected 0 and 1"):
        cross_sample_energy(torch.tensor([1.0, 2.0, 3.0]))


def test_the_bias_of_a_known_case():
    """Mini-batches of 2 of batch norm are ±1 whatever the values: the gradient by the weight is known."""
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    model = nn.BatchNorm1d(1, eps=1e-30).double()

    def loss(model, batch):
        return (model(batch) * batch).mean()

    pairs = [[x[[0, 1]], x[[2, 3]]], [x[[0, 2]], x[[1, 3]]], [x[[0, 3]], x[[1, 2]]]]
    found = gradient_bias(model, loss, lambda number: pairs[number], x, 3)
    whole = (x - x.mean()).square().mean().sqrt()
    means = torch.tensor([(1 + 4) / 4, (3 + 6) / 4, (7 + 2) / 4])  # E |x_i − x_j|/2 of each partition
    spread = means.var() / 3  # weight; that of the bias is always the mean of x
    expected = ((means.mean() - whole).square() - spread).clamp(min=0).sqrt() / (whole.square() + x.mean().square()).sqrt()
    assert found.relative == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"given draw\(0\) without a mini-batch"):
        gradient_bias(model, loss, lambda number: [], x, 3)
    with pytest.raises(ValueError, match="gradient of all samples is zero"):
        gradient_bias(model, lambda model, batch: 0 * model(batch).sum(), lambda number: pairs[number], x, 3)
    with pytest.raises(ValueError, match="drawings=1"):
        gradient_bias(model, loss, lambda number: pairs[number], x, 1)


def test_the_bias_falls_as_one_over_m():
    small, large = (experiment.bias(SEEDS[0], m, True, 60) for m in (4, 32))
    assert small.relative >= 0.05
    assert small.relative >= 4 * large.relative
    assert experiment.bias(SEEDS[0], 4, False, 2).relative <= 1e-12


@pytest.mark.parametrize(("m", "raw"), [(2, 0.5), (4, 0.75), (16, 15 / 16), (64, 63 / 64)])
def test_the_variance_of_mini_batches_needs_m_over_m_minus_one(m, raw):
    four = 4 * math.sqrt(2 / 65536 / (1 - 1 / m))  # standard errors
    for seed in SEEDS:
        corrected, uncorrected = experiment.variance_ratio(seed, m)
        assert corrected == pytest.approx(1, abs=four)
        assert uncorrected == pytest.approx(raw, abs=four)


@pytest.fixture(scope="module", params=SEEDS[:1])
def results(request):
    epochs = {"without batch norm": 3}
    return [experiment.result(request.param, regime, epochs=epochs.get(regime, 10)) for regime in experiment.REGIMES]


def test_batch_norm_trains_fast_with_noise_too(results):
    """Learning rate 0.03, training accuracy after epoch 3: 0.95, 0.90 with noise, and 0.25 less without batch norm."""
    plain, normed, noisy = results
    assert normed.accuracy[2] >= 0.95
    assert noisy.accuracy[2] >= 0.9
    assert plain.accuracy[2] <= normed.accuracy[2] - 0.25


def test_noise_shifts_and_does_not_hurt(results):
    _, normed, noisy = results
    assert noisy.shift >= 20 * normed.shift
    assert abs(noisy.held_out - normed.held_out) <= 0.02


def test_a_seed_gives_the_same_network_and_leaves_the_random_state():
    before = torch.get_rng_state()
    one, other = experiment.mlp(1, True), experiment.mlp(1, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert F.mse_loss(one[1].weight, experiment.mlp(2, True)[1].weight) > 0
