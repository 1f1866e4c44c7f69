"""Ranks whose loaders end at different times take the same steps, and together what one process does with all samples."""

import dataclasses
import datetime
import functools
import os
import time
import tracemalloc
from collections import UserDict, deque, namedtuple
from collections.abc import MutableMapping
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from test_ddp import network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.collectives import timeout
from syncbn.control import Place, side_group
from syncbn.steps import even_steps
from syncbn.trees import count_samples, emptied

# Samples of each batch, by rank: loaders that differ by several batches, that are empty, that have empty batches.
LOADERS: dict[str, list[list[int]]] = {
    "uneven": [[2, 1], [3, 2, 4, 2, 2, 3], [1, 4, 2, 2], [5, 3, 3]],
    "none": [[], [3, 2, 2, 4], [4, 1], []],
    "empty": [[2, 0, 3, 0, 0, 0], [0, 4], [0, 0, 1], [0]],
}
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


def steps_of(loaders):
    return max(map(len, loaders))


def share(rank, step, size):
    """The batch of a rank in a step: the same on every rank that asks for it."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(size, 2, 9, 9, generator=generator, dtype=torch.float64) + 0.3 * rank
    return x, torch.randint(3, (size,), generator=generator)


def whole(loaders, step):
    """What one process gets in a step: the samples of all ranks that have any."""
    shares = [share(rank, step, sizes[step]) for rank, sizes in enumerate(loaders) if step < len(sizes)]
    return tuple(torch.cat(parts) for parts in zip(*shares, strict=True))


def one_process(loaders, accumulate=1, model=None):
    """The model and the mean losses of one process; a step without samples moves the optimizer by its momentum alone."""
    model = model or network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps_of(loaders)):
        x, target = whole(loaders, step)
        loss = torch.zeros(()).double()
        if len(x):
            loss = F.cross_entropy(model(x), target, reduction="sum") / len(x)
            loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
    return model, losses


def assert_same_state(model, state, where, tolerance=1e-11):
    """float64 leaves rounding alone: 1e-16, grown over a few steps."""
    for name, value in model.state_dict().items():
        off = (state[name].double() - value.double()).abs().max().item()
        assert off <= tolerance * max(1.0, value.double().abs().max().item()), f"{name} of {where} off by {off:.2g}"


def _train(world, name, accumulate, buffers):
    loaders = LOADERS[name][: world.size]
    model = syncbn.convert(network(torch.float64), world.group)
    ddp = DistributedDataParallel(model, process_group=world.group)
    ddp.broadcast_buffers = buffers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = (share(world.rank, step, size) for step, size in enumerate(loaders[world.rank]))
    losses = []
    for step, ((x, target), weight) in enumerate(even_steps(batches, world.group)):
        last = (step + 1) % accumulate == 0
        ddp.require_backward_grad_sync = last
        loss = F.cross_entropy(ddp(x), target, reduction="sum") * weight
        loss.backward()
        losses.append(loss.item() / world.size)
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return losses, model.state_dict()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", LOADERS)
def test_training_equals_one_process(world, name):
    check_training(world, name)


def test_accumulated_gradients_without_broadcast_buffers():
    check_training(3, "uneven", accumulate=2, buffers=False)


def check_training(world, name, accumulate=1, buffers=True):
    model, losses = one_process(LOADERS[name][:world], accumulate)
    results = worlds.run(world, _train, name, accumulate, buffers)
    assert torch.tensor([r[0] for r in results], dtype=torch.float64).sum(0).tolist() == pytest.approx(losses, rel=1e-11)
    for rank, (_, state) in enumerate(results):
        assert_same_state(model, state, f"rank {rank}")


def _sizes_and_weights(world, loaders):
    steps = even_steps([torch.ones(n, 2) for n in loaders[world.rank]], world.group)
    return [(len(batch), weight) for batch, weight in steps]


@pytest.mark.parametrize("name", LOADERS)
def test_steps_samples_and_weights(name):
    loaders = LOADERS[name]
    results = worlds.run(4, _sizes_and_weights, loaders)
    for step in range(steps_of(loaders)):
        sizes = [(sizes + [0] * 10)[step] for sizes in loaders]
        assert [result[step][0] for result in results] == sizes
        assert {result[step][1] for result in results} == {4 / sum(sizes) if sum(sizes) else 0.0}
    assert [len(result) for result in results] == [steps_of(loaders)] * 4


def test_no_batch_on_any_rank():
    assert worlds.run(2, _sizes_and_weights, [[], []]) == [[], []]


def test_alone():
    batches = [torch.ones(n, 2) for n in (4, 0, 2)]
    assert [(len(b), w) for b, w in even_steps(batches)] == [(4, 0.25), (0, 0.0), (2, 0.5)]
    assert all(ours is given for (ours, _), given in zip(even_steps(batches), batches, strict=True))
    assert list(even_steps([])) == []
    assert [w for _, w in even_steps(["ab", "c"], count=len)] == [0.5, 1.0]


# Containers


def batch_of(kind, n):
    x, target, scale = torch.ones(n, 3, 5), torch.arange(n), torch.tensor(7.0)
    ids, names = tuple(range(n)), [f"s{i}" for i in range(n)]
    return {
        "tensor": x,
        "list": [x.half(), target, names],
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


def test_a_count_may_be_an_integer_of_another_kind():
    assert worlds.run(2, _counts, "integer") == [(2, None, None)] * 2


def _own_functions(world):
    batches = [[torch.ones(3, size, size) for size in sizes] for sizes in ([(4, 6), (5,)], [])[world.rank]]
    return list(even_steps(batches, world.group, count=len, empty=lambda batch: []))


def test_batches_that_are_no_tree_by_functions_given():
    first, second = worlds.run(2, _own_functions)
    assert [(len(images), weight) for images, weight in first] == [(2, 1.0), (1, 2.0)]
    assert second == [([], 1.0), ([], 2.0)]


def _lengths(world):
    """Padding differs between ranks and batches; a rank's empty batches are as its first."""
    batches = [torch.ones(2, length) for length in ([7, 9], [5])[world.rank]]
    return [tuple(batch.shape) for batch, _ in even_steps(batches, world.group)]


