"""What is a layer of a network, and what is recorded of it: views, order, layers that call others, frozen, parametrized."""

import analysis_oracle as oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import syncbn
from syncbn.analysis import advice, gradient_correlation, gradient_growth
from syncbn.analysis.growth import Growth, NormLayer


def mean_square(model, x):
    return model(x).square().mean()


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def seeded(build, *args):
    torch.manual_seed(10)
    return build(*args).double()


def linear(inplace):
    act = nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 3))


def unbatched(inplace):
    act = nn.ReLU(inplace=inplace)
    return nn.Sequential(nn.Conv2d(2, 3, 2), act, nn.Conv2d(3, 3, 1), act, nn.Conv2d(3, 1, 1))


class Recurrent(nn.Module):
    """A tuple whose first element is written to."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        h, _ = self.first(x)
        return self.last(self.act(h))


@pytest.mark.parametrize(("build", "shape"), [(linear, (5, 7, 4)), (unbatched, (2, 6, 6)), (Recurrent, (5, 7, 4))])
def test_what_is_written_to_a_layers_output_does_not_matter(build, shape):
    """Outputs that are views."""
    inplace, plain = (
        gradient_growth(seeded(lambda flag=flag: build(flag)), mean_square, data(*shape)) for flag in (True, False)
    )
    assert [layer.depth for layer in inplace.layers] == list(range(1, len(inplace.layers) + 1))
    assert inplace == plain
    assert all(layer.output_norm > 0 for layer in inplace.layers)
    if build is linear:
        model = seeded(build, False)
        weights, outputs = oracle.layer_norms(model, [model[0], model[2], model[4]], mean_square, data(*shape))
        assert [layer.weight_norm for layer in inplace.layers] == pytest.approx(weights, rel=1e-12)
        assert [layer.output_norm for layer in inplace.layers] == pytest.approx(outputs, rel=1e-12)
        assert inplace.lambda_sq == pytest.approx(oracle.growth(weights, 1, 3), rel=1e-10)


class Block(nn.Module):
    """A scale of its own, two dimensions, on what two layers give."""

    def __init__(self, scaled):
        super().__init__()
        self.two, self.one = nn.Linear(6, 6), nn.Linear(6, 6)
        if scaled:
            self.scale = nn.Parameter(torch.full((1, 6), 0.75))

    def forward(self, x):
        h = self.two(torch.tanh(self.one(x)))
        return x + h * (self.scale if hasattr(self, "scale") else 0.75)


class Embedded(nn.Module):
    """Adds a positional embedding."""

    def __init__(self, learned):
        super().__init__()
        self.head, self.body = nn.Linear(6, 2), nn.Sequential(Block(learned), Block(learned))
        self.first = nn.Linear(4, 6)
        position = torch.linspace(-1, 1, 42).view(7, 6)
        if learned:
            self.position = nn.Parameter(position)
        else:
            self.register_buffer("position", position)

    def forward(self, x):
        return self.head(self.body(self.first(x) + self.position))


def test_layers_that_call_others_are_listed_and_do_not_count():
    """Against the network in which what they have of their own is constant."""
    with_own, plain = (
        gradient_growth(seeded(lambda flag=flag: Embedded(flag)), mean_square, data(5, 7, 4)) for flag in (True, False)
    )
    inner = ["first", "body.0.one", "body.0.two", "body.1.one", "body.1.two", "head"]
    assert [layer.name for layer in plain.layers] == inner
    order = ["Embedded", "first", "body.0", "body.0.one", "body.0.two", "body.1", "body.1.one", "body.1.two", "head"]
    assert [layer.name for layer in with_own.layers] == order
    depths = {layer.name: layer.depth for layer in with_own.layers}
    assert [depths[name] for name in inner] == [1, 2, 3, 4, 5, 6]
    assert (depths["body.0"], depths["body.1"], depths["Embedded"]) == (3, 5, 6)
    for layer in plain.layers:
        (same,) = (one for one in with_own.layers if one.name == layer.name)
        assert same[1:] == pytest.approx(layer[1:], rel=1e-12)
    assert with_own[2:] == pytest.approx(plain[2:], rel=1e-12)
    model = seeded(Embedded, True)
    gradients = oracle.gradients(model, mean_square, data(5, 7, 4))
    for layer in with_own.layers:
        own = {"Embedded": "position", "body.0": "body.0.scale", "body.1": "body.1.scale"}.get(
            layer.name, f"{layer.name}.weight"
        )
        assert layer.weight_norm == pytest.approx(gradients[own].norm().item(), rel=1e-12)
    ratio = gradients["first.weight"].norm() / gradients["head.weight"].norm()
    assert with_own.first_over_last == pytest.approx(ratio.item(), rel=1e-12)


def refuse(layer, args):
    if args[0].shape[1] != layer.in_features:
        raise RuntimeError


class Retried(nn.Module):
    """A layer whose first call raises."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        with pytest.raises(RuntimeError):
            self.last(x)
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("before", [False, True])
def test_a_call_that_raises_calls_no_other(before):
    """In its forward, or in a hook before it."""
    model = seeded(Retried)
    if before:
        model.last.register_forward_pre_hook(refuse)
    growth = gradient_growth(model, mean_square, data(5, 4))
    assert [(layer.name, layer.depth) for layer in growth.layers] == [("first", 1), ("last", 2)]
    assert growth.first_over_last == pytest.approx(growth.layers[0].weight_norm / growth.layers[1].weight_norm, rel=1e-12)


