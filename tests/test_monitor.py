"""The monitor: its figures against their definitions on the whole batch, and nothing changed by it."""

import contextlib
import gc
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.monitor import LayerReport

monitor_module = importlib.import_module("syncbn.monitor")  # the package has a function of this name
SHARES = [5, 3, 0]  # samples by rank
EPS = 1e-3


def network():
    """Layers with and without γ, one of them called twice, one frozen."""
    torch.manual_seed(0)
    return Network().double()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, EPS), nn.Tanh())
        self.twice = nn.BatchNorm1d(4, EPS, affine=False)
        self.frozen = nn.BatchNorm1d(4).eval()
        nn.init.uniform_(self.body[1].weight, 0.5, 1.5)

    def forward(self, x):
        return self.twice(self.twice(self.frozen(self.body(x))).tanh() + 3)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SHARES), 3, generator=generator).double() + torch.arange(sum(SHARES)).view(-1, 1)
    return x, torch.randn(sum(SHARES), 4, generator=generator).double()


def step(model, x, dy):
    model(x).backward(dy)


def expected(sizes, rank):
    """By layer: the figures' definitions, from the inputs and output gradients of one process."""
    model, seen = network(), {}
    for path in ("body.1", "twice"):

        def hook(layer, args, y, path=path):
            call = [args[0].detach(), None]
            seen.setdefault(path, []).append(call)
            y.register_hook(lambda g: call.__setitem__(1, g))

        model.get_submodule(path).register_forward_hook(hook)
    x, dy = data()
    step(model, x[: sum(sizes)], dy[: sum(sizes)])
    found = {}
    for path, calls in seen.items():
        weight = model.get_submodule(path).weight
        rows = [figures(x, x.split(list(sizes))[rank], g, weight) for x, g in calls]
        shifts, scales, ratios, slacks = zip(*rows, strict=True)
        mean_of = [sum(values) / len(rows) for values in (shifts, scales, slacks)]
        found[path] = (*mean_of[:2], max(ratios), 1e-14 * max(ratios) ** 2, mean_of[2])
    return found


def figures(x, own, g, weight):
    """Of one call with input x, `own` this rank's, and output gradient g: mean_shift, std_shift, ratio, slack."""
    mean, invstd = x.mean(0), (x.var(0, correction=0) + EPS).rsqrt()
    normalized = (x - mean) * invstd
    shift = ((own.mean(0) - mean) * invstd).square().mean().sqrt().item()
    scale = ((own.square().mean(0) - own.mean(0).square() + EPS).sqrt() * invstd - 1).square().mean().sqrt().item()
    gamma = 1 if weight is None else weight.detach()
    slack = (gamma**2 * invstd**2 * (g.sum(0) ** 2 + (g * normalized).sum(0) ** 2) / len(x)).sum().item()
    return shift, scale, (mean.abs() * invstd).max().item(), slack


def _watched(world, wrap):
    sizes = SHARES[: world.size]
    x, dy = (t[: sum(sizes)].split(sizes)[world.rank] for t in data())
    found = []
    for watched in (True, False):
        model = syncbn.convert(network(), world.group)
        outer = DistributedDataParallel(model, process_group=world.group) if wrap else model
        with CollectivesSeen() as seen:
            if watched:
                with syncbn.monitor(outer) as watching:
                    step(outer, x, dy)
                    report = watching.read()
                    again = watching.read()
            else:
                step(outer, x, dy)
        found.append((model.state_dict(), [p.grad for p in model.parameters()], seen.seen))
    paths = [layer._syncbn.path for layer in (model.body[1], model.twice)]
    return found, report._asdict(), {k: tuple(v) for k, v in report.layers.items()}, again.layers, report.flat(), paths


