"""fold, export, and the tools of torch that touch modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import syncbn


def warmed(model, *shape):
    """With running statistics and parameters that are not the identity."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    return syncbn.convert(model.double()), torch.randn(shape, dtype=torch.float64)


def norms(model):
    return [type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _without_bias(norm):
    norm.register_parameter("bias", None)
    return norm


FOLDED = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (2, 3, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 9, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 4, 4)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False)), (2, 4, 5, 5)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), (2, 3, 4, 4)),
    "no affine": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), (5, 3)),
    "no bias": (nn.Sequential(nn.Linear(3, 4, False), _without_bias(nn.BatchNorm1d(4))), (5, 3)),
    "linear": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2, False), nn.BatchNorm1d(2)), (5, 3)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_fold_leaves_no_batch_norm_and_the_same_outputs(name):
    model, shape = FOLDED[name]
    model, x = warmed(copy.deepcopy(model), *shape)
    before = copy.deepcopy(model.state_dict())
    folded = syncbn.fold(model)
    assert norms(folded) == []
    expected = model.eval()(x)
    assert (folded(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert norms(model)
    assert all(name.startswith("SyncBatchNorm") for name in norms(model)), "the model stays as it is"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class Kept(nn.Module):
    """Where folding would be wrong: outputs used twice, layers called twice, a norm in front, other groups, no statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b, self.b_norm, self.b_other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.c_norm, self.c = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.d, self.d_norm = nn.ConvTranspose2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)
        self.e, self.e_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        a = self.a(x)
        x = self.a_norm(a) + a
        x = self.b_other(self.b(self.b_norm(self.b(x))))
        x = self.c(self.c_norm(x))
        x = self.d_norm(self.d(x))
        return self.e_norm(self.e(x))


def test_fold_leaves_what_it_would_get_wrong():
    model, x = warmed(Kept(), 2, 3, 4, 4)
    folded = syncbn.fold(model)
    assert norms(folded) == ["BatchNorm2d"] * 5, "only the last is folded"
    expected = model.eval()(x)
    assert (folded(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


class Doubled(nn.Module):
    """The layer's output is what is normalized and what is added."""

    def __init__(self, by_name):
        super().__init__()
        self.layer, self.norm, self.by_name = nn.Conv2d(3, 3, 1), syncbn.SyncBatchNormReLU(3), by_name

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y, residual=y) if self.by_name else self.norm(y, y)


@pytest.mark.parametrize("by_name", [False, True])
def test_fold_leaves_a_layer_whose_output_is_added_too(by_name):
    model, x = warmed(Doubled(by_name), 2, 3, 4, 4)
    folded = syncbn.fold(model)
    assert norms(folded) == ["SyncBatchNormReLU"]
    assert torch.equal(folded(x), model.eval()(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.BatchNorm3d])
def test_fold_leaves_a_linear_layer_whose_features_are_no_channels(norm):
    shape = (2, 3, 4, 3) if norm is nn.BatchNorm2d else (2, 3, 4, 4, 3)
    model, x = warmed(nn.Sequential(nn.Linear(3, 3), norm(3)), *shape)
    folded = syncbn.fold(model)
    assert norms(folded) == [norm.__name__]
    assert torch.equal(folded(x), model.eval()(x))


class StillTraining(nn.Module):
    """Whose batch norm, or layer before it, goes on in training mode, as for adaptation at test time."""

    def __init__(self, layer, norm, which):
        super().__init__()
        self.layer, self.norm, self.which = layer, norm, which

    def train(self, mode=True):
        super().train(mode)
        getattr(self, self.which).train()
        return self

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize("which", ["layer", "norm"])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [(nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)), (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 5, 5))],
)
def test_fold_leaves_what_model_eval_leaves_in_training_mode(layer, norm, shape, which):
    model, x = warmed(StillTraining(*copy.deepcopy((layer, norm)), which), *shape)
    folded = syncbn.fold(model)
    assert norms(folded) == [type(norm).__name__]
    assert torch.equal(folded(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), (3, 6, 6)),  # (4, 4, 4) without a batch, in which the second are the channels
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(6), (3, 8)),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm1d(4), (3, 2, 2)),
    ],
)
def test_fold_leaves_a_convolution_whose_channels_are_others(layer, norm, shape):
    model, x = warmed(nn.Sequential(*copy.deepcopy((layer, norm))), *shape)
    folded = syncbn.fold(model)
    assert norms(folded) == ["BatchNorm1d"]
    assert torch.equal(folded(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's of its older weight_norm
def test_fold_says_what_it_cannot_copy():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"given a Sequential that cannot be copied \(RuntimeError: .*inside of torch.no_grad"):
        syncbn.fold(model)


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def _clipped(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x).relu()


CHANGED = {
    "hook": lambda layer: layer.register_forward_hook(lambda layer, given, y: y.relu()),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda layer, given: (given[0].relu(),)),
    "pruned": _pruned,
}
CONVOLUTION = {
    "weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.spectral_norm(layer),
    "forward": _clipped,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's of its older weight_norm
@pytest.mark.parametrize(("place", "change"), [*((p, c) for p in (0, 1) for c in CHANGED), *((0, c) for c in CONVOLUTION)])
@torch.no_grad()
def test_fold_leaves_a_layer_that_does_more_than_its_class(place, change):
    model, x = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 5, 5)
    (CHANGED | CONVOLUTION)[change](model[place])
    folded, expected = syncbn.fold(model.eval()), model(x)
    assert norms(folded) == ["BatchNorm2d"]
    assert torch.equal(folded(x), expected)


