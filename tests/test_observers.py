"""Who sees the collectives of a layer, and what is recorded of them: what was entered and not left, in whatever order."""

import itertools

import pytest
import torch

import syncbn
from syncbn import collectives
from syncbn.checkpoint import Recording


class Noting:
    """An observer that notes the sizes of messages."""

    def __init__(self):
        self.sizes = []

    def before(self, call, local): ...

    def after(self, call, local, reduced):
        self.sizes.append(reduced.numel())

    def failed(self, call, error): ...

    def inside(self):
        return collectives.observe(self)


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


def test_an_observer_entered_twice_is_there_until_it_is_left_twice():
    one, other = Noting(), Noting()
    contexts = [one.inside(), other.inside(), one.inside()]
    for context in contexts:
        context.__enter__()
    for context, there in zip(contexts, [(one, other), (one,), ()], strict=True):
        context.__exit__(None, None, None)
        assert sorted(map(id, collectives.observers())) == sorted(map(id, there))