@pytest.mark.parametrize(("world", "wrap"), [(2, False), (2, True), (3, False)])
def test_figures_are_those_of_the_definitions(world, wrap):
    for rank, (both, report, layers, again, flat, paths) in enumerate(worlds.run(world, _watched, wrap)):
        want = expected(SHARES[:world], rank)
        assert list(layers) == ["body.1", "twice"], "in the order of the model; the frozen layer is none"
        for path, figures in layers.items():
            for name, got, value in zip(LayerReport._fields, figures, want[path], strict=True):
                assert got == pytest.approx(value, rel=1e-9, abs=0, nan_ok=True), f"{path} {name}"
        assert 0 < report["share"] < 1
        assert report["collectives"] == 6
        assert again == {}, "read begins anew"
        missing = {f"syncbn/{path}/{name}" for path in layers for name in ("mean_shift", "std_shift")} if rank == 2 else set()
        names = {f"syncbn/{path}/{name}" for path in layers for name in LayerReport._fields}
        assert set(flat) == names - missing | {"syncbn/share_of_step"}
        assert paths == ["body.1", "twice"]
        (state, grads, collectives), (plain_state, plain_grads, plain_collectives) = both
        assert collectives == plain_collectives
        assert all(torch.equal(state[name], plain_state[name]) for name in plain_state)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


def test_the_slack_is_what_the_squared_gradient_norm_falls_short_by():
    """Theorem 4.1 is an equality at ε = 0."""
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(5, eps=0.0).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    x, g = torch.randn(2, 30, 5).double()
    x = x.add_(2).requires_grad_()
    with syncbn.monitor(layer) as watching:
        layer(x).backward(g)
        slack = watching.read().layers["SyncBatchNorm"].smoothness_slack
    scale = layer.weight.detach() / x.detach().std(0, correction=0)
    assert x.grad.square().sum().item() == pytest.approx(((scale * g).square().sum() - slack).item(), rel=1e-10)


def test_checkpointed_masked_and_forward_mode_calls():
    """A recomputation is no other call; a mask leaves what is valid; tangents and many gradients at once are no statistics."""
    layer = syncbn.SyncBatchNorm1d(4).double()
    x = torch.randn(6, 4).double().requires_grad_()
    with syncbn.monitor(layer) as watching:
        layer(x).sum().backward()
        plain = watching.read()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        again = watching.read()
        layer(x, mask=torch.arange(6) < 4).sum().backward()
        masked = watching.read()
        layer(x[:4]).sum().backward()
        cut = watching.read()
        torch.autograd.grad(layer(x), x, torch.ones(1, 6, 4), is_grads_batched=True)
        assert math.isnan(watching.read().layers["SyncBatchNorm1d"].smoothness_slack)
        layer.running_mean = layer.running_var = None  # torch.func changes no buffers
        torch.func.jvp(layer, (x.detach(),), (torch.randn_like(x),))
        forward = watching.read()
    assert (plain.collectives, again.collectives) == (2, 3)
    assert again.layers["SyncBatchNorm1d"] == plain.layers["SyncBatchNorm1d"]
    assert masked.layers["SyncBatchNorm1d"].mean_over_std == pytest.approx(
        (x[:4].mean(0).abs() / (x[:4].var(0, correction=0) + 1e-5).sqrt()).max().item()
    )
    # Σdy = 4 and Σdy·(x − μ) = 0 of 4 positions.
    assert masked.layers["SyncBatchNorm1d"].smoothness_slack == pytest.approx(
        (4 / (x[:4].var(0, correction=0) + 1e-5)).sum().item()
    )
    assert masked.layers["SyncBatchNorm1d"].smoothness_slack == pytest.approx(cut.layers["SyncBatchNorm1d"].smoothness_slack)
    assert forward.layers["SyncBatchNorm1d"].mean_over_std == pytest.approx(plain.layers["SyncBatchNorm1d"].mean_over_std)


class Shifted(nn.BatchNorm1d):
    """Its γ is weight + 1."""

    def forward(self, x):
        weight = self.weight + 1
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, self.training, self.momentum, self.eps)


class Noisy(nn.Module):
    """A parametrization that draws a number each time."""

    def forward(self, weight):
        return weight + 0.1 * torch.randn_like(weight)