def test_frozen_batch_norm_is_none():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3)))
    model[1].eval()
    assert gradient_growth(model, mean_square, data(5, 4)).norms == (NormLayer("3", 5.0, 5.0, 5),)
    growth = gradient_growth(model.eval(), mean_square, data(5, 4))
    assert growth.norms == ()
    assert advice(growth).endswith("nothing to synchronize")
    model[3] = nn.BatchNorm1d(3, track_running_stats=False).double().eval()  # which never has another's statistics
    assert gradient_growth(model, mean_square, data(5, 4)).norms == (NormLayer("3", 5.0, 5.0, 5),)


def test_advice_on_one_sample():
    told = advice(Growth((), (NormLayer("a", 1, 1, 1),), 1.5, 1.22, 1.5, 3.0))
    assert told.endswith("a, the layer of the fewest values, per layer of its kind: 1 value per channel: no batch norm")


class Same(nn.Module):
    """w·1, by a module with a module inside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, weight):
        return self.inner(weight) * 1.0


class Scaled(nn.Module):
    """w times a factor by output that is trained, (n, 1)."""

    def __init__(self, outputs):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, outputs, dtype=torch.float64)[:, None])

    def forward(self, weight):
        return weight * self.factor


def normed():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def parametrized(way):
    """`normed()` with parametrized layers, and a plain network of the same weights."""
    model = seeded(normed)
    for number in (0, 3, 5):
        way(model[number])
    plain = seeded(normed)
    model(data(9, 4))  # a step of spectral_norm's power iteration
    model.eval()  # and no more
    model[1].train()
    with torch.no_grad():
        for number in (0, 3, 5):
            plain[number].weight.copy_(model[number].weight)
    return model, plain


def same(layer):
    parametrize.register_parametrization(layer, "weight", Same())
    parametrize.register_parametrization(layer, "bias", Same())


WAYS = {
    "same": same,
    "spectral": parametrizations.spectral_norm,
    "weight": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled(layer.out_features)),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_parametrized_layer_is_the_layer(name):
    """Of the same function: depths, gradients by outputs and their growth; of w·1 all that is measured."""
    model, plain = parametrized(WAYS[name])
    found, expected = (gradient_growth(one, mean_square, data(9, 4)) for one in (model, plain))
    assert [(layer.name, layer.depth) for layer in found.layers] == [("0", 1), ("3", 2), ("5", 3)]
    outputs = [layer.output_norm for layer in expected.layers]
    assert [layer.output_norm for layer in found.layers] == pytest.approx(outputs, rel=1e-11)
    assert found.lambda_sq_output == pytest.approx(expected.lambda_sq_output, rel=1e-10)
    assert found.norms == expected.norms
    gradients = oracle.gradients(model, mean_square, data(9, 4))
    for layer in found.layers:
        own = [g for path, g in gradients.items() if path.startswith(f"{layer.name}.") and g.dim() > 1]
        assert layer.weight_norm == pytest.approx(sum(g.square().sum().item() for g in own) ** 0.5, rel=1e-11)
    if name == "same":
        assert found == expected


@pytest.mark.parametrize("lr", [0.5, 0.0])
def test_the_shift_of_parametrized_layers_is_that_of_plain_ones(lr):
    model, plain = parametrized(same)
    found, expected = (gradient_correlation(one, mean_square, data(9, 4), lr) for one in (model, plain))
    assert [layer.name for layer in found.layers] == ["0", "3", "5"]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one[1:] == pytest.approx(other[1:], rel=1e-12)
    assert (expected.relative > 0.01) == (lr > 0)


def test_the_shift_of_a_users_parametrization():
    """Its own parameters are updated with the layer, before the next is measured."""
    model, _ = parametrized(WAYS["own"])
    names = list(dict(model.named_parameters()))
    groups = [[name for name in names if name[0] in numbers] for numbers in ("01", "3", "5")]
    measured = [f"{number}.parametrizations.weight.original" for number in (0, 3, 5)]
    updated = {n: p.detach() - 0.5 * g for (n, p), g in zip(model.named_parameters(), gradients_of(model), strict=True)}
    before, after = oracle.shifted_gradients(model, groups, measured, mean_square, data(9, 4), updated)
    factors = [f"{number}.parametrizations.weight.0.factor" for number in (0, 3, 5)]
    more = oracle.shifted_gradients(model, groups, factors, mean_square, data(9, 4), updated)
    found = gradient_correlation(model, mean_square, data(9, 4), 0.5)
    for layer, a, b, c, d in zip(found.layers, before, after, *more, strict=True):
        assert layer.l2 == pytest.approx(((a - b).square().sum() + (c - d).square().sum()).sqrt().item(), rel=1e-10, abs=1e-14)
    assert found.layers[2].l2 > 1e-3


def gradients_of(model):
    return oracle.gradients(model, mean_square, data(9, 4)).values()


class Tied(nn.Module):
    """A weight that is that of another layer, turned."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, weight):
        return self.layer.weight.T


