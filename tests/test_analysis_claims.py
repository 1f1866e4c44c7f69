"""Claims of numbers that are none: what was not measured holds nothing, whichever seed and step it is of."""

import itertools
import math

import pytest
import torch
from torch import nn

from syncbn.analysis import gradient_landscape, rayleigh_ascent
from syncbn.analysis.claims import Settings
from syncbn.analysis.experiments import gdnp, inequalities, smoothness
from syncbn.analysis.experiments.gdnp_problems import end_of, leading, start_above, turned
from syncbn.analysis.extremes import greatest, least, median
from syncbn.analysis.gaussian import TanhUnits, UnitRun

NAN = math.nan


def settings(*seeds):
    return Settings(False, seeds, lambda items, title: items)


def test_the_greatest_and_the_median_pass_over_nothing():
    for values in itertools.permutations([3.0, 1.0, NAN, 2.0]):
        assert math.isnan(greatest(values))
        assert math.isnan(least(values))
        assert math.isnan(median(values))
    assert math.isnan(least([]))
    assert math.isnan(greatest([]))
    assert math.isnan(median([]))
    for values in itertools.permutations([3.0, -1.0, math.inf]):
        assert (greatest(values), least(values)) == (math.inf, -1.0)
        assert median(iter(values)) == 3.0


@pytest.mark.parametrize("at", range(6))
def test_a_rate_of_a_run_with_a_nan_is_none(at):
    """Below rounding too, where numbers do not count."""
    above = torch.tensor([1.0, 0.5, 0.25, 1e-13, 1e-12, 1e-14], dtype=torch.float64)
    assert gdnp.worst_rate(above, 0.5) == pytest.approx(1.0)
    above[at] = NAN
    assert math.isnan(gdnp.worst_rate(above, 0.5))


def test_a_run_that_has_converged_before_it_begins_is_none():
    assert math.isnan(gdnp.worst_share(torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.bool)))


def test_the_end_of_a_descent():
    """It diverges where it passes 1e30 before it overflows."""
    assert end_of(torch.tensor([3.0, 2.0])) == 2.0
    assert end_of(torch.tensor([3.0, 1e35])) == 1e30
    assert end_of(torch.tensor([3.0, 1e35, math.inf, NAN])) == 1e30
    for values in ([NAN, 1.0], [3.0, NAN], [3.0, NAN, 1e35], [NAN, NAN], [3.0, math.inf]):
        assert math.isnan(end_of(torch.tensor(values)))


@pytest.mark.parametrize("number", range(70, 100))
def test_starts_are_above_the_second_eigenvalue(number):
    generator, again = (torch.Generator().manual_seed(number) for _ in range(2))
    a = turned(torch.logspace(0, 1.5, 8, dtype=torch.float64), generator)
    b = turned(torch.linspace(-1, 2, 8, dtype=torch.float64), generator)
    start = start_above(a, b, generator)
    assert (start @ b @ start) / (start @ a @ start) > torch.linalg.eigvals(torch.linalg.solve(a, b)).real.sort().values[-2]
    assert (start - leading(a, b)).norm() > 0.1
    turned(torch.ones(8, dtype=torch.float64), again)
    turned(torch.ones(8, dtype=torch.float64), again)
    assert torch.equal(start_above(a, b, again), start)


def test_all_seeds_of_the_rayleigh_quotient_are_used(monkeypatch):
    runs = []

    def seen(a, b, start, steps):
        found = rayleigh_ascent(a, b, start, steps)
        if steps:
            runs.append(found)
        return found

    monkeypatch.setattr(gdnp, "rayleigh_ascent", seen)
    (claim,) = gdnp.rayleigh((7, 8, 9))
    assert claim.holds
    assert len(runs) == 30
    rates = []
    for run in runs:
        shares = (run.eigenvalues[0] - run.quotients[:4]) / (run.quotients[:4] - run.eigenvalues[1])
        assert (shares > 0).all()
        rates.append((shares[1:] / shares[:-1] / run.rate).max().item())
    assert 0.9 < max(rates) <= float(claim.measured) + 1e-4  # which is printed with five digits


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_insensitivity_is_of_every_seed(monkeypatch, bad):
    """Ends that are 1e-7 of the scale of their own seed, but for one; then one that is not a number."""
    scales = {seed: abs(float(problem.start @ problem.u)) for seed in range(3) for problem in [gdnp.quadratic(100.0, seed)]}
    seeds = sorted(scales, key=lambda seed: scales[seed])  # the last has the largest scale

    def claims(end, diverged=1e35):
        ends = iter([scales[seed] * (end if number == bad else 1e-7) for number, seed in enumerate(seeds) for _ in range(5)])
        plain = iter([diverged if number == bad else 1e35 for number in range(3) for _ in range(5)])
        monkeypatch.setattr(gdnp, "batch_norm_descent", lambda *args: torch.tensor([1.0, next(ends)], dtype=torch.float64))
        monkeypatch.setattr(gdnp, "gradient_descent", lambda *args: torch.tensor([1.0, next(plain)], dtype=torch.float64))
        return gdnp.insensitivity(settings(*seeds))[0]

    assert [claim.holds for claim in claims(1e-7)] == [True, True, True]
    assert float(claims(3e-6)[0].measured) == pytest.approx(3e-6, rel=1e-4)
    assert [claim.holds for claim in claims(3e-6)] == [False, True, True]
    assert [claim.holds for claim in claims(NAN)] == [False, False, True]
    assert [claim.holds for claim in claims(1e-7, NAN)] == [True, True, False]
    assert [claim.holds for claim in claims(1e-7, 1.0)] == [True, True, False]


