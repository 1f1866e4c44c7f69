"""convert and revert: in place, by class, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import syncbn


def model():
    shared = nn.BatchNorm2d(4)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.ReLU()),
            "again": nn.Sequential(shared, nn.Sequential(shared)),
            "frozen": nn.BatchNorm2d(4).eval().requires_grad_(False),
            "line": nn.BatchNorm1d(5, affine=False),
            "volume": nn.BatchNorm3d(2, track_running_stats=False),
            "rounded": nn.BatchNorm1d(5).bfloat16(),
            "torchs": nn.SyncBatchNorm(6),
            "ours": syncbn.SyncBatchNorm2d(7),
            "group": nn.GroupNorm(2, 4),
            "instance": nn.InstanceNorm2d(4),
        }
    )


def hook(*args):
    return None


def decorated():
    built = model()
    layer = built["stem"][1]
    layer.note = "kept"
    layer.register_forward_hook(hook)
    layer.register_forward_pre_hook(hook)
    layer.register_full_backward_hook(hook)
    layer.register_state_dict_pre_hook(hook)
    return built


def snapshot(module):
    """All that must not change, by identity: modules, parameters, buffers, hooks, attributes."""

    def state(layer):
        kept = {k: v for k, v in vars(layer).items() if k != "_syncbn"}
        inner = {k: {n: id(v) for n, v in d.items()} for k, d in kept.items() if isinstance(d, dict)}
        plain = {k: v if isinstance(v, (int, float, str, bool, type(None))) else id(v) for k, v in kept.items()}
        return inner, plain

    tensors = [*module.parameters(), *module.buffers()]
    return (
        [(name, id(layer), state(layer)) for name, layer in module.named_modules(remove_duplicate=False)],
        [(id(t), is_lazy(t) or t.data_ptr(), t.dtype, t.device, t.requires_grad) for t in tensors],
        list(module.state_dict()),
    )


def classes(module):
    return {name: type(layer) for name, layer in module.named_modules(remove_duplicate=False)}


def test_convert_changes_classes_and_nothing_else_and_revert_gives_them_back():
    built = decorated()
    before, old = snapshot(built), classes(built)
    assert syncbn.convert(built) is built
    assert snapshot(built) == before
    swapped = {
        nn.BatchNorm1d: syncbn.SyncBatchNorm1d,
        nn.BatchNorm2d: syncbn.SyncBatchNorm2d,
        nn.BatchNorm3d: syncbn.SyncBatchNorm3d,
        nn.SyncBatchNorm: syncbn.SyncBatchNorm,
    }
    assert classes(built) == {name: swapped.get(cls, cls) for name, cls in old.items()}
    assert sum(cls in swapped for cls in old.values()) == 8, "one of them is registered twice"
    assert syncbn.revert(built) is built
    assert classes(built) == old
    assert snapshot(built) == before
    assert all("_syncbn" not in vars(layer) for name, layer in built.named_modules() if name != "ours")


def test_converting_twice_is_converting_once():
    built = syncbn.convert(model())
    once = classes(built), {name: layer._syncbn for name, layer in built.items() if hasattr(layer, "_syncbn")}
    syncbn.convert(built)
    assert once == (classes(built), {name: layer._syncbn for name, layer in built.items() if hasattr(layer, "_syncbn")})
    syncbn.convert(nn.Sequential(built))
    assert built["line"]._syncbn.path == "line", "the first conversion names the layer"
    syncbn.revert(built)
    assert type(built["line"]) is nn.BatchNorm1d
    assert type(built["ours"]) is syncbn.SyncBatchNorm2d


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_a_single_layer_as_the_root(cls):
    root = cls(3)
    assert syncbn.convert(root) is root
    assert isinstance(root, syncbn.module._Synchronized)
    assert syncbn.revert(root) is root
    assert type(root) is cls


def test_an_optimizer_already_made_trains_the_converted_model():
    built, twin = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    twin.load_state_dict(built.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (built, twin)]
    syncbn.convert(built)
    x = torch.randn(8, 3)
    for _ in range(3):
        for module, optimizer in zip((built, twin), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(built.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_skip_leaves_layers_as_they_are():
    built = syncbn.convert(model(), skip=lambda name, layer: name.startswith("stem") or isinstance(layer, nn.BatchNorm3d))
    assert type(built["stem"][1]) is nn.BatchNorm2d
    assert type(built["volume"]) is nn.BatchNorm3d
    assert type(built["line"]) is syncbn.SyncBatchNorm1d


def test_hooks_run_after_conversion_and_after_reverting():
    seen = []
    layer = nn.BatchNorm1d(3)
    layer.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    for change in (lambda x: x, syncbn.convert, syncbn.revert):
        change(layer)(torch.randn(4, 3))
    assert seen == ["BatchNorm1d", "SyncBatchNorm1d", "BatchNorm1d"]


def test_deepcopies_revert_by_themselves():
    built = syncbn.convert(model())
    twin = copy.deepcopy(built)
    syncbn.revert(built)
    assert type(twin["line"]) is syncbn.SyncBatchNorm1d
    assert classes(syncbn.revert(twin)) == classes(built)


def _doubled(layer):
    """The instance's forward replaced, as wrappers do that keep the class."""
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)
    return layer


@pytest.mark.parametrize("function", [syncbn.convert, syncbn.revert])
def test_a_forward_replaced_in_the_instance_is_an_error_and_nothing_changes(function):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    if function is syncbn.revert:
        syncbn.convert(model)
    _doubled(model[1])
    classes = [type(layer) for layer in model]
    with pytest.raises(ValueError, match=r"whose forward was replaced by _doubled.<locals>.<lambda> in .*\(layer '1'\)"):
        function(model)
    assert [type(layer) for layer in model] == classes


def test_the_classs_own_forward_left_in_the_instance_does_no_harm():
    layer = nn.BatchNorm1d(2)
    layer.forward = layer.forward
    syncbn.convert(layer)
    assert type(layer).forward is syncbn.SyncBatchNorm1d.forward
    assert "forward" not in vars(layer)
