"""Bad input: an error before the collective that says what was given, what was expected, the layer and the rank."""

import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import syncbn
from syncbn import kernels
from syncbn.collectives import Group

X = torch.randn(4, 3, 2, 2)


def _call(x=X, **changes):
    ones = torch.ones(3)
    arguments = {"running_mean": ones.clone(), "running_var": ones.clone(), "weight": ones, "bias": ones, "training": True}
    return syncbn.sync_batch_norm(x, _force_sync=True, **arguments | changes)


def _nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([X[0].flatten(1).t(), X[1, :, 0].t()], layout=layout)


@torch.inference_mode()
def _inferred():
    return X.clone()


BAD = {
    "one dimension": (lambda: _call(torch.zeros(3)), ValueError, r"given input of shape \(3,\); expected \(N, C, \*\)"),
    "channels": (
        lambda: _call(torch.zeros(4, 2)),
        ValueError,
        r"given input of shape \(4, 2\) and weight of shape \(3,\); expected weight of shape \(2,\)",
    ),
    "column": (
        lambda: _call(weight=torch.ones(3, 1)),
        ValueError,
        r"weight of shape \(3, 1\); expected weight of shape \(3,\)",
    ),
    "running channels": (lambda: _call(running_var=torch.ones(4)), ValueError, r"running_var of shape \(4,\)"),
    "integers": (lambda: _call(X.long()), TypeError, r"given input of torch.int64; expected float16"),
    "complex": (lambda: _call(X + 0j), TypeError, r"given input of torch.complex64; expected float16"),
    "integer weight": (lambda: _call(weight=torch.ones(3).long()), TypeError, r"given weight of torch.int64"),
    "eps": (lambda: _call(eps=-1e-5), ValueError, r"given eps=-1e-05; expected 0 or more"),
    "one buffer": (lambda: _call(running_mean=None), ValueError, r"one of running_mean and running_var; expected both"),
    "one in eval": (lambda: _call(running_var=None, training=False), ValueError, r"one of running_mean and running_var; exp"),
    "momentum": (lambda: _call(momentum=None), TypeError, r"given momentum=None; expected a number"),
    "weight": (lambda: _call(weight=2.0), TypeError, r"given weight=2.0; expected a tensor \(C,\), or None"),
    "mask": (lambda: _call(mask=[True] * 4), TypeError, r"given a mask of type list; expected a tensor of torch.bool"),
    "sparse": (lambda: _call(X.to_sparse()), TypeError, r"given a tensor of torch.sparse_coo; expected a dense one"),
    "opaque": (lambda: _call(X.to_mkldnn()), TypeError, r"given a tensor of torch._mkldnn; expected a dense one"),
    "nested": (lambda: _call(_nested(torch.strided)), TypeError, r"given a nested tensor; expected a dense one"),
    "jagged": (lambda: _call(_nested(torch.jagged)), TypeError, r"given a nested tensor; expected a dense one"),
    "inference": (
        lambda: _call(_inferred(), weight=torch.ones(3, requires_grad=True)),
        ValueError,
        r"given a tensor made inside of torch.inference_mode\(\), which cannot be kept for backward; expected its clone",
    ),
    "devices": (lambda: _call(bias=torch.ones(3, device="meta")), ValueError, r"input on cpu and bias on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_function_names_what_was_given_and_changes_nothing(name):
    call, kind, message = BAD[name]
    with CollectivesSeen() as log, pytest.raises(kind, match=message) as raised:
        call()
    assert str(raised.value).endswith("(layer 'sync_batch_norm', rank 0 of 1)")
    assert log.seen == []


def test_a_residual_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"given a residual of type float; expected a tensor .*ReLU\(3\)'"):
        syncbn.SyncBatchNormReLU(3)(X, 1.0)


@pytest.mark.parametrize("change", [syncbn.convert, syncbn.revert])
@pytest.mark.parametrize(("module", "given"), [([nn.BatchNorm2d(3)], "a list"), (nn.BatchNorm2d, "the class BatchNorm2d")])
def test_what_is_no_module(change, module, given):
    with pytest.raises(TypeError, match=f"^given {given}; expected a torch.nn.Module$"):
        change(module)


def _traced(world):
    layer, message = syncbn.SyncBatchNorm(3, process_group=world.group), "given a trace by torch.jit.trace, .* expected eval"
    with CollectivesSeen() as log, pytest.raises(ValueError, match=message):
        torch.jit.trace(layer, X)
    torch.testing.assert_close(torch.jit.trace(layer.eval(), X)(X), layer(X))
    return log.seen


def test_a_trace_of_torchscript_in_training_is_an_error_on_its_rank():
    assert worlds.run(2, _traced) == [[]] * 2


def _sharded(world):
    x = DTensor.from_local(X, DeviceMesh.from_group(world.group, "cpu"), [Shard(0)])
    with CollectivesSeen() as log, pytest.raises(TypeError, match=r"given a DTensor; expected this rank's share .*x.to_local"):
        syncbn.SyncBatchNorm(3, process_group=world.group)(x)
    return log.seen


def test_a_sharded_input_is_told_to_be_the_ranks_share():
    assert worlds.run(2, _sharded) == [[]] * 2


def test_a_counter_elsewhere():
    """As load_state_dict(assign=True) of an old checkpoint, which has none, leaves it."""
    layer = syncbn.SyncBatchNorm2d(3)
    layer._force_sync, layer.num_batches_tracked = True, layer.num_batches_tracked.to("meta")
    with CollectivesSeen() as log, pytest.raises(ValueError, match="given input on cpu and num_batches_tracked on meta; exp"):
        layer(X)
    assert log.seen == []


class Subclass(nn.BatchNorm2d):
    """Whose forward is its own."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


ONE_BUFFER = {
    "layer": lambda: syncbn.SyncBatchNorm2d(2),
    "layer in eval mode": lambda: syncbn.SyncBatchNorm2d(2).eval(),
    "with a ReLU": lambda: syncbn.SyncBatchNormReLU(2),
    "of a class of the user's": lambda: syncbn.convert(Subclass(2)),  # whose eval mode is its own
}


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", ONE_BUFFER)
def test_one_running_statistic_of_the_two(name, missing):
    layer = ONE_BUFFER[name]()
    setattr(layer, missing, None)
    with CollectivesSeen() as log, pytest.raises(ValueError, match="given one of running_mean and running_var") as raised:
        layer(torch.randn(4, 2, 3, 3))
    assert str(raised.value).endswith(f"; expected both or neither (layer {layer._syncbn_name()!r}, rank 0 of 1)")
    assert log.seen == []


def test_one_running_statistic_of_two_that_are_not_used():
    """As torch has it: in training a layer that tracks none does not look at them."""
    layer, theirs = syncbn.SyncBatchNorm2d(2), nn.BatchNorm2d(2)
    x = torch.randn(4, 2, 3, 3)
    for each in (layer, theirs):
        each.track_running_stats, each.running_var = False, None
    torch.testing.assert_close(layer(x), theirs(x))


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match=r"given process_group='all' of type str; expected a torch.distributed.ProcessGroup"):
        _call(process_group="all")
    with pytest.raises(TypeError, match="process_group=3 of type int"):
        syncbn.SyncBatchNorm2d(3, process_group=3)
    with pytest.raises(TypeError, match=r"given group_size=2.0; expected an int"):
        syncbn.SyncBatchNorm2d(3, group_size=2.0)
    with pytest.raises(TypeError, match=r"given group_size=True; expected an int"):
        syncbn.SyncBatchNorm2d(3, group_size=True)
    with pytest.raises(ValueError, match="given group_size=0; expected 1 or more"):
        syncbn.convert(nn.BatchNorm2d(3), group_size=0)


def test_negative_eps_in_the_constructor():
    with pytest.raises(ValueError, match=r"given eps=-1.0 for SyncBatchNorm1d\(3\); expected 0 or more"):
        syncbn.SyncBatchNorm1d(3, eps=-1.0)


LAYERS = {
    "dimensions": (torch.zeros(2, 3, 4), r"expected 4D input \(got 3D input\)"),
    "channels": (torch.zeros(2, 4, 2, 2), r"given input of shape \(2, 4, 2, 2\), 4 channels; expected 3 channels"),
}


def model():
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"norm": nn.BatchNorm2d(3, affine=False, track_running_stats=False)}))


@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_is_named_by_its_path(name):
    x, message = LAYERS[name]
    layer = syncbn.convert(model())[1]["norm"]
    layer._force_sync = True
    with pytest.raises(ValueError, match=message + r" \(layer '1.norm', rank 0 of 1\)$"):
        layer(x)


def _bad_channels(world):
    layer = syncbn.convert(model(), world.group)[1]["norm"]
    with CollectivesSeen() as log:
        try:
            layer(torch.zeros(2, 4 + world.rank, 2, 2))
        except ValueError as error:
            return str(error), log.seen
    return None


def test_over_processes_each_rank_names_itself_and_none_waits():
    for rank, (message, seen) in enumerate(worlds.run(4, _bad_channels)):
        assert f"{4 + rank} channels" in message
        assert message.endswith(f"(layer '1.norm', rank {rank} of 4)")
        assert seen == []


def _outside(world):
    layer = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), dist.new_group([0, 1]))
    assert layer.eval()(torch.zeros(4, 3)).shape == (4, 3), "eval needs no group"
    try:
        return layer.train()(torch.zeros(4, 3)).shape
    except ValueError as error:
        return str(error)


def test_a_rank_outside_of_the_group_is_told_so_at_its_first_training_forward():
    results = worlds.run(4, _outside)
    assert results[:2] == [(4, 3)] * 2
    for rank in (2, 3):
        assert re.match("given a process group that this rank is not in; expected one that holds", results[rank])
        assert results[rank].endswith(f"(layer '0', rank {rank} of 4)")


def test_a_device_without_float64(monkeypatch):
    monkeypatch.setattr(kernels, "has_float64", lambda device_type: False)
    with pytest.raises(ValueError, match="given input on device 'meta', which has no float64; expected a device that has it"):
        syncbn.sync_batch_norm(X.to("meta"), None, None, training=True, _force_sync=True)


def test_the_probe_for_float64_sees_what_a_device_says():
    assert kernels.has_float64("cpu")
    assert not kernels.has_float64("no such device")


def test_a_momentum_that_is_no_number_changes_nothing():
    layer = syncbn.SyncBatchNorm1d(3, momentum="0.1")
    layer._force_sync = True
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(TypeError, match=r"given momentum='0.1'; expected a number, or None .* rank 0 of 1"):
        layer(torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("momentum", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)], ids=lambda m: type(m).__name__)
def test_a_momentum_may_be_any_number(force, momentum):
    layers = [syncbn.SyncBatchNorm1d(3, momentum=m) for m in (momentum, 0.5)]
    x = torch.randn(4, 3)
    for layer in layers:
        layer._force_sync = force
        layer(x)
    assert torch.equal(layers[0].running_var, layers[1].running_var)
    means = [torch.zeros(3), torch.zeros(3)]
    for m, mean in zip((momentum, 0.5), means, strict=True):
        syncbn.sync_batch_norm(x, mean, torch.ones(3), training=True, momentum=m, _force_sync=force)
    assert torch.equal(*means)


def test_a_momentum_on_a_device_is_no_number_that_the_host_knows():
    with pytest.raises(TypeError, match=r"given momentum=.*; expected a number"):
        _call(momentum=torch.tensor([0.1, 0.2]))


def test_symbolic_tracing_says_what_to_do():
    """nn.BatchNorm2d is a leaf to torch.fx; a class of ours is one to a tracer that knows."""
    with pytest.raises(torch.fx.proxy.TraceError, match=r"trace before syncbn.convert, or by a Tracer whose is_leaf_module"):
        torch.fx.symbolic_trace(syncbn.convert(nn.Sequential(nn.BatchNorm2d(3))))


def _alone_too_long(world):
    """Rank 1 never comes."""
    if world.rank == 1:
        return None
    try:
        syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)))(torch.zeros(4, 3))
    except syncbn.CollectiveError as error:
        return str(error), str(error.__cause__)
    return "no error"


def test_a_peer_that_does_not_come_is_an_error_with_layer_phase_and_rank():
    message, cause = worlds.run_fresh(2, _alone_too_long, group_timeout=2.0)[0]
    assert message.startswith("all_reduce of layer '0' failed in forward on rank 0 of 2, in a group of 2 on cpu; expected")
    assert "within 0:00:02" in message
    assert "imed out" in cause


def test_pickling_a_group_says_what_to_do():
    group = Group()
    group.process_group = object()
    with pytest.raises(TypeError, match=r"cannot be pickled; expected no group or a group_size: save model.state_dict\(\)"):
        group.__reduce__()
