"""A forward or a loss may write to its batch: each pass has the same one, and the user's stays as it is."""

import copy
import dataclasses
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn.analysis import (
    batch_norm_smoothness,
    gradient_bias,
    gradient_correlation,
    gradient_growth,
    gradient_landscape,
    hessian_spectrum,
)
from syncbn.analysis.batch import copied


class InPlace(nn.Module):
    """Normalizes its input in place."""

    def __init__(self, inplace=True):
        super().__init__()
        self.inplace = inplace
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        x = x.sub_(3.0).div_(0.5) if self.inplace else (x - 3.0) / 0.5
        return self.net(x)


def network(inplace=True):
    torch.manual_seed(1)
    return InPlace(inplace).double()


def whole_batch():
    generator = torch.Generator().manual_seed(2)
    return 3 + torch.rand(12, 4, dtype=torch.float64, generator=generator), torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


MEASURES = {
    "growth": gradient_growth,
    "shift": lambda model, loss, batch: gradient_correlation(model, loss, batch, 0.3),
    "landscape": lambda model, loss, batch: gradient_landscape(model, loss, batch, 0.3),
    "spectrum": lambda model, loss, batch: hessian_spectrum(model, loss, batch, 4).values.tolist(),
    "smoothness": batch_norm_smoothness,
    "bias": lambda model, loss, batch: gradient_bias(model, loss, lambda number: [(batch[0][:6], batch[1][:6])], batch, 2),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_a_forward_in_place_is_that_of_one_that_is_not(name):
    batch, before = whole_batch(), whole_batch()
    found = MEASURES[name](network(), cross_entropy, batch)
    assert found == MEASURES[name](network(False), cross_entropy, whole_batch())
    assert all(torch.equal(now, then) for now, then in zip(batch, before, strict=True))


def test_a_learning_rate_of_zero_has_no_shift():
    shift = gradient_correlation(network(), cross_entropy, whole_batch(), 0.0)
    assert [layer.relative for layer in shift.layers] == [0, 0]
    assert shift.cosine == pytest.approx(1, abs=1e-15)


def test_the_whole_batch_as_the_only_mini_batch_has_no_bias():
    batch = whole_batch()
    assert gradient_bias(network(), cross_entropy, lambda number: [batch], batch, 2) == (0, 0)


def test_a_loss_may_take_labels_out_of_a_dict():
    def loss(model, batch):
        labels = batch.pop("labels")
        batch["x"] = batch["x"].clamp_(3.1, 3.9)
        return F.cross_entropy(model(**batch), labels)

    x, labels = whole_batch()
    batch = {"x": x, "labels": labels}
    shift = gradient_correlation(network(), loss, batch, 0.0)
    assert [layer.l2 for layer in shift.layers] == [0, 0]
    assert batch["labels"] is labels
    assert torch.equal(batch["x"], whole_batch()[0])


class Pair(NamedTuple):
    one: torch.Tensor
    other: object


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Not made anew, which would scale it again."""

    x: torch.Tensor
    rest: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "rest", self.x + 1)
        object.__setattr__(self, "x", self.x * 2)


class Refusing(OrderedDict):
    def update(self, *args):
        raise TypeError


def in_containers(x):
    return [
        [x, 1],
        (x, "text"),
        Pair(x, [x]),
        {"x": x, 3: None},
        UserDict(x=x),
        Refusing(x=x),
        Scaled(x),
    ]


def leaves(node):
    if isinstance(node, torch.Tensor):
        return [node]
    values = vars(node).values() if isinstance(node, Scaled) else node.values() if hasattr(node, "values") else node
    return [leaf for value in values if not isinstance(value, (str, int, type(None))) for leaf in leaves(value)]


@pytest.mark.parametrize("at", range(7))
def test_containers_are_copied_with_their_tensors(at):
    batch = in_containers(torch.arange(6.0).reshape(2, 3))[at]
    kept = copy.deepcopy(leaves(batch))
    made = copied(batch)
    assert type(made) is type(batch)
    assert made is not batch
    assert len(leaves(made)) == len(kept) > 0
    for mine, theirs, value in zip(leaves(made), leaves(batch), kept, strict=True):
        assert torch.equal(mine, value)
        mine.add_(1)
        assert torch.equal(theirs, value)
        mine.sub_(1)


def test_a_tensor_that_is_there_twice_is_one():
    x = torch.ones(2)
    one, (other, rest) = copied((x, [x, torch.ones(2)]))
    assert one is other
    assert one is not x
    assert rest is not one


def test_tensors_keep_strides_class_and_gradients():
    weight = nn.Parameter(torch.ones(3))
    leaf, node = torch.ones(3, requires_grad=True), weight * 2
    image, whole = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.arange(3)

    class Labelled(torch.Tensor):
        pass

    marked = torch.ones(2).as_subclass(Labelled)
    mine = copied([weight, leaf, node, image, whole, marked], [weight])
    assert mine[0] is weight
    assert mine[1] is not leaf
    assert mine[1].is_leaf
    assert mine[1].requires_grad
    mine[2].sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert mine[3].is_contiguous(memory_format=torch.channels_last)
    assert not mine[3].requires_grad
    assert mine[4].dtype == torch.int64
    assert type(mine[5]) is Labelled
    assert mine[5] is not marked


def test_a_loss_may_differentiate_by_its_batch():
    """As a penalty on the gradient does."""

    def loss(model, x):
        (gradient,) = torch.autograd.grad(model.net(x).square().sum(), x, create_graph=True)
        return gradient.square().mean()

    x = whole_batch()[0].requires_grad_()
    shift = gradient_correlation(network(), loss, x, 0.0)
    assert [layer.l2 for layer in shift.layers] == [0, 0]
    assert x.grad is None


def test_what_is_no_container_stays_the_same():
    one = object()
    assert copied(one) is one
    assert copied([one])[0] is one
