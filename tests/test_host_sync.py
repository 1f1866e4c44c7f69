"""No path of the layer waits for the device, in forward or backward."""

import itertools

import batches
import pytest
import torch
import worlds
from batches import Case
from host_sync import HostSyncError, NoHostSync
from test_layer import layer_for
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import syncbn
from syncbn.kernels import aten


def step(layer, x, dy):
    """Forward and backward with every operator watched."""
    x = x.detach().requires_grad_()
    with NoHostSync():
        layer(x).backward(dy)
    return x.grad.shape


PATHS = [
    (Case(2, shares, dtype=dtype, affine=affine, momentum=momentum), form)
    for shares, dtype, affine, momentum, form in itertools.product(
        ("unequal", "empty", "all empty", "single"),
        (torch.float32, torch.bfloat16),
        ("both", "none"),
        (0.1, None),
        ("module", "no running statistics"),
    )
]


@pytest.mark.parametrize("training", [True, False])
def test_in_a_process_that_is_alone(training):
    for (case, form), forced in itertools.product(PATHS, (True, False)):
        layer = layer_for(case, form).train(training)
        layer._force_sync = forced
        x, dy = (t[-1] for t in batches.make(case))
        values = x.numel() // batches.CHANNELS
        if not forced and values <= 1 and (training or layer.running_mean is None):
            continue  # torch raises there
        assert step(layer, x, dy) == x.shape


def _over_processes(world):
    shapes = []
    for case, form in PATHS:
        layer = syncbn.convert(layer_for(case, form), world.group)
        shapes.append(step(layer, *(t[world.rank] for t in batches.make(case))))
    return shapes


def test_over_processes():
    for rank, shapes in enumerate(worlds.run(2, _over_processes)):
        assert shapes == [batches.make(case)[0][rank].shape for case, _ in PATHS]


def _item(x):
    return x * x.sum().item()


def _boolean_mask(x):
    return x[x > 0]


def _branch(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize("plant", [_item, _boolean_mask, _branch])
@pytest.mark.parametrize("where", ["moments", "normalize", "gradient_sums", "input_gradient"])
def test_a_planted_wait_is_seen(plant, where, monkeypatch):
    original = getattr(aten, where)

    def planted(*args):
        plant(torch.ones(3))
        return original(*args)

    monkeypatch.setattr(aten, where, planted)
    case = Case(1, "equal")
    layer = layer_for(case, "module")
    layer._force_sync = True
    with pytest.raises(HostSyncError):
        step(layer, *(t[0] for t in batches.make(case)))


def _to_list(x):
    return x * len(x.tolist())


def fake_step(case, form, plant=None):
    """Forward and backward where tensors have no values: what reads one cannot run. The reduction is that of one process."""
    with FakeTensorMode():
        layer = layer_for(case, form)
        layer._force_sync = True
        if plant is not None:
            layer.register_forward_hook(lambda module, args, y: plant(y.clone()))
        x = torch.randn(batches.make(case)[0][0].shape, dtype=case.dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.randn_like(y))
        return x.grad.shape


def test_without_values():
    for case, form in PATHS:
        assert fake_step(case._replace(world=1), form) == batches.make(case)[0][0].shape


@pytest.mark.parametrize("plant", [_item, _boolean_mask, _branch, _to_list])
def test_without_values_a_planted_read_is_seen(plant):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        fake_step(Case(1, "equal"), "module", plant)