def test_trailing_shapes_may_differ():
    assert worlds.run(2, _lengths) == [[(2, 7), (2, 9)], [(2, 5), (0, 5)]]


# One step ahead


def _reads(world):
    """Batches read, and rows posted, when each step is handed out; and what the group itself carried."""
    read, seen = [], []

    def batches():
        for step in range([4, 2][world.rank]):
            read.append(step)
            yield torch.ones(1, 3)

    side, sent = side_group(world.group), []
    gather = side.gather_rows
    side.gather_rows = lambda place, *row: (sent.append(place.where), gather(place, *row))[1]
    try:
        with CollectivesSeen() as mode:
            for _ in even_steps(batches(), world.group):
                seen.append((len(read), sum("even_steps" in where for where in sent)))
    finally:
        del side.gather_rows
    return seen, mode.seen


def test_the_loader_is_read_and_counts_travel_one_step_ahead():
    first, second = worlds.run(2, _reads)
    assert first[0] == [(2, 2), (3, 3), (4, 4), (4, 5)]
    assert second[0] == [(2, 2), (2, 3), (2, 4), (2, 5)]
    assert first[1] == second[1] == [], "the group itself carries nothing"


def test_a_loader_that_refills_its_buffer_has_to_yield_clones():
    buffer = torch.zeros(1)
    refilled = [batch.item() for batch, _ in even_steps(buffer.fill_(value) for value in range(4))]
    assert refilled == [1, 2, 3, 3]
    assert [batch.item() for batch, _ in even_steps(buffer.fill_(value).clone() for value in range(4))] == [0, 1, 2, 3]


def _slow_loader(world, flag):
    flag = os.path.join(world.directory, flag)

    def batches():
        yield torch.ones(1, 3)
        end = time.monotonic() + 10
        while world.rank == 1 and not os.path.exists(flag):
            assert time.monotonic() < end, "rank 0 did not get its first batch while rank 1 reads its second"
            time.sleep(0.01)
        yield torch.ones(1, 3)

    for _ in even_steps(batches(), world.group):
        open(flag, "a").close()
    return True


def test_a_step_does_not_wait_for_the_counts_of_the_next():
    assert worlds.run(2, _slow_loader, "first-batch") == [True, True]


def _side(world):
    side = side_group(world.group)
    gathered = (
        side.gather_rows(Place("test", "in a test"), [world.rank, 7])(),
        side.gather_objects("x" * (100 * world.rank) or None),
    )
    return side_group(world.group) is side, type(side._gloo).__name__, side._gloo.options._timeout, gathered


@pytest.mark.parametrize("world", [2, 4])
def test_control_messages_have_one_gloo_backend_beside_each_group(world):
    """Also in groups whose ranks are in different numbers of groups."""
    rows = [[rank, 7, 0] for rank in range(world)], ["x" * (100 * rank) or None for rank in range(world)]
    expected = (True, "ProcessGroupGloo", datetime.timedelta(seconds=worlds.GROUP_TIMEOUT), rows)
    assert worlds.run(world, _side) == [expected] * world