@pytest.mark.parametrize("change", ["hook", "pre-hook"])
def test_fold_keeps_the_hooks_of_the_model_itself(change):
    model, x = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 5, 5)
    CHANGED[change](model)
    folded, expected = syncbn.fold(model), model.eval()(x)
    assert norms(folded) == []
    assert torch.allclose(folded(x), expected, rtol=1e-12)


def test_fold_of_a_model_whose_forward_was_replaced():
    model, _ = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 5, 5)
    _clipped(model)
    with pytest.raises(ValueError, match=r"given a Sequential whose forward was replaced in the instance; expected"):
        syncbn.fold(model)


class Tied(nn.Module):
    """Decodes by the weight of the layer that encodes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.encoder(x), self.encoder[0].weight)


def test_fold_leaves_a_layer_whose_weight_is_read_elsewhere():
    model, x = warmed(Tied(), 2, 3, 5, 5)
    folded = syncbn.fold(model)
    assert norms(folded) == ["BatchNorm2d"]
    assert torch.equal(folded(x), model.eval()(x))


def test_fold_says_what_it_cannot_trace():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"given a Branching that torch.fx cannot trace; expected"):
        syncbn.fold(Branching())


def test_export_of_a_converted_model_in_eval_mode():
    model, x = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 2, 3, 6, 6)
    expected = model.eval()(x)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), expected, rtol=1e-12)
    assert not any("c10d" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporter's own
def test_onnx_of_a_converted_model_in_eval_mode(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    model, x = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 2, 3, 6, 6)
    model, x = model.float().eval(), x.float()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)


def test_averaged_models_average_and_recalibrate():
    """AveragedModel deep-copies; update_bn resets, sets momentum=None and trains once through the data."""
    model = syncbn.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    twin = copy.deepcopy(model)
    syncbn.revert(twin)
    batches = [torch.randn(8, 3) for _ in range(3)]
    averages = []
    for one in (model, twin):
        average = AveragedModel(one, use_buffers=False)
        for _ in range(2):
            with torch.no_grad():
                one[0].weight.add_(0.5)
            average.update_parameters(one)
        update_bn(batches, average)
        averages.append(average)
    assert type(averages[0].module[1]) is syncbn.SyncBatchNorm1d
    for (name, a), b in zip(averages[0].state_dict().items(), averages[1].state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6), name


def test_parametrized_weights_train():
    class Positive(nn.Module):
        def forward(self, original):
            return original.exp()

    layer = syncbn.SyncBatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Positive())
    layer._force_sync = True
    x = torch.randn(6, 3)
    layer(x).pow(3).sum().backward()
    theirs = nn.BatchNorm1d(3)
    parametrize.register_parametrization(theirs, "weight", Positive())
    theirs(x).pow(3).sum().backward()
    mine, expected = (m.parametrizations.weight.original.grad for m in (layer, theirs))
    assert torch.allclose(mine, expected, rtol=1e-5)


def test_state_dict_hooks_run():
    layer = syncbn.SyncBatchNorm1d(3)
    layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update({prefix + "extra": torch.ones(1)}))
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.pop(prefix + "extra"))
    state = layer.state_dict()
    assert "extra" in state
    layer.load_state_dict(state)
