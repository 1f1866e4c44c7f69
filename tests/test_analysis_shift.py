"""Internal covariate shift: the protocol against copies of the model, optimizers, ranks, and the experiments' claims."""

import copy
import math
import statistics
import threading

import analysis_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn

import syncbn
from syncbn.analysis import gradient_correlation
from syncbn.analysis.experiments import shift as experiment
from syncbn.analysis.networks import batches, classification, digits, vgg

SEEDS = (21, 22, 23)


class Net(nn.Module):
    """Registered in another order than it runs; a batch norm, a scale of its own, one called twice and tied, one frozen."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.first, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        z = F.relu(self.norm(self.first(x))).mean(2) * self.scale
        z = self.tied(torch.tanh(self.frozen(self.twice(self.twice(z)))))
        return self.head(torch.tanh(z))


GROUPS = [
    ["scale", "first.weight", "first.bias", "norm.weight", "norm.bias"],
    ["twice.weight", "twice.bias"],
    ["head.weight", "head.bias"],
]
MEASURED = ["first.weight", "twice.weight", "head.weight"]


def net():
    torch.manual_seed(5)
    return Net().double()


def whole_batch():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(12, 2, 6, dtype=torch.float64, generator=generator), torch.arange(12) % 3


def cross_entropy(model, batch):
    x, labels, ranks = batch
    return F.cross_entropy(model(x), labels, reduction="sum") * ranks / 12


def expected_by(updated):
    before, after = oracle.shifted_gradients(net(), GROUPS, MEASURED, cross_entropy, (*whole_batch(), 1), updated)
    return [
        (F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item(), (a - b).norm().item(), ((a - b).norm() / a.norm()).item())
        for a, b in zip(before, after, strict=True)
    ]


def check(shift, expected):
    assert [layer.name for layer in shift.layers] == ["first", "twice", "head"]
    assert shift.layers[0][1:] == pytest.approx((1, 0, 0), abs=1e-15)
    for layer, values in zip(shift.layers, expected, strict=True):
        assert layer[1:] == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert shift.cosine == pytest.approx((expected[1][0] + expected[2][0]) / 2, rel=1e-9)
    assert shift.relative == pytest.approx((expected[1][2] + expected[2][2]) / 2, rel=1e-9)
    assert expected[2][0] < 0.99  # there is a shift to see


def by_descent(lr):
    gradients = oracle.gradients(net(), cross_entropy, (*whole_batch(), 1))
    return {name: p.detach() - lr * gradients[name] for name, p in net().named_parameters() if p.requires_grad}


def _shift(world, sizes, optimizer):
    model = syncbn.convert(net(), world.group)
    x, labels = whole_batch()
    batch = x.split(sizes)[world.rank], labels.split(sizes)[world.rank], world.size
    return gradient_correlation(model, cross_entropy, batch, trained(model) if optimizer else 4.0, world.group)


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (3, 8, 1)])
def test_the_protocol_on_any_number_of_ranks(sizes):
    expected = expected_by(by_descent(4.0))
    for shift in worlds.run(len(sizes), _shift, sizes, False):
        check(shift, expected)


def trained(model):
    """Adam that has momentum already, without the head's bias."""
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and name != "head.bias"]
    optimizer = torch.optim.Adam([{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:]}], lr=0.2)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.01 * (number + 1))
    values = [p.detach().clone() for p in parameters]
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return optimizer


@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_an_optimizer_s_own_step(sizes):
    model = net()
    optimizer = trained(model)
    for name, gradient in oracle.gradients(model, cross_entropy, (*whole_batch(), 1)).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    updated = {name: p.detach() for name, p in model.named_parameters()}
    for shift in worlds.run(len(sizes), _shift, sizes, True):
        check(shift, expected_by(updated))