def test_the_slack_is_by_the_gamma_that_the_call_took():
    """Of a user's forward, and of functional_call, on a skeleton too; a transform has none."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 6, 4).double()
    weight, bias = torch.rand(2, 4).double() + 2

    def measured(layer, call):
        with syncbn.monitor(layer) as watching:
            call(layer)
            return watching.read().layers[type(layer).__name__].smoothness_slack

    expected = figures(x, x, g, weight)[-1]
    shifted = syncbn.convert(Shifted(4, EPS).double())
    shifted.weight.data = weight - 1
    assert measured(shifted, lambda layer: layer(x).backward(g)) == pytest.approx(expected, rel=1e-9)

    def given(layer):
        leaves = {"weight": weight.clone().requires_grad_(), "bias": bias}
        torch.func.functional_call(layer, leaves, (x,)).backward(g)

    def transformed(layer):
        def loss(weight):
            return (torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)) * g).sum()

        torch.func.grad(loss)(weight)

    for device in ("cpu", "meta"):
        layer = syncbn.SyncBatchNorm1d(4, EPS, track_running_stats=False, device=device, dtype=torch.float64)
        assert measured(layer, given) == pytest.approx(expected, rel=1e-9)
        assert math.isnan(measured(layer, transformed)), "whose backward is seen as a derivative"


def test_a_parametrization_is_evaluated_no_more_often():
    outputs = []
    for watch in (syncbn.monitor, contextlib.nullcontext):
        torch.manual_seed(0)
        layer = nn.Sequential(syncbn.SyncBatchNorm1d(4))
        layer[0]._force_sync = True
        parametrize.register_parametrization(layer[0], "weight", Noisy())
        with watch(layer):
            for _ in range(2):
                y = layer(torch.arange(20.0).view(5, 4).sin())
                y.square().sum().backward()
        outputs.append(y.detach())
    assert torch.equal(*outputs)


def layer_and_calls(count):
    """A layer, and for each call of it an input at another scale and an output gradient."""
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm1d(4, EPS).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    return layer, [(torch.randn(6, 4).double() * 10**k + k, torch.randn(6, 4).double()) for k in range(count)]


def slack(layer, x, g):
    return figures(x, x, g, layer.weight)[-1]


def test_a_backward_is_that_of_its_own_forward():
    """In the order of the forwards, beside a forward that has none, and twice through one graph."""
    layer, ((x, g), (z, h), (unused, _)) = layer_and_calls(3)
    with syncbn.monitor(layer) as watching:
        y, v = layer(x), layer(z)
        with torch.no_grad():
            layer(unused)
        y.backward(g, retain_graph=True)
        v.backward(h)
        in_order = watching.read().layers["SyncBatchNorm1d"].smoothness_slack
        y.backward(h)
        again = watching.read().layers["SyncBatchNorm1d"].smoothness_slack
    assert in_order == pytest.approx((slack(layer, x, g) + slack(layer, z, h)) / 2, rel=1e-9)
    assert again == pytest.approx(slack(layer, x, h), rel=1e-9)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}, {"context": True}], ids=str)
def test_a_checkpointed_backward_is_that_of_its_own_forward(options):
    layer, ((x, g), (z, h)) = layer_and_calls(2)
    x.requires_grad_()
    z.requires_grad_()
    if options == {"context": True}:
        options = {"use_reentrant": False, "context_fn": syncbn.checkpoint_context}
    with syncbn.monitor(layer) as watching:
        y, v = checkpoint(layer, x, **options), checkpoint(layer, z, **options)
        y.backward(g)
        v.backward(h)
        report = watching.read().layers["SyncBatchNorm1d"]
    rows = [figures(x.detach(), x.detach(), g, layer.weight), figures(z.detach(), z.detach(), h, layer.weight)]
    assert report.smoothness_slack == pytest.approx((rows[0][-1] + rows[1][-1]) / 2, rel=1e-9)
    assert report.mean_over_std == pytest.approx(max(rows[0][2], rows[1][2]), rel=1e-9)


def test_what_waits_for_a_backward_goes_with_its_graph():
    layer, ((x, g),) = layer_and_calls(1)
    with syncbn.monitor(layer) as watching:
        y = layer(x)
        layer(x)
        assert len(watching.pending) == 1
        y.backward(g)
        del y
        assert len(watching.pending) == 0


def test_what_is_kept_does_not_grow_between_reads(monkeypatch):
    """Two collectives a step, each of a quarter of a second: in the report are all of them, and of the memory four."""
    monkeypatch.setattr(monitor_module, "KEPT", 4)
    monkeypatch.setattr(monitor_module, "_stopwatch", lambda device: lambda: lambda: 0.25)
    layer, ((x, g),) = layer_and_calls(1)
    gc.collect()
    kept, tensors = [], []
    with syncbn.monitor(layer) as watching:
        for _ in range(9):
            layer(x).backward(g)
            gc.collect()
            kept.append(len(watching.spent))
            tensors.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
        report = watching.read()
    assert kept == [2] + [4] * 8
    assert max(tensors[2:]) <= tensors[1], "fewer, where others go"
    assert report.collectives == 18
    assert report.share * report.seconds == pytest.approx(18 * 0.25)
    *_, ratio, slack = figures(x.detach(), x.detach(), g, layer.weight)
    assert report.layers["SyncBatchNorm1d"].mean_over_std == pytest.approx(ratio, rel=1e-9)
    assert report.layers["SyncBatchNorm1d"].smoothness_slack == pytest.approx(slack, rel=1e-9)


@pytest.mark.parametrize("width", [6, 5])
def test_a_model_with_the_same_names_is_not_seen(width):
    """Of as many channels, and of others."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, EPS), nn.Linear(6, 3))
    other = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width, EPS), nn.Linear(width, 1))
    first, other = (syncbn.convert(model).double() for model in (first, other))
    seen = {}
    for model in (first, other):
        model[1].register_forward_pre_hook(lambda layer, args: seen.update({layer: [args[0].detach()]}))
        model[1].register_forward_hook(lambda layer, args, y: y.register_hook(seen[layer].append) and None)
    with syncbn.monitor(first) as mine, syncbn.monitor(other) as theirs:
        other(first(torch.randn(8, 4).double()) * 100).mean().backward()
        reports = mine.read(), theirs.read()
    for model, report in zip((first, other), reports, strict=True):
        x, g = seen[model[1]]
        assert report.collectives == 2
        (found,) = report.layers.values()
        want = figures(x, x, g, model[1].weight)
        assert (found.mean_over_std, found.smoothness_slack) == pytest.approx(want[2:], rel=1e-9)