# Errors and early ends


def caught(loop):
    """The steps that `loop`, a generator, took, and the error that ended it."""
    steps = 0
    try:
        for _ in loop:
            steps += 1
    except Exception as error:
        return steps, type(error).__name__, str(error)
    return steps, None, None


def _failing_loader(world, fail):
    def batches():
        for step in range(5):
            if world.rank == 1 and step == fail:
                raise KeyError("bad sample")
            yield torch.ones(1, 3)

    results = [caught(even_steps(batches(), world.group))]
    return [*results, caught(even_steps([torch.ones(2)], world.group))]


@pytest.mark.parametrize("fail", [0, 2])
def test_an_error_of_a_loader_ends_the_loop_of_every_rank_in_its_step(fail):
    results = worlds.run(3, _failing_loader, fail)
    assert results[1][0] == (fail, "KeyError", "'bad sample'")
    for rank in (0, 2):
        steps, kind, text = results[rank][0]
        assert (steps, kind) == (fail, "CollectiveError")
        assert f"the loader of rank 1 of 3 raised for step {fail} of even_steps: KeyError: 'bad sample'" in text
    assert all(result[1] == (1, None, None) for result in results), "the next loop is not disturbed"


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


class Counted:
    """A backend that notes the bytes that it moves from a rank or to one."""

    def __init__(self, backend):
        self.backend, self.moved = backend, 0

    def allgather(self, outputs, inputs):
        self.moved += sum(output.nbytes for output in outputs[0])
        return self.backend.allgather(outputs, inputs)

    def broadcast(self, tensors, *options):
        self.moved += sum(tensor.nbytes for tensor in tensors)
        return self.backend.broadcast(tensors, *options)


LARGE = 2_000_000  # bytes in a batch that are no tensor


def _payload(world):
    """Bytes moved, the most that Python held at a time, what came, where first batches hold much: of all, of all but rank 0.

    In processes of its own: tracemalloc.stop() is a race with threads that release memory, which Gloo's do, and crashed Python
    before 3.12.9 and 3.13.2 (python/cpython#128679).
    """
    tracemalloc.start()
    seen = []
    for lacking in [], [0]:
        batches = [{"x": torch.ones(1, 2), "raw": bytes([world.rank]) * LARGE}] * (world.rank not in lacking)
        side = side_group(world.group)
        side._gloo = counted = Counted(side._gloo)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        ((batch, _),) = even_steps(batches, world.group)
        seen.append((counted.moved, tracemalloc.get_traced_memory()[1] - held, batch["raw"][0]))
        side._gloo = counted.backend
        del batches, batch
    return seen


@pytest.fixture(scope="module")
def payloads():
    """What `_payload` gives for batches of all ranks, and of all but rank 0: each by rank."""
    return list(zip(*worlds.run_fresh(3, _payload), strict=True))


def test_a_template_travels_only_where_a_rank_has_no_batch(payloads):
    for moved, peak, _ in payloads[0]:
        assert moved < LARGE / 100
        assert peak < LARGE / 10


def test_a_template_travels_once_and_takes_memory_of_its_size(payloads):
    assert [raw for _, _, raw in payloads[1]] == [1, 1, 2]
    for moved, peak, _ in payloads[1]:
        assert LARGE < moved < LARGE * 1.01
        assert LARGE < peak < LARGE * 4, "what is sent, its pickle and what is made of it"


def _objects(world):
    values = "x" * (100 * world.rank) or None
    return side_group(world.group).gather_objects(values), side_group(world.group).gather_objects(torch.ones(world.rank))


def test_objects_of_any_size_are_gathered():
    for texts, tensors in worlds.run(4, _objects):
        assert texts == [None, "x" * 100, "x" * 200, "x" * 300]
        assert [len(tensor) for tensor in tensors] == [0, 1, 2, 3]


def _left_early(world, leave):
    closed, taken = [], []

    def batches():
        try:
            for _ in range(4):
                yield torch.ones(1)
        finally:
            closed.append(True)

    steps = even_steps(batches(), world.group)
    for step, _ in enumerate(steps):
        taken.append(step)
        if step == leave[world.rank]:
            break
    steps.close()
    return len(taken), len(closed), caught(even_steps([torch.ones(1)] * 3, world.group))