def test_a_layer_that_a_parametrization_holds_too_is_a_layer():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)))
    parametrize.register_parametrization(model[0], "weight", Tied(model[2]))
    found = gradient_growth(model, mean_square, data(9, 6))
    assert [(layer.name, layer.depth) for layer in found.layers] == [("0", 1), ("2", 2)]
    gradients = oracle.gradients(model, mean_square, data(9, 6))
    shared = next(g for path, g in gradients.items() if g is not None and g.shape == (6, 4))
    assert found.layers[1].weight_norm == pytest.approx(shared.norm().item(), rel=1e-12)


class Masked(nn.Module):
    """A layer of ours called in a way of its own: call(norm, h, mask)."""

    def __init__(self, norm, call):
        super().__init__()
        self.first, self.norm, self.call = nn.Conv1d(2, 3, 1), norm, call

    def forward(self, batch):
        x, mask = batch
        return self.call(self.norm, self.first(x), mask)


MASKED = {
    "second": (syncbn.SyncBatchNorm1d, lambda norm, h, mask: norm(h, mask)),
    "second of any shape": (syncbn.SyncBatchNorm, lambda norm, h, mask: norm(h, mask[:, None])),
    "keyword": (syncbn.SyncBatchNorm1d, lambda norm, h, mask: norm(h, mask=mask)),
    "all keywords": (syncbn.SyncBatchNorm1d, lambda norm, h, mask: norm(mask=mask, input=h)),
    "third": (syncbn.SyncBatchNormReLU, lambda norm, h, mask: norm(h, h, mask[:, None])),
    "keyword, fused": (syncbn.SyncBatchNormReLU, lambda norm, h, mask: norm(h, mask=mask)),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_leaves_so_many_values(name):
    build, call = MASKED[name]
    mask = torch.arange(20).view(4, 5) % 3 > 0
    model = seeded(lambda: Masked(build(3), call))
    assert gradient_growth(model, mean_square, (data(4, 2, 5), mask)).norms == (NormLayer("norm", 13.0, 13.0, 4),)


@pytest.mark.parametrize("call", [lambda norm, h, mask: norm(h, None), lambda norm, h, mask: norm(input=h, mask=None)])
def test_a_mask_of_none_is_none(call):
    model = seeded(lambda: Masked(syncbn.SyncBatchNorm1d(3), call))
    assert gradient_growth(model, mean_square, (data(4, 2, 5), None)).norms == (NormLayer("norm", 20.0, 20.0, 4),)


def test_a_residual_is_no_mask():
    model = seeded(lambda: Masked(syncbn.SyncBatchNormReLU(3), lambda norm, h, mask: norm(h, h)))
    assert gradient_growth(model, mean_square, (data(4, 2, 5), None)).norms == (NormLayer("norm", 20.0, 20.0, 4),)