def test_the_optimizer_is_left_as_it_was():
    model = net()
    optimizer = trained(model)
    elsewhere = torch.nn.Parameter(torch.ones(2))
    elsewhere.grad = torch.full_like(elsewhere, 2)
    optimizer.add_param_group({"params": [elsewhere]})
    before = copy.deepcopy(optimizer.state_dict())
    tensors = {id(value) for state in optimizer.state.values() for value in state.values()}
    model.head.bias.grad = torch.ones(3, dtype=torch.float64)
    gradient_correlation(model, cross_entropy, (*whole_batch(), 1), optimizer)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key]), key
    assert tensors == {id(value) for state in optimizer.state.values() for value in state.values()}
    assert model.head.bias.grad.eq(1).all()
    assert model.head.weight.grad is None
    assert elsewhere.eq(1).all()
    assert elsewhere.grad.eq(2).all()


def stepped(model, optimizer):
    """The parameters after a step of the optimizer itself, which is spent."""
    for name, gradient in oracle.gradients(model, cross_entropy, (*whole_batch(), 1)).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def parameters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_optimizer_that_writes_to_its_gradients():
    """They are those of step t afterwards, in float64 too."""
    model = net()
    updated = stepped(model, nesterov(model))
    model = net()
    check(gradient_correlation(model, cross_entropy, (*whole_batch(), 1), nesterov(model)), expected_by(updated))


def nesterov(model):
    return torch.optim.SGD(parameters_of(model), 2.0, momentum=0.9, nesterov=True, foreach=True)


class Trusting(torch.optim.SGD):
    """Attributes of its own: a scale that each step halves, a lock, a list of its parameters, a hook that is its method."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.scale, self.lock, self.mine = torch.tensor(2.0), threading.Lock(), list(parameters)
        self.taken = 0
        self.register_step_pre_hook(Trusting.count)
        self.register_step_post_hook(self.halve)

    def count(self, args, kwargs):
        self.taken += 1

    def halve(self, optimizer, args, kwargs):
        assert optimizer is self
        self.scale.mul_(0.5)

    @torch.no_grad()
    def step(self, closure=None):
        with self.lock:
            for parameter in self.mine:
                parameter.grad.mul_(self.scale)
        return super().step(closure)


def test_an_optimizer_with_attributes_and_hooks_of_its_own():
    """And a schedule, which wraps its step."""
    model = net()
    updated = stepped(model, Trusting(parameters_of(model), 0.7))
    model = net()
    optimizer = Trusting(parameters_of(model), 0.7)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for _ in range(2):
        check(gradient_correlation(model, cross_entropy, (*whole_batch(), 1), optimizer), expected_by(updated))
    assert (optimizer.scale, optimizer.taken) == (2, 0)
    assert all(mine is parameter for mine, parameter in zip(optimizer.mine, parameters_of(model), strict=True))


def test_a_users_hook_is_part_of_the_step():
    """The update is by the signs of the gradients."""

    def signs(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()

    model = net()
    gradients = oracle.gradients(model, cross_entropy, (*whole_batch(), 1))
    updated = {name: p.detach() - 0.3 * gradients[name].sign() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters_of(model), 0.3)
    optimizer.register_step_pre_hook(signs)
    check(gradient_correlation(model, cross_entropy, (*whole_batch(), 1), optimizer), expected_by(updated))


def test_an_optimizer_that_needs_a_closure_is_refused():
    model = net()
    with pytest.raises(ValueError, match=r"given a LBFGS, whose step calls a closure.*expected an optimizer that"):
        gradient_correlation(model, cross_entropy, (*whole_batch(), 1), torch.optim.LBFGS(parameters_of(model)))


def _mean_gradient(world):
    """Two ranks whose gradients differ much, no batch norm."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(9.0).view(3, 3) / 9 - 0.3)
        model[2].weight.copy_(torch.tensor([[1.0, -1.0, 0.5]]))
    x = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 1.0, 0.5]], dtype=torch.float64)
    y = torch.tensor([[3.0], [-2.0]], dtype=torch.float64)
    batch = (x, y) if world.size == 1 else (x[world.rank : world.rank + 1], y[world.rank : world.rank + 1])
    return gradient_correlation(
        model, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), batch, 0.4, world.group
    )


