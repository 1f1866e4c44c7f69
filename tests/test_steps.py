"""Ranks whose loaders end at different times take the same steps, and together what one process does with all samples."""

import datetime
import os
import time
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from tolerance import FAR, assert_same_state
from torch.nn.parallel import DistributedDataParallel
from uneven import LOADERS, network, one_process, share, steps_of

import syncbn
from syncbn.control import Place, side_group
from syncbn.steps import even_steps


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
        assert_same_state(state, model.state_dict(), FAR, f"of rank {rank}")


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