def test_a_layer_that_is_named_anew_inside_is_seen():
    net = nn.ModuleDict({"body": syncbn.convert(nn.Sequential(nn.BatchNorm1d(2)))})
    with syncbn.monitor(net) as outer, syncbn.monitor(net["body"]) as inner:
        net["body"](torch.randn(4, 2))
        assert list(outer.read().layers) == ["body.0"]
        assert list(inner.read().layers) == ["0"]


def test_other_models_are_not_seen_and_names_come_back():
    mine, other = syncbn.convert(nn.Sequential(nn.BatchNorm1d(2))), syncbn.convert(nn.BatchNorm1d(2))
    made = syncbn.SyncBatchNorm1d(2)
    both = nn.ModuleDict({"mine": mine, "made": made})
    with syncbn.monitor(both) as watching:
        other(torch.randn(4, 2))
        assert watching.read().layers == {}
        both["mine"](torch.randn(4, 2))
        both["made"](torch.randn(4, 2))
        assert list(watching.read().layers) == ["mine.0", "made"]
    assert mine[0]._syncbn.path == "0"
    assert "_syncbn" not in vars(made)
    assert syncbn.observing.observers() == ()


def test_a_model_without_layers_of_ours_is_an_error():
    with (
        pytest.raises(ValueError, match="given a Sequential without layers of syncbn; expected some"),
        syncbn.monitor(nn.Sequential(nn.BatchNorm1d(2))),
    ):
        pass
