"""update_bn_stats leaves all but the statistics as it was, and says what it does with what is not batch norm."""

import io
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
import worlds
from populations import STEPS, batch, check, inputs_of, network, whole_batches
from torch import nn

import syncbn
from syncbn.population import update_bn_stats


class TroubleError(Exception):
    pass


def traces(model):
    """What must be as it was."""
    modes = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return modes, [getattr(m, "momentum", None) for m in model.modules()], [vars(m).keys() for m in model.modules()]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("trouble", ["none", "model", "loader", "layer"])
def test_all_but_the_statistics_is_left_as_it_was(trouble, training, converted):
    model = network()
    if converted:
        syncbn.convert(model)
    if not training:
        model.eval()
    model.head.register_forward_hook(lambda *_: None)
    if trouble == "model":
        model.pool.register_forward_hook(lambda layer, args, y: raise_trouble() if len(y) == 3 else None)
    if trouble == "layer":
        model.twice.register_forward_hook(lambda layer, args, y: raise_trouble() if len(y) == 3 else None)
    before, state = traces(model), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [id(buffer) for buffer in model.buffers()]

    def stream():
        yield batch(0, 2)
        if trouble == "loader":
            raise_trouble()
        yield batch(1, 3)

    if trouble == "none":
        update_bn_stats(model, stream(), progress=False)
    else:
        with pytest.raises(TroubleError):
            update_bn_stats(model, stream(), progress=False)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert traces(model) == before
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(p.grad is None for p in model.parameters())


def raise_trouble():
    raise TroubleError


def test_modes_are_those_of_the_model():
    """Layers in eval mode in a training model are frozen; a model in eval mode is updated whole, its dropout off."""
    modes = []
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())).eval()
    model[2][1].register_forward_hook(lambda layer, args, y: modes.append((model[0].training, layer.training)))
    x = torch.randn(6, 3)
    update_bn_stats(model, [x], progress=False)
    assert model[0].num_batches_tracked == model[2][0].num_batches_tracked == 1
    model.train()
    model[0].eval()
    update_bn_stats(model, [x, x], progress=False)
    assert (model[0].num_batches_tracked, model[2][0].num_batches_tracked) == (1, 2)
    assert modes == [(True, False), (False, True), (False, True)]


@pytest.mark.parametrize("trouble", [False, True])
def test_layers_that_are_no_batch_norm_keep_their_statistics(trouble):
    """In a training model, whose instance norm moves with every forward."""

    lazy = nn.LazyInstanceNorm1d(track_running_stats=True)
    model, x = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3), lazy), torch.randn(4, 3, 5) + 2
    with torch.no_grad():
        model[0].running_mean.fill_(0.25)
        model[0].running_var.fill_(4.0)
    buffers = [id(buffer) for buffer in model[0].buffers()]
    if trouble:
        hook = model[2].register_forward_hook(lambda layer, args, y: raise_trouble())
        with pytest.raises(TroubleError):
            update_bn_stats(model, [x], progress=False)
        hook.remove()
    else:
        update_bn_stats(model, [x, x + 1], progress=False)
        y = nn.functional.instance_norm(x)  # by its own statistics, whatever was added
        torch.testing.assert_close(model[1].running_var, y.transpose(0, 1).flatten(1).var(1))
        assert model[1].num_batches_tracked == 2
    assert model[0].running_mean.eq(0.25).all()
    assert model[0].running_var.eq(4).all()
    assert model[0].num_batches_tracked == 0
    assert [id(buffer) for buffer in model[0].buffers()] == buffers
    model(x)
    assert model[0].running_mean.ne(0.25).all(), "it moves in training as ever"


class Unmeasured(list):
    """Batches whose number is not known."""

    def __init__(self, batches, error):
        super().__init__(batches)
        self.error = error

    def __len__(self):
        raise self.error


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
@pytest.mark.parametrize("num_batches", [None, 2])
def test_a_loader_without_a_length_has_a_bar_without_an_end(error, num_batches):
    model = nn.BatchNorm1d(3)
    x = torch.randn(7, 3)
    with redirect_stderr(io.StringIO()) as shown:
        update_bn_stats(model, Unmeasured([x, x + 1, x + 2], error), num_batches=num_batches)
    torch.testing.assert_close(model.running_mean, x.mean(0) + (1 if num_batches is None else 0.5))
    assert ("3batch" if num_batches is None else "2/2") in shown.getvalue()


def test_nothing_to_update_takes_no_batch():
    def unread():
        raise_trouble()
        yield

    frozen = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False))
    update_bn_stats(frozen, unread(), progress=False)
    update_bn_stats(nn.Linear(2, 3), unread(), progress=False)
    assert frozen[1].running_mean.tolist() == [0.0] * 3
    assert frozen[1].num_batches_tracked == 0


def test_a_compiled_model_runs_eagerly():
    batches = whole_batches(STEPS["unequal"], 3)[0]
    model = syncbn.convert(network())
    model.head.compile()
    update_bn_stats(torch.compile(model), batches, progress=False)
    check(model.state_dict(), network().state_dict(), inputs_of(network(), batches), False, 1e-12)


def _with_bar(world, progress):
    model = syncbn.convert(network(), world.group)
    with redirect_stderr(io.StringIO()) as shown:
        update_bn_stats(model, [batch(0, 2)] * 3, num_batches=2, progress=progress)
    return shown.getvalue()


def test_the_progress_bar_is_on_rank_0_alone(monkeypatch):
    first, second = worlds.run(2, _with_bar, True)
    assert "2/2" in first
    assert second == ""
    assert worlds.run(2, _with_bar, False) == ["", ""]
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert _with_bar(SimpleNamespace(group=None), True) == ""