def test_left_early_in_the_same_step_the_next_loop_is_whole():
    assert worlds.run(2, _left_early, [1, 1]) == [(2, 1, (3, None, None))] * 2


def test_left_early_in_the_last_step_on_some_ranks_only():
    assert worlds.run(2, _left_early, [3, 9]) == [(4, 1, (3, None, None))] * 2


def _left_alone(world):
    """Rank 0 leaves its first loop early and begins another; the other is still in the first."""
    begun = even_steps([torch.ones(1)] * 5, world.group)
    if world.rank == 0:
        next(begun)
        begun.close()
        return caught(even_steps([torch.ones(1)] * 5, world.group))
    return caught(begun)


def test_left_early_by_one_rank_is_an_error_when_it_begins_another_loop():
    first, second = worlds.run_fresh(2, _left_alone)
    assert (first[:2], second[:2]) == ((0, "CollectiveError"), (2, "CollectiveError")) or pytest.fail(f"{first} {second}")
    assert "rank 0 is in step 0 of loop 2 of even_steps, rank 1 in step 2 of loop 1 of even_steps" in first[2]
    assert first[2] == second[2]


def _waiting(world):
    """Rank 0 raises in step 1 of its loop; the others have nothing to wait in but the iterator."""
    start = time.monotonic()
    try:
        for step, _ in enumerate(even_steps([torch.ones(2, 3)] * 5, world.group)):
            if world.rank == 0 and step == 1:
                raise ZeroDivisionError
    except Exception as error:
        time.sleep(6 if world.rank == 0 else 0)
        return step, type(error).__name__, str(error), time.monotonic() - start


def test_an_error_in_the_loop_of_one_rank_lets_the_others_wait_no_longer_than_the_timeout():
    results = worlds.run_fresh(3, _waiting, group_timeout=4.0)
    assert results[0][:2] == (1, "ZeroDivisionError")
    for step, kind, text, seconds in results[1:]:
        assert (step, kind) == (2, "CollectiveError")
        assert text.startswith("no answer from rank 0, where rank ")
        assert "in step 3 of loop 1 of even_steps: gone, frozen, or elsewhere for longer than 0:00:04; expected" in text
        assert seconds < 7.5, "one timeout, and the moment in which the absent are found"


def _unanswered(world):
    """Rank 1 says nothing, then says one thing of the two."""
    side, messages = side_group(world.group), []
    for more in range(2):
        try:
            if world.rank == 0 or more:
                side.gather_objects("word")
        except RuntimeError as error:
            messages.append((type(error).__name__, str(error), type(error.__cause__).__name__))
            break
        if world.rank == 1 and more == 0:
            time.sleep(4)
    return messages


def test_a_control_message_without_answer_is_an_error_with_the_rank():
    for rank, found in enumerate(worlds.run_fresh(2, _unanswered, group_timeout=2.0)):
        ((kind, message, cause),) = found
        assert (kind, cause) == ("CollectiveError", "RuntimeError")
        who, why = [(" from rank 1", "gone, frozen, or"), ("", "every rank came there, but not")][rank]
        assert message.startswith(f"no answer{who}, where rank {rank} is in an exchange of objects: {why}")
        assert "0:00:02; expected" in message


def _nested(world):
    """Loops inside a loop, and two side by side, as validation and adversarial training have them."""
    counts = []
    for _ in even_steps([torch.ones(1)] * (2 + world.rank), world.group):
        counts.append(sum(1 for _ in even_steps([torch.ones(1)] * (3 - world.rank), world.group)))
    pairs = zip(  # as long as the shorter
        even_steps([torch.ones(1)] * 2, world.group), even_steps([torch.ones(1)] * (4 + world.rank), world.group), strict=False
    )
    return counts, sum(1 for _ in pairs), caught(even_steps([torch.ones(1)], world.group))


def test_loops_inside_and_beside_each_other():
    assert worlds.run(2, _nested) == [([3, 3, 3], 2, (1, None, None))] * 2


def test_arguments_are_checked_at_once():
    with pytest.raises(TypeError, match="expected a torch"):
        even_steps([], "world")
    assert caught(even_steps(3))[1:] == ("TypeError", "'int' object is not iterable")


def _outside(world):
    group = dist.new_group([0], timeout=timeout(world.group))
    return caught(even_steps([torch.ones(1)], group if world.rank == 0 else dist.GroupMember.NON_GROUP_MEMBER))


def test_a_rank_outside_of_the_group():
    first, second = worlds.run_fresh(2, _outside)
    assert first == (1, None, None)
    assert second[:2] == (0, "ValueError")


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