@pytest.mark.parametrize("bad", [0, 1])
def test_tanh_units_are_of_every_seed(monkeypatch, bad):
    """One seed whose f rises with a unit, whose gradient stays, or that leaves the line; or all of it NaN."""

    class Units:
        made = 0
        value_after, ratio, off = 0.5, 1e-4, 1e-12
        best, smallest, largest = -1.0, 1.0, 4.0
        goal = torch.ones(6, dtype=torch.float64)

        def __init__(self, u, sigma, theta):
            self.bad, self.trained = Units.made == bad, 0
            Units.made += 1

        def value(self):
            return 0.7

        def train(self, unit, start, steps):
            self.trained += 1
            value, ratio, off = (Units.value_after, Units.ratio, Units.off) if self.bad else (0.5, 1e-4, 1e-12)
            return UnitRun(torch.tensor([0.0, -0.6]), torch.tensor([1.0, ratio]), off, value if self.trained == 2 else 0.5)

    def holds(**changed):
        Units.made = 0
        for name, value in changed.items():
            monkeypatch.setattr(Units, name, value)
        found = [claim.holds for claim in gdnp.tanh_units(settings(0, 1))[0]]
        monkeypatch.undo()
        monkeypatch.setattr(gdnp, "TanhUnits", Units)
        return found

    monkeypatch.setattr(gdnp, "TanhUnits", Units)
    assert holds() == [True, True, True, True]
    for bad_value in (0.6, NAN):
        assert holds(value_after=bad_value) == [True, True, True, False]
    for bad_value in (0.1, NAN):
        assert holds(ratio=bad_value) == [True, True, False, True]
        assert holds(off=bad_value) == [True, False, True, True]


@pytest.mark.parametrize("at", range(4))
def test_a_nan_in_one_trial_is_seen(monkeypatch, at):
    calls = itertools.count()
    whole = inequalities.batch_norm_smoothness

    def seen(*args):
        layers = whole(*args)
        spoilt = layers[1]._replace(gradient_error=NAN, curvature_error=NAN, gradient_sq=NAN)
        return (layers[0], spoilt) if next(calls) == at else layers

    monkeypatch.setattr(inequalities, "batch_norm_smoothness", seen)
    assert all(math.isnan(error) for error in inequalities.worst_errors((1, 2), 2, 0.1))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_the_landscape_of_a_loss_that_is_no_number_at_a_step(at):
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), itertools.count()

    def loss(model, x):
        return model(x).square().mean() * (NAN if next(calls) == at else 1)

    seen = gradient_landscape(model, loss, torch.randn(6, 3), 0.1)
    assert [math.isnan(value) for value in seen.losses] == [step == at for step in (1, 2, 3, 4)]
    assert math.isnan(seen.loss_range)
    assert math.isnan(seen.effective_beta)
    assert math.isnan(seen.predictiveness)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_gradient_of_a_unit_that_is_no_number_is_seen(monkeypatch, at):
    network, calls = TanhUnits(torch.ones(3).double(), torch.eye(3).double(), (1.0, -1.0)), itertools.count()
    whole = network.gradient

    def gradient(unit, weight):
        found, factor = whole(unit, weight)
        return (found * NAN, NAN) if next(calls) == at else (found, factor)

    start = torch.tensor([1.0, -0.2, 0.1], dtype=torch.float64)
    assert network.train(0, start, 5).off_line < 1e-9
    monkeypatch.setattr(network, "gradient", gradient)
    assert math.isnan(network.train(0, start, 5).off_line)


@pytest.mark.parametrize("at", range(3))
def test_the_landscape_claims_of_a_run_with_a_nan_fail(at):
    def run(spoilt):
        ranges = [(1.0, NAN if spoilt and number == at else 2.0) for number in range(3)]
        betas = [NAN if spoilt and number == at else 1.0 for number in range(3)]
        return smoothness.Run([0, 1, 2], ranges, [1.0] * 3, betas, [])

    large = smoothness.Run([0, 1, 2], [(1.0, 9.0)] * 3, [5.0] * 3, [3.0] * 3, [])
    assert [claim.holds for claim in smoothness._landscape_claims(0, large, run(False))] == [True, True, True]
    assert [claim.holds for claim in smoothness._landscape_claims(0, large, run(True))] == [False, True, False]
