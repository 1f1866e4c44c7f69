"""What even_steps knows of a batch: its samples, and the form without any that a rank without a batch is given."""

import dataclasses
import functools
from collections import UserDict, deque, namedtuple
from collections.abc import MutableMapping
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn
from uneven import caught

from syncbn.steps import even_steps
from syncbn.trees import count_samples, emptied

REFERRED = torch.ones(1)  # by a function
Pair = namedtuple("Pair", "x target")
REFUSED = (
    "given a batch with a {} that holds tensors; expected tensors in lists, tuples, named tuples, dict, UserDict and "
    "dataclasses, or the arguments count and empty"
)


@dataclasses.dataclass
class Sample:
    x: Any
    ids: Any


class Bag:
    """A batch that is no container."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return torch.equal(self.x, other.x)


class Slots:
    __slots__ = ("__x",)

    def __init__(self, x):
        self.__x = x


class Deeper(Slots):
    """In a list, in a dictionary, in an attribute."""

    def __init__(self, x):
        super().__init__(None)
        self.fields = {"all": [x]}


class Attributes(dict):
    """A dictionary whose items are its attributes; copy.copy gives one where they are not."""

    def __init__(self, x):
        super().__init__(x=x)
        self.__dict__ = self


class Wrapped(MutableMapping):
    """A mapping whose copy.copy holds the same dictionary."""

    def __init__(self, **items):
        self.items_of = items

    def __getitem__(self, key):
        return self.items_of[key]

    def __setitem__(self, key, value):
        self.items_of[key] = value

    def __delitem__(self, key):
        del self.items_of[key]

    def __iter__(self):
        return iter(self.items_of)

    def __len__(self):
        return len(self.items_of)


# Containers


def batch_of(kind, n):
    x, target, scale = torch.ones(n, 3, 5), torch.arange(n), torch.tensor(7.0)
    ids, names = tuple(range(n)), [f"s{i}" for i in range(n)]
    return {
        "tensor": x,
        "list": [x.half(), target, names, Sample],  # a class, which is no sample
        "tuple": (ids, (x, [target]), "train", None),
        "dict": {"scale": scale, "x": x, "inner": {"names": names, "target": target}, "kind": "image"},
        "named": Pair(x, {"t": target}),
        "dataclass": Sample(x, ids),
        "mapping": UserDict(x=x, ids=ids),
    }[kind]


KINDS = ["tensor", "list", "tuple", "dict", "named", "dataclass", "mapping"]


def assert_alike(given, expected, path="batch"):
    """Same types, and same values down to dtype and shape."""
    assert type(given) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert (given.dtype, given.shape) == (expected.dtype, expected.shape), path
        assert torch.equal(given, expected), path
    elif isinstance(expected, (list, tuple)):
        assert len(given) == len(expected), path
        for at, (a, b) in enumerate(zip(given, expected, strict=True)):
            assert_alike(a, b, f"{path}[{at}]")
    elif isinstance(expected, (dict, UserDict)):
        assert list(given) == list(expected), path
        for key in expected:
            assert_alike(given[key], expected[key], f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(expected):
        assert_alike(vars(given), vars(expected), path)
    else:
        assert given == expected, path


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_form_of_a_batch(kind):
    batch = batch_of(kind, 4)
    assert_alike(emptied(batch), batch_of(kind, 0))
    assert_alike(batch, batch_of(kind, 4))


def _containers(world, kind):
    batches = [batch_of(kind, n) for n in {0: [2, 3, 1], 1: [4], 2: []}[world.rank]]
    steps = list(even_steps(batches, world.group, count=None if kind != "tuple" else lambda batch: len(batch[0])))
    return [batch for batch, _ in steps], [weight for _, weight in steps], len({id(batch) for batch, _ in steps})


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_without_a_batch_get_the_structure_of_those_with_one(kind):
    for rank, (batches, weights, objects) in enumerate(worlds.run(3, _containers, kind)):
        for step, batch in enumerate(batches):
            assert_alike(batch, batch_of(kind, [(2, 3, 1), (4, 0, 0), (0, 0, 0)][rank][step]), f"rank {rank} step {step}")
        assert weights == [3 / 6, 3 / 3, 3 / 1]
        assert objects == 3, "every step has a batch of its own: the user may write to it"


def test_samples_are_counted_along_the_first_tensor_with_a_dimension():
    assert count_samples({"scale": torch.tensor(3), "x": torch.ones(4, 2), "y": torch.ones(5)}) == 4
    for batch in ([], "text", {"scale": torch.tensor(3)}):
        with pytest.raises(ValueError, match="without a tensor that has a dimension"):
            count_samples(batch)


HIDING = {
    "attribute": Bag,
    "slot": Slots,
    "deeper": Deeper,
    "attributes of a dict": Attributes,
    "list": type("List", (list,), {"__init__": lambda self, x: self.append([x])}),
    "deque": lambda x: deque([x]),
    "frozenset": lambda x: frozenset([x]),
    "mappingproxy": lambda x: MappingProxyType({"x": x}),
    "partial": lambda x: functools.partial(len, x),
}


@pytest.mark.parametrize("kind", HIDING)
def test_a_batch_that_hides_a_tensor_is_refused(kind):
    x = torch.ones(3, 2)
    hides = HIDING[kind](x)
    for batch in ((x, hides), {"x": x, "y": [None, hides]}):
        with pytest.raises(TypeError, match=f"given a batch with a {type(hides).__name__} that holds tensors; expected"):
            emptied(batch)


def test_what_holds_no_tensor_passes_as_it_is():
    module = torch.nn.functional
    cycle = Bag(None)
    cycle.x = cycle
    for leaf in (3, None, "text", torch.float32, lambda: REFERRED, Bag, module, cycle, deque("ab"), Random(0), Slots([1])):
        assert emptied({"x": torch.ones(2), "leaf": leaf})["leaf"] is leaf


def _mapping(world, functions):
    batches = [Wrapped(x=torch.ones(3, 2))] * (1 - world.rank)
    steps = list(even_steps(batches, world.group, **functions)) if functions else caught(even_steps(batches, world.group))
    return steps, [batch["x"].shape for batch in batches]


def test_a_mapping_of_another_kind_is_not_written_to():
    first, second = worlds.run(2, _mapping, {})
    assert first == ((0, "TypeError", REFUSED.format("Wrapped")), [(3, 2)])
    assert second[0][1] == "CollectiveError"
    with pytest.raises(TypeError, match="Wrapped that holds tensors"):
        emptied(Wrapped(x=torch.ones(3, 2)))


def _no_samples(batch):
    return Wrapped(x=batch["x"][:0])


def test_a_mapping_of_another_kind_is_counted_and_has_an_empty_form_where_that_is_given():
    batches = [Wrapped(n=1, x=torch.ones(4)), MappingProxyType({"x": torch.ones(2)})]
    assert [weight for _, weight in even_steps(batches)] == [0.25, 0.5]
    (given, _), (empty, _) = worlds.run(2, _mapping, {"empty": _no_samples})
    assert [(batch["x"].shape, weight) for batch, weight in given] == [((3, 2), 2 / 3)]
    assert [(batch["x"].shape, weight) for batch, weight in empty] == [((0, 2), 2 / 3)]


COUNTS = {"float": lambda batch: len(batch) / 2, "none": lambda batch: None, "integer": lambda batch: torch.tensor(len(batch))}


def _counts(world, kind):
    return caught(even_steps([torch.ones(2 + world.rank)] * (1 + world.rank), world.group, count=COUNTS[kind]))


@pytest.mark.parametrize(("kind", "given"), [("float", "1.0 of type float"), ("none", "None of type NoneType")])
def test_a_count_that_is_no_integer_is_an_error_on_every_rank(kind, given):
    message = f"given {given} as the number of samples in a batch; expected an integer from the argument count"
    assert caught(even_steps([torch.ones(2)], count=COUNTS[kind])) == (0, "TypeError", message)
    first, second = worlds.run(2, _counts, kind)
    assert first == (0, "TypeError", message)
    assert second[:2] == (0, "TypeError")


def test_a_count_below_none_is_an_error():
    message = "given -1 as the number of samples in a batch; expected 0 or more from the argument count"
    assert caught(even_steps([torch.ones(2)], count=lambda batch: -1)) == (0, "ValueError", message)


def test_a_count_may_be_an_integer_of_another_kind():
    assert worlds.run(2, _counts, "integer") == [(2, None, None)] * 2


def _own_functions(world):
    batches = [[torch.ones(3, size, size) for size in sizes] for sizes in ([(4, 6), (5,)], [])[world.rank]]
    return list(even_steps(batches, world.group, count=len, empty=lambda batch: []))


def test_batches_that_are_no_tree_by_functions_given():
    first, second = worlds.run(2, _own_functions)
    assert [(len(images), weight) for images, weight in first] == [(2, 1.0), (1, 2.0)]
    assert second == [([], 1.0), ([], 2.0)]


def _not_picklable(x):
    return (x, lambda: None)


def _bad_batches(world, case):
    x = torch.ones(2, 3)
    mine, theirs = {
        "dtype": ([x], [x.double()]),
        "keys": ([{"x": x, "y": x}], [{"x": x, "z": x}]),
        "missing": ([[x, x]], [[x]]),
        "dimensions": ([x], [x[0]]),
        "hidden": ([(x, Bag(x))], []),
        "uncounted": ([torch.tensor(1.0)], [x]),
        "pickle": ([_not_picklable(x)], []),
    }[case]
    return caught(even_steps(mine if world.rank == 0 else theirs, world.group))


@pytest.mark.parametrize(
    ("case", "on_0", "on_1", "text"),
    [
        ("dtype", "ValueError", "ValueError", "batch: torch.float32, 2 dimensions on rank 0 and batch: torch.float64, 2 dim"),
        ("keys", "ValueError", "ValueError", "batch['y']: torch.float32, 2 dimensions on rank 0 and batch['z']: torch.float32"),
        ("missing", "ValueError", "ValueError", "batch[1]: torch.float32, 2 dimensions on rank 0 and None on rank 1"),
        ("dimensions", "ValueError", "ValueError", "2 dimensions on rank 0 and batch: torch.float32, 1 dimensions on rank 1"),
        ("hidden", "TypeError", "CollectiveError", "given a batch with a Bag that holds tensors"),
        ("uncounted", "ValueError", "CollectiveError", "given a batch of type Tensor without a tensor that has a dimension"),
        ("pickle", "TypeError", "TypeError", "cannot be pickled for a rank that has none"),
    ],
)
def test_first_batches_that_cannot_be_used_are_an_error_on_every_rank(case, on_0, on_1, text):
    for (steps, kind, message), expected in zip(worlds.run(2, _bad_batches, case), (on_0, on_1), strict=True):
        assert (steps, kind) == (0, expected)
        assert text in message


def _unpicklable_everywhere(world):
    return caught(even_steps([_not_picklable(torch.ones(1))] * (world.rank + 1), world.group))


def test_what_cannot_be_pickled_stays_on_its_rank():
    assert worlds.run(2, _unpicklable_everywhere) == [(2, None, None)] * 2


# What the docstring says of empty batches


def _pack(x):
    return nn.utils.rnn.pack_padded_sequence(x, torch.zeros(0, dtype=torch.int64), batch_first=True).data


def _ctc(x):
    lengths = torch.zeros(0, dtype=torch.int64)
    return F.ctc_loss(x.transpose(0, 1).log_softmax(-1), torch.zeros(0, 2, dtype=torch.int64), lengths, lengths)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(len(x), -1),
        lambda x: x.reshape(len(x), -1),
        lambda x: F.pixel_shuffle(x.view(0, 4, 2, 4), 2),
        _pack,
        lambda x: x.max(),
        lambda x: x.amax(0),
        _ctc,
    ],
    ids=["view", "reshape", "pixel_shuffle", "pack", "max", "amax", "ctc"],
)
def test_what_fails_on_an_empty_batch(function):
    x = torch.zeros(0, 4, 8, requires_grad=True)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        function(x).sum().backward()


def test_what_takes_an_empty_batch():
    x = torch.zeros(0, 4, 8, requires_grad=True)
    loss = F.cross_entropy(x.flatten(1), torch.zeros(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss.item() == 0.0
    assert F.cross_entropy(x.flatten(1), torch.zeros(0, dtype=torch.int64)).mul(0).isnan()
