"""Activation checkpointing: statistics move once, results are those without it, and the collective need not repeat."""

import contextlib
import copy
import threading

import pytest
import torch
import worlds
from collectives_seen import CollectivesSeen
from tolerance import assert_same_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import syncbn
from syncbn.analysis import gradient_landscape

KINDS = ["none", "reentrant", "not reentrant", "with our context"]
SHARES = (3, 5, 0)


class Block(nn.Module):
    """A layer that is called twice, and one that is called once."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, width, 1), nn.Tanh())
        self.twice = nn.BatchNorm2d(width)
        self.once = nn.BatchNorm2d(width, momentum=None)

    def forward(self, x):
        return self.once(self.inner(self.twice(self.inner(self.twice(x))))) + x


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([Block(4), Block(4)])

    def run(self, block, x):
        if self.kind == "none":
            return block(x)
        if self.kind == "reentrant":
            return checkpoint(block, x, use_reentrant=True)
        if self.kind == "not reentrant":
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_context)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x


class Nested(Net):
    """Both blocks in one checkpoint, each in one of its own."""

    def forward(self, x):
        return self.run(lambda y: super(Nested, self).forward(y), x)


def batch(step, world, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(SHARES[:world]), 2, 3, 3, generator=generator, dtype=dtype).split(SHARES[:world])


def train(net, take, forwards=1, accumulate=False, reduce=None, steps=3):
    """Some steps, `forwards` batches each: all forwards before one backward, or a backward for each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        losses = []
        for part in range(forwards):
            loss = net(take(10 * step + part)).pow(3).sum() / 100
            losses.append(loss)
            if accumulate:
                loss.backward()
        if not accumulate:
            sum(losses).backward()
        if reduce is not None:
            for p in net.parameters():
                p.grad = reduce(p.grad)
        optimizer.step()
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def _trained(world, cls, kind, forwards, accumulate, ddp):
    net = syncbn.convert(cls(kind).double(), world.group)
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer._force_sync = True

    def reduce(g):
        g = g.clone()
        torch.distributed.all_reduce(g, group=world.group)
        return g

    def take(step):
        return batch(step, world.size)[world.rank].clone().requires_grad_()

    model = net
    if ddp:
        model = DistributedDataParallel(net, process_group=world.group)
    train(model, take, forwards, accumulate, (lambda g: g * world.size) if ddp else reduce)
    return net.state_dict()


def expected(cls, world, forwards, accumulate):
    return train(cls("none").double(), lambda step: torch.cat(batch(step, world)), forwards, accumulate)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_move_once_and_results_are_those_without(world, kind):
    for state in worlds.run(world, _trained, Net, kind, 1, False, False):
        assert_same_state(state, expected(Net, world, 1, False))


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize(("forwards", "accumulate", "ddp"), [(2, False, False), (2, True, False), (2, False, True)])
def test_several_forwards_and_accumulation(kind, forwards, accumulate, ddp):
    """Two forwards before a backward, or a backward for each."""
    for state in worlds.run(2, _trained, Net, kind, forwards, accumulate, ddp):
        assert_same_state(state, expected(Net, 2, forwards, accumulate))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_nested_checkpoints(kind):
    for state in worlds.run(2, _trained, Nested, kind, 1, False, False):
        assert_same_state(state, expected(Nested, 2, 1, False))


@pytest.mark.parametrize("kind", KINDS)
def test_alone_statistics_move_once_too(kind):
    """Where the layer is torch's own."""
    net = syncbn.convert(Net(kind).double())
    assert_same_state(train(net, lambda step: torch.cat(batch(step, 2)).requires_grad_()), expected(Net, 2, 1, False))


def _counted(world, cls, kind, early_stop):
    net = syncbn.convert(cls(kind).double(), world.group)
    x = batch(0, world.size)[world.rank].clone().requires_grad_()
    with CollectivesSeen() as log, set_checkpoint_early_stop(early_stop):
        loss = net(x).sum()
        forward = len(log.seen)
        loss.backward()
    return forward, len(log.seen) - forward


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    ("cls", "kind", "repeated"),
    [
        (Net, "none", 0),
        (Net, "reentrant", 6),
        (Net, "not reentrant", 6),
        (Net, "with our context", 0),
        (Nested, "with our context", 0),
    ],
)
def test_collectives_in_a_backward(cls, kind, repeated, early_stop):
    """Seven calls of layers, six of them in checkpoints; every rank issues the same, also the empty one."""
    for forward, backward in worlds.run(3, _counted, cls, kind, early_stop):
        assert (forward, backward) == (7, 7 + repeated)


def _backward_twice(world):
    net = syncbn.convert(Net("with our context").double(), world.group)
    x = batch(0, world.size)[world.rank].clone().requires_grad_()
    y = net(x)
    loss = y.pow(3).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    return (first - torch.autograd.grad(loss, x)[0]).abs().max().item(), first.abs().max().item()


def test_a_second_backward_through_the_same_forward():
    assert all(off == 0 and size > 0.01 for off, size in worlds.run(2, _backward_twice))


