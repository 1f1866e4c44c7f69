"""Who sees the collectives of a layer, and what is recorded of them: what was entered and not left, in whatever order."""

import asyncio
import contextlib
import gc
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

import syncbn
from syncbn import observing
from syncbn.checkpoint import Recording
from syncbn.collectives import Group
from syncbn.names import named


class Noting:
    """An observer that notes the sizes of messages."""

    def __init__(self):
        self.sizes = []

    def before(self, call, local): ...

    def after(self, call, local, reduced):
        self.sizes.append(reduced.numel())

    def failed(self, call, error): ...

    def inside(self):
        return observing.observe(self)


class Kept(Recording):
    @property
    def sizes(self):
        return [message.numel() for _, message in self.messages]

    def inside(self):
        return self.keep()


def forward():
    syncbn.sync_batch_norm(torch.randn(4, 3), None, None, training=True, _force_sync=True)


@pytest.mark.parametrize("kind", [Noting, Kept])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_contexts_left_in_another_order_than_entered(kind, order):
    each = [kind() for _ in range(3)]
    contexts = [one.inside() for one in each]
    for context in contexts:
        context.__enter__()
    for index in order:
        forward()
        contexts[index].__exit__(None, None, None)
    forward()
    assert [one.sizes for one in each] == [[7] * (1 + order.index(index)) for index in range(3)]


def endless(layer):
    """Steps of a user's loop, which may be left early."""
    with syncbn.accumulate_statistics(layer):
        while True:
            yield layer(torch.randn(5, 2))


async def endless_async(layer):
    for y in endless(layer):
        yield y


def in_another_thread(layer):
    steps = endless(layer)
    next(steps)
    thread = threading.Thread(target=steps.close)
    thread.start()
    thread.join()


def in_a_task_that_goes_on(layer):
    async def train():
        await asyncio.sleep(0.01)
        layer(torch.randn(5, 2))

    async def main():
        with syncbn.accumulate_statistics(layer):
            layer(torch.randn(5, 2))
            task = asyncio.create_task(train())
        await task

    asyncio.run(main())


def in_a_context_of_the_event_loop(layer):
    async def main():
        async for _ in endless_async(layer):
            break
        gc.collect()
        await asyncio.sleep(0.01)
        layer(torch.randn(5, 2))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("leave", "counted"), [(in_another_thread, 0), (in_a_task_that_goes_on, 2), (in_a_context_of_the_event_loop, 1)]
)
def test_a_context_left_in_another_context_than_entered_is_left(leave, counted):
    """Else statistics would stand still for good. What an early end leaves is not counted."""
    layer = syncbn.SyncBatchNorm1d(2)
    leave(layer)
    assert layer.num_batches_tracked == counted
    assert observing.observers() == ()
    layer(torch.randn(5, 2))
    assert layer.num_batches_tracked == counted + 1


def test_an_observer_entered_twice_is_there_until_it_is_left_twice():
    one, other = Noting(), Noting()
    contexts = [one.inside(), other.inside(), one.inside()]
    for context in contexts:
        context.__enter__()
    for context, there in zip(contexts, [(one, other), (one,), ()], strict=True):
        context.__exit__(None, None, None)
        assert sorted(map(id, observing.observers())) == sorted(map(id, there))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [7, 6]), ({"create_graph": True}, [7, 7, 6]), ({"is_grads_batched": True}, [7, 7, 12])],
    ids=["plain", "to be differentiated", "of two gradients at once"],
)
def test_a_backward_is_seen_by_those_who_saw_its_forward(options, sizes):
    inside, outside = Noting(), Noting()
    x = torch.randn(4, 3, requires_grad=True)
    with inside.inside():
        y = syncbn.sync_batch_norm(x, None, None, training=True, _force_sync=True)
    dy = torch.randn(2, *y.shape) if "is_grads_batched" in options else torch.randn(y.shape)
    with outside.inside():
        torch.autograd.grad(y, x, dy, **options)
    assert (inside.sizes, outside.sizes) == (sizes, [])


class Holding(Noting):
    """Asks that running statistics be held."""

    def before(self, call, local):
        self.sizes.append(-local.numel())
        return True