def test_gradients_are_averaged_before_they_are_compared():
    (alone,) = worlds.run(1, _mean_gradient)
    for shift in worlds.run(2, _mean_gradient):
        assert shift.layers[1].cosine == pytest.approx(alone.layers[1].cosine, rel=1e-12)
        assert shift.layers[1].l2 == pytest.approx(alone.layers[1].l2, rel=1e-12)
    assert abs(alone.layers[1].cosine) < 0.99


def test_nothing_moves_at_learning_rate_zero():
    """float32: cosines would be 0.9999994 if they were."""
    data = digits(0).train
    shift = gradient_correlation(vgg(3), classification, next(batches(data, 64, 3)), 0.0)
    assert len(shift.layers) == 9
    for layer in shift.layers:
        assert layer.l2 == 0
        assert layer.cosine == pytest.approx(1, abs=1e-12)


def test_noise_and_running_statistics_are_the_same_in_every_pass():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 1)
    )
    shift = gradient_correlation(model, lambda model, x: model(x).square().mean(), torch.randn(9, 6), 0.0)
    assert [layer.l2 for layer in shift.layers] == [0, 0, 0]


def test_a_gradient_of_zero_has_no_angle():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    shift = gradient_correlation(model, lambda model, x: model(x).mean(), torch.randn(4, 2), 0.1)
    assert math.isnan(shift.layers[1].cosine)
    assert shift.layers[1].l2 == 0
    assert shift.cosine == shift.layers[2].cosine


def test_a_gradient_that_is_not_finite_is_in_the_means():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh() if _ == 0 else nn.Identity())))
    shift = gradient_correlation(model, lambda model, x: model(x).square().mean(), torch.randn(8, 4), 1e12)
    assert math.isfinite(shift.layers[1].cosine)
    assert math.isnan(shift.layers[-1].cosine)
    assert math.isnan(shift.cosine)
    assert not math.isfinite(shift.relative)


@pytest.mark.parametrize("lr", [-1, math.nan, math.inf, True, "0.1", None])
def test_a_bad_learning_rate(lr):
    with pytest.raises(ValueError, match=r"given optimizer_or_lr=.*expected an Optimizer or a learning rate"):
        gradient_correlation(net(), cross_entropy, (*whole_batch(), 1), lr)


def test_a_bad_optimizer_and_loss():
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="given a SGD that holds no parameter of the model"):
        gradient_correlation(net(), cross_entropy, (*whole_batch(), 1), stranger)
    with pytest.raises(ValueError, match=r"given a loss that returns a tensor of shape \(12, 3\)"):
        gradient_correlation(net(), lambda model, batch: model(batch[0]), (*whole_batch(), 1), 0.1)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        gradient_correlation(net().requires_grad_(False), cross_entropy, (*whole_batch(), 1), 0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_vgg_has_more_shift_with_batch_norm(seed):
    assert experiment.vgg_path(seed, False).cosine - experiment.vgg_path(seed, True).cosine >= 0.02


def test_the_deep_linear_network_has_more_shift_with_batch_norm_and_trains_faster():
    plain, normed = ([experiment.linear_path(seed, norm, every=20) for seed in SEEDS] for norm in (False, True))
    assert statistics.median(path.cosine for path in plain) >= 0.9
    assert statistics.median(path.cosine for path in normed) <= 0.7
    for one, other in zip(plain, normed, strict=True):
        assert other.losses[-1] < one.losses[-1]


def _path(world):
    """The experiment on the ranks of the whole job."""
    return experiment.vgg_path(1, True, steps=2, every=2)


def test_the_experiment_is_the_same_on_four_ranks():
    alone = _path(None)
    for path in worlds.run(4, _path):
        assert path.cosines == pytest.approx(alone.cosines, abs=2e-4)
        assert path.losses == pytest.approx(alone.losses, rel=1e-5)