def test_a_recomputation_that_calls_other_layers_is_named():
    layers = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    model = syncbn.convert(nn.ModuleDict({"a": layers[0], "b": layers[1]}))
    for layer in layers:
        layer._force_sync = True
    order = [*"a", *"b"]
    x = torch.randn(4, 2, requires_grad=True)
    y = checkpoint(lambda z: model[order.pop(0)](z), x, use_reentrant=False, context_fn=syncbn.checkpoint_context)
    with pytest.raises(
        syncbn.CollectiveError, match="layer 'b' is call 1 of a recomputation whose forward had layer 'a' there"
    ):
        y.sum().backward()


def _in_a_thread(backward):
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


CONTEXTS = {
    "accumulated, backward behind": (syncbn.accumulate_statistics, False, False),
    "accumulated, backward in a thread": (syncbn.accumulate_statistics, True, True),
    "watched, backward behind": (syncbn.monitor, False, False),
    "watched, backward in a thread": (syncbn.monitor, True, True),
    "watched from the backward on": (syncbn.monitor, None, True),
}


@pytest.mark.parametrize("context_fn", [None, syncbn.checkpoint_context])
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_recomputation_alone_saves_what_its_forward_did_whoever_sees_it(name, context_fn):
    """In a process that is alone observers choose the path; threads of autograd have none of the contexts."""
    context, in_a_thread, watched_backward = CONTEXTS[name]
    options = {} if context_fn is None else {"context_fn": context_fn}
    gradients = []
    for observed in (True, False):
        torch.manual_seed(0)
        model = syncbn.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double())
        x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
        with contextlib.ExitStack() as stack:
            if observed and in_a_thread is not None:
                stack.enter_context(context(model))
            loss = checkpoint(model, x, use_reentrant=False, **options).square().sum()
            if observed and in_a_thread is None:
                stack.enter_context(context(model))
            if watched_backward:
                _in_a_thread(loss.backward) if in_a_thread else loss.backward()
        if not watched_backward:
            loss.backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        checkpoint(model, x, use_reentrant=False, **options).sum().backward()  # the next, which nobody sees
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


BETWEEN = {
    "population": lambda model, x: syncbn.update_bn_stats(model, [x.detach()], progress=False),
    "a measure": lambda model, x: gradient_landscape(model, lambda model, x: model(x).square().mean(), x.detach(), 0.1),
}


@pytest.mark.parametrize(("name", "accumulated"), [("population", False), ("a measure", False), ("a measure", True)])
def test_what_observes_forwards_of_its_own_leaves_a_recomputation_as_it_was(name, accumulated):
    gradients = []
    for between in (lambda model, x: None, BETWEEN[name]):
        torch.manual_seed(0)
        model = syncbn.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double())
        x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
        with syncbn.accumulate_statistics(model) if accumulated else contextlib.nullcontext():
            loss = checkpoint(model, x, use_reentrant=False).square().sum()
            between(model, x)
            loss.backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_a_block_may_make_its_layer_anew():
    layer = syncbn.SyncBatchNorm1d(4)
    layer._force_sync = True
    x = torch.randn(8, 4, requires_grad=True)
    y = checkpoint(lambda x: copy.deepcopy(layer)(x), x, use_reentrant=False, context_fn=syncbn.checkpoint_context)
    y.pow(3).sum().backward()
    expected = torch.autograd.grad(copy.deepcopy(layer)(x).pow(3).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def _named_between(world):
    """Gradients with a monitor around the forward alone, and around the backward alone, of layers made as ours."""
    found = []
    for watched in (None, "forward", "backward"):
        torch.manual_seed(0)
        layer = syncbn.SyncBatchNorm1d(4, process_group=world.group).double()
        model = nn.Sequential(nn.Linear(4, 4).double(), layer)
        x = torch.randn(3 + world.rank, 4, generator=torch.Generator().manual_seed(world.rank)).double().requires_grad_()
        with syncbn.monitor(model) if watched == "forward" else contextlib.nullcontext():
            y = checkpoint(model, x, use_reentrant=False, context_fn=syncbn.checkpoint_context)
        with syncbn.monitor(model) if watched == "backward" else contextlib.nullcontext(), CollectivesSeen() as seen:
            y.pow(3).sum().backward()
        found.append((x.grad, len(seen.seen)))
    return found


def test_a_recomputation_knows_its_layers_by_any_name():
    for (plain, collectives), *others in worlds.run(2, _named_between):
        assert collectives == 1
        for gradient, issued in others:
            assert torch.equal(gradient, plain)
            assert issued == 1, "that of the backward"


def test_a_forward_called_from_a_hook_of_a_backward_moves_nothing():
    """As the docstring says."""
    layer = syncbn.SyncBatchNorm1d(2)
    x = torch.randn(4, 2, requires_grad=True)
    y = layer(x)
    moved = layer.running_mean.clone()
    y.register_hook(lambda g: (layer(x.detach()), None)[1])
    y.sum().backward()
    assert torch.equal(layer.running_mean, moved)
    assert layer.num_batches_tracked.item() == 1