@pytest.mark.parametrize("kinds", list(itertools.permutations([Holding, Holding, Noting])), ids=str)
def test_all_see_a_call_in_which_one_holds_the_statistics(kinds):
    layer, each = syncbn.SyncBatchNorm(3), [kind() for kind in kinds]
    layer._force_sync = True
    with contextlib.ExitStack() as stack:
        for one in each:
            stack.enter_context(one.inside())
        layer(torch.randn(4, 3))
    assert [one.sizes for one in each] == [[-7, 7] if kind is Holding else [7] for kind in kinds]
    assert layer.running_mean.tolist() == [0] * 3


class Telling(Noting):
    """Notes what the messages are."""

    def after(self, call, local, reduced):
        self.sizes.append((call.phase, call.sums, reduced.numel()))


def test_derivatives_of_sums_are_told_from_sums():
    def layer(x):
        return syncbn.sync_batch_norm(x, None, None, training=True, _force_sync=True)

    x, telling = torch.randn(4, 3, requires_grad=True), Telling()
    with telling.inside():
        (dx,) = torch.autograd.grad(layer(x), x, torch.randn(4, 3), create_graph=True)
        dx.square().sum().backward()
        jvp(layer, (x,), (x,))
        vmap(layer)(torch.randn(5, 4, 3))
    assert telling.sizes == [
        *[("forward", True, 7), ("backward", True, 7), ("backward", True, 6), ("backward", False, 6), ("backward", False, 6)],
        *[("forward", True, 7), ("forward", False, 7)],
        ("forward", False, 35),
    ]


def overlapping():
    """Models of one layer, which is 0.0.0, 0.0 and SyncBatchNorm2d in them and was "0" where it was converted."""
    inner = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)))
    return inner[0], [nn.Sequential(nn.Sequential(inner)), nn.Sequential(inner), inner[0]]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_layer_has_the_name_of_the_last_context_entered_and_not_left(order):
    layer, models = overlapping()
    before, names = layer._syncbn, ["0.0.0", "0.0", "SyncBatchNorm2d"]
    contexts = [named(model) for model in models]
    for context in contexts:
        context.__enter__()
    left = ["0", *names]
    for index in order:
        assert layer._syncbn_name() == left[-1]
        contexts[index].__exit__(None, None, None)
        left.remove(names[index])
    assert layer._syncbn == before


def test_a_name_given_twice_is_there_until_it_is_left_twice():
    layer, (_, outer, alone) = overlapping()
    contexts = [named(outer), named(alone), named(outer)]
    for context in contexts:
        context.__enter__()
    for context, name in zip(contexts, ["0.0", "0.0", "0"], strict=True):
        context.__exit__(None, None, None)
        assert layer._syncbn_name() == name


@pytest.mark.parametrize("contexts", [(syncbn.checked, syncbn.monitor), (syncbn.monitor, syncbn.checked)])
def test_the_first_context_is_left_first(contexts):
    layer, (_, outer, alone) = overlapping()
    first, second = contexts[0](outer), contexts[1](alone)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert layer._syncbn_name() == "SyncBatchNorm2d"
    second.__exit__(None, None, None)
    assert layer._syncbn_name() == "0"


def test_a_group_given_inside_is_kept():
    layer, (_, outer, _) = overlapping()
    with named(outer):
        layer._syncbn = layer._syncbn._replace(group=Group(None, 2))
        assert layer._syncbn_name() == "0.0"
    assert layer._syncbn.group == Group(None, 2)
    assert layer._syncbn_name() == "0"


def test_what_is_converted_or_reverted_inside_is_left_as_that_made_it():
    layer, (_, outer, _) = overlapping()
    with named(outer):
        syncbn.revert(outer)
    assert type(layer) is nn.BatchNorm2d
    assert "_syncbn" not in vars(layer)
    syncbn.convert(outer)
    with named(outer[0]):
        syncbn.convert(nn.Sequential(outer), group_size=2)
    assert layer._syncbn.group == Group(None, 2)


def test_a_layer_made_as_ours_has_nothing_of_its_own_afterwards():
    layer = syncbn.SyncBatchNorm(3)
    with named(nn.Sequential(layer)):
        assert layer._syncbn_name() == "0"
    assert "_syncbn" not in vars(layer)
