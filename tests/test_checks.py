"""Checked mode: ranks that differ all raise the same at once, and those that do not go on as ever."""

import contextlib
import copy
import io
import itertools
import time
import warnings
from unittest import mock

import oracle
import pytest
import torch
import torch.distributed as dist
import worlds
from collectives_seen import CollectivesSeen
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.collectives import Group, timeout
from syncbn.control import Place, ranks_of, side_group

AT_ONCE = 6.0  # seconds, on a loaded machine; the groups' timeout is 30


class Net(nn.Module):
    """Two layers whose order can be chosen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3))

    def forward(self, x, order=("first", "second")):
        for name in order:
            x = getattr(self, name)(x)
        return x


def step(model, rank, *args):
    x = torch.randn(4 + rank, 3, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    model(x, *args).square().sum().backward()
    return x.grad


def skipped(model, odd, rank):
    step(model, rank, ("second",) if odd else ("first", "second"))


def reordered(model, odd, rank):
    step(model, rank, ("second", "first") if odd else ("first", "second"))


def evaluated(model, odd, rank):
    model.second.train(not odd)
    step(model, rank)


def more_steps(model, odd, rank):
    for _ in range(3 if odd else 2):
        step(model, rank)


def channels(model, odd, rank):
    syncbn.convert(nn.Sequential(nn.BatchNorm1d(5 if odd else 3)))(torch.ones(4, 5 if odd else 3))


def dtype(model, odd, rank):
    model.double()(torch.ones(4, 3, dtype=torch.float64)) if odd else model(torch.ones(4, 3))


def grouped(model, odd, rank):
    """One rank's layer is over a pair of ranks."""
    pair = dist.new_group([0, 1])
    if odd:
        model.first._syncbn = model.first._syncbn._replace(group=Group(pair))
    model(torch.ones(4, 3))


def raised(model, odd, rank):
    step(model, rank)
    if odd:
        raise ZeroDivisionError("of this rank")
    step(model, rank)


def unused(model, odd, rank):
    """The backward of an output that is used on other ranks only."""
    x = torch.ones(4, 3, requires_grad=True)
    a, b = model.first(x), model.second(x)
    (a if odd else a + b).sum().backward()
    step(model, rank)


def twice(model, odd, rank):
    """Another forward where the others are in backward."""
    y = model(torch.ones(4, 3, requires_grad=True))
    if odd:
        model(torch.ones(4, 3))
    y.sum().backward()


def recomputed(model, odd, rank):
    x = torch.ones(4, 3, requires_grad=True)
    (checkpoint(model, x, use_reentrant=False) if odd else model(x)).sum().backward()


def many(model, odd, rank):
    """Backwards of two gradients at once, which reduce the moments once more, where the others have one gradient."""
    x, rows = torch.ones(4, 3, requires_grad=True), torch.ones(2, 4, 3)
    torch.autograd.grad(model(x), x, rows if odd else rows[0], is_grads_batched=odd)


def more(model, odd, rank):
    """Backwards of three gradients at once, where the others have two."""
    x, rows = torch.ones(4, 3, requires_grad=True), torch.ones(3, 4, 3)
    torch.autograd.grad(model(x), x, rows if odd else rows[:2], is_grads_batched=True)


PAIRS = "group of ranks"
# By program: what all ranks but the odd one say, and what that one does, in the message.
PROGRAMS = {
    skipped: "call 1: rank 1 is in second.0 forward, ranks 0, 2 in first forward;",
    reordered: "call 1: rank 1 is in second.0 forward, ranks 0, 2 in first forward;",
    evaluated: "call 2: rank 1 is in first backward, ranks 0, 2 in second.0 forward;",
    more_steps: "call 9: rank 1 is in first forward, ranks 0, 2 out of the context;",
    channels: "call 1: rank 1 is in 0 forward (5 channels, torch.float32, 11 values, group of ranks 0-2), "
    "ranks 0, 2 in 0 forward (3 channels, torch.float32, 7 values, group of ranks 0-2);",
    dtype: "call 1: rank 1 is in first forward (3 channels, torch.float64, 7 values, group of ranks 0-2), "
    "ranks 0, 2 in first forward (3 channels, torch.float32, 7 values, group of ranks 0-2);",
    grouped: "call 1: rank 1 is in first forward (3 channels, torch.float32, 7 values, group of ranks 0, 1), "
    "ranks 0, 2 in first forward (3 channels, torch.float32, 7 values, group of ranks 0-2);",
    raised: "call 5: rank 1 failed: ZeroDivisionError: of this rank, ranks 0, 2 in first forward;",
    unused: "call 3: rank 1 is in first backward, ranks 0, 2 in second.0 backward;",
    twice: "call 3: rank 1 is in first forward, ranks 0, 2 in second.0 backward;",
    recomputed: "call 3: rank 1 is in first recompute, ranks 0, 2 in second.0 backward;",
    many: "call 3: rank 1 is in second.0 backward (3 channels, torch.float32, 7 values, group of ranks 0-2), "
    "ranks 0, 2 in second.0 backward (3 channels, torch.float32, 6 values, group of ranks 0-2);",
    more: "call 4: rank 1 is in second.0 backward (3 channels, torch.float32, 18 values, group of ranks 0-2), "
    "ranks 0, 2 in second.0 backward (3 channels, torch.float32, 12 values, group of ranks 0-2);",
}


def _different(world):
    """Each program on all ranks, of which rank 1 is the odd one."""
    found = {}
    for program in PROGRAMS:
        model = syncbn.convert(Net())
        start = time.monotonic()
        try:
            with syncbn.checked(model):
                program(model, world.rank == 1, world.rank)
        except Exception as error:
            found[program.__name__] = type(error).__name__, str(error), time.monotonic() - start
    found["observers"] = len(syncbn.observing.observers())
    found["after"] = step(model.float().train(), world.rank).isfinite().all().item()
    return found


@pytest.fixture(scope="module")
def different():
    return worlds.run_fresh(3, _different, group_timeout=30.0)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_ranks_that_differ_all_raise_at_once(different, program):
    for rank, found in enumerate(different):
        kind, message, seconds = found[program.__name__]
        if program is raised and rank == 1:
            assert (kind, message) == ("ZeroDivisionError", "of this rank"), "its own error"
        else:
            assert kind == "CollectiveError"
            assert message.startswith(f"ranks differ at {PROGRAMS[program]} expected the same calls in the same order")
        assert seconds < AT_ONCE


def test_the_ranks_can_go_on_after_an_error(different):
    for found in different:
        assert found["observers"] == 0
        assert found["after"]


def _unchecked(world):
    """Rank 0 has two gradients at once, rank 1 one; then both go on. What each of them raised, if it is there yet."""
    model = syncbn.convert(Net())
    try:
        many(model, world.rank == 0, world.rank)
        model(torch.ones(4, 3))
    except syncbn.CollectiveError:
        return "CollectiveError"


def test_without_the_context_numbers_of_gradients_that_differ_end_in_an_error_on_every_rank():
    """By the next collective: Gloo may end a process, or give a rank a sum before it finds that it has no peer."""
    try:
        ended = worlds.run_fresh(2, _unchecked, timeout=30, group_timeout=5.0)
    except worlds.CaseError as error:
        ended = str(error)
    assert ended == ["CollectiveError"] * 2 or "the process ended (exit code -6)" in ended


class Counted:
    """A backend that notes the number of values that it gathers from a rank."""

    def __init__(self, backend):
        self.backend, self.sizes = backend, []

    def allgather(self, outputs, inputs):
        self.sizes.append(inputs[0].numel())
        return self.backend.allgather(outputs, inputs)


def _same(world, group_size):
    """Gradients, statistics and collectives, checked and not."""
    results, gathered = [], []
    for context in (syncbn.checked, None):
        torch.manual_seed(0)
        model = syncbn.convert(Net(), world.group if group_size is None else None, group_size=group_size)
        if world.size > 1:
            side = side_group(dist.group.WORLD if group_size else world.group)
            side._gloo = Counted(getattr(side._gloo, "backend", side._gloo))
        with CollectivesSeen() as seen:
            if context is None:
                grads = [step(model, world.rank) for _ in range(2)]
            else:
                with context(model):
                    grads = [step(model, world.rank) for _ in range(2)]
        results.append((grads, model.state_dict(), seen.seen))
        gathered.append(side._gloo.sizes if world.size > 1 else [])
    if world.size > 1:
        side._gloo = side._gloo.backend
    return *results, gathered


@pytest.mark.parametrize(("world", "group_size"), [(1, None), (2, None), (4, None), (4, 2)])
def test_ranks_that_agree_get_the_same_bits_and_collectives(world, group_size):
    for (grads, state, seen), (plain, plain_state, plain_seen), (control, off) in worlds.run(world, _same, group_size):
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        assert all(torch.equal(state[name], plain_state[name]) for name in plain_state)
        assert seen == plain_seen
        assert control == ([4] * 9 if world > 1 else []), "one size: four calls in each of two steps, and the end"
        assert off == []


# By what happens to rank 1 before the second forward of a wrapper that broadcasts buffers in it, and where it then is.
IN_WRAPPERS = {
    "raised": "rank 1 failed: ZeroDivisionError: of this rank, ranks 0, 2 at a forward of 0;",
    "left": "rank 1 is out of the context, ranks 0, 2 at a forward of 0;",
    "evaluated": "rank 1 is at a forward of 0 in eval mode, ranks 0, 2 at a forward of 0;",
}


def _in_wrappers(world):
    found = {}
    for end in IN_WRAPPERS:
        model, start = DistributedDataParallel(syncbn.convert(Net())), time.monotonic()
        try:
            with syncbn.checked(nn.ModuleList([model])):
                step(model, world.rank)
                if world.rank == 1 and end == "raised":
                    raise ZeroDivisionError("of this rank")
                if world.rank == 1 and end == "left":
                    continue
                step(model.train(world.rank != 1 or end != "evaluated"), world.rank)
        except Exception as error:
            found[end] = type(error).__name__, str(error), time.monotonic() - start
        finally:
            found["hooks"] = len(model._forward_pre_hooks)
    return found


@pytest.fixture(scope="module")
def in_wrappers():
    return worlds.run_fresh(3, _in_wrappers, group_timeout=30.0)


@pytest.mark.parametrize("end", IN_WRAPPERS)
def test_ranks_that_differ_do_not_stand_in_the_broadcast_of_buffers(in_wrappers, end):
    for rank, found in enumerate(in_wrappers):
        kind, message, seconds = found[end]
        if end == "raised" and rank == 1:
            assert (kind, message) == ("ZeroDivisionError", "of this rank")
        else:
            assert kind == "CollectiveError"
            assert message.startswith(f"ranks differ at call 5: {IN_WRAPPERS[end]}")
        assert seconds < AT_ONCE
        assert found["hooks"] == 0


def _wrapped_otherwise(world):
    """Wrappers of which a rank may use one alone: without a broadcast, or over other ranks than those compared."""
    first, *_ = pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    apart = DistributedDataParallel(nn.BatchNorm1d(3), process_group=pairs[world.rank // 2])
    silent = DistributedDataParallel(nn.BatchNorm1d(3))
    silent.broadcast_buffers = False
    wrapped = DistributedDataParallel(syncbn.convert(Net()))
    with syncbn.checked(nn.ModuleList([apart, silent, wrapped])):
        if world.rank // 2:
            apart(torch.ones(4, 3))
        if world.rank == 3:
            silent(torch.ones(4, 3))
        step(wrapped, world.rank)
        wrapped.eval()(torch.ones(1, 3))
        with wrapped.no_sync():
            step(wrapped.train(), world.rank)
        step(wrapped, world.rank)
    return ranks_of(first)


def test_forwards_that_broadcast_nothing_to_the_ranks_compared_are_nobodys():
    assert worlds.run_fresh(4, _wrapped_otherwise) == [[0, 1]] * 4


def _in_two_wrappers(world):
    first, second = (DistributedDataParallel(syncbn.convert(nn.BatchNorm1d(c))) for c in (3, 50))
    try:
        with syncbn.checked(nn.ModuleList([first, second])):
            first(torch.ones(2, 3)) if world.rank else second(torch.ones(2, 50))
    except syncbn.CollectiveError as error:
        return str(error)


def test_ranks_in_different_wrappers_do_not_broadcast_into_each_other():
    for message in worlds.run_fresh(2, _in_two_wrappers):
        assert message.startswith("ranks differ at call 1: rank 0 is at a forward of 1, rank 1 at a forward of 0;")


def _without_collectives(world):
    """Rank 0 runs what communicates with nobody between two steps of all."""
    model = syncbn.convert(Net())
    without_statistics = syncbn.SyncBatchNorm1d(3, track_running_stats=False).eval()
    sized = syncbn.convert(nn.BatchNorm1d(3), group_size=1)
    x, found = torch.randn(5, 3, generator=torch.Generator().manual_seed(world.rank)), []
    with syncbn.checked(model):
        step(model, world.rank)
        if world.rank == 0:
            mask = torch.arange(5) < 4
            found = [without_statistics(x, mask)[:4], sized(x)]
        step(model, world.rank)
    return x, [y.detach() for y in found]


def test_a_rank_may_run_layers_alone_that_communicate_with_nobody():
    (x, found), (_, nothing) = worlds.run_fresh(2, _without_collectives)
    assert not nothing
    expected = [oracle.batch_norm([share], [torch.zeros_like(share)]).y[0] for share in (x[:4], x)]
    for y, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def _in_unequal_groups(world):
    """The first layer over all ranks, the second over ranks 0 and 1, and rank 2 by itself: all of them come to each call."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2])]
    model = syncbn.convert(Net(), lambda path, layer: None if path == "first" else groups[world.rank // 2])
    with syncbn.checked(model):
        for _ in range(2):
            step(model, world.rank)
    try:
        with syncbn.checked(model):
            step(model, world.rank, ("second",) if world.rank == 2 else ("first", "second"))
    except syncbn.CollectiveError as error:
        return model.first.running_mean.tolist(), model.second[0].running_mean.tolist(), str(error)


def test_ranks_in_groups_of_different_sizes_are_compared():
    (everyones, pairs, error), (*_, same), (*_, third) = results = worlds.run_fresh(3, _in_unequal_groups)
    assert [first for first, *_ in results] == [everyones] * 3
    assert [second == pairs for _, second, _ in results] == [True, True, False]
    assert same == third == error
    assert error.startswith("ranks differ at call 1: rank 2 is in second.0 forward, ranks 0, 1 in first forward;")


def _evaluated_alone(world):
    """Through the wrapper, whose broadcast then is that of the others' next forward."""
    wrapped = DistributedDataParallel(syncbn.convert(Net()))
    with syncbn.checked(wrapped):
        for _ in range(3):  # in the second one the wrapper communicates once more
            step(wrapped, world.rank)
        if world.rank == 0:
            with torch.no_grad():
                for _ in range(3):
                    wrapped.eval()(torch.ones(2, 3))
        step(wrapped.train(), world.rank)
        copied, pickled = copy.deepcopy(wrapped), io.BytesIO()
        torch.save(wrapped, pickled)
        kept = next(iter(copied._forward_pre_hooks.values()))
    return wrapped.module.first.running_mean.tolist(), kept.checks


def test_a_rank_may_evaluate_alone_and_a_wrapper_be_copied():
    (mean, kept), (other, _) = worlds.run_fresh(2, _evaluated_alone)
    assert mean == other != [0.0] * 3
    assert kept is None


def _apart_at_the_timeout(world):
    """Ranks that wait for the same message in vain, in different places."""
    side = side_group(world.group)
    side._gloo = mock.Mock(**{"allgather.return_value.wait.side_effect": RuntimeError("connection closed")})
    place = Place(f"place {world.rank}", f"in place {world.rank}", at="call 3")
    try:
        side.gather_rows(place)()
    except syncbn.CollectiveError as error:
        return str(error)


def test_ranks_that_wait_in_vain_in_different_places_say_so():
    messages = worlds.run_fresh(2, _apart_at_the_timeout)
    expected = "ranks differ at call 3: rank 0 is in place 0, rank 1 in place 1; expected the same calls in the same order"
    for message in messages:
        assert message.startswith(expected)


def _ended(world):
    """Rank 1 fails after the last call of the others, who are leaving."""
    try:
        with syncbn.checked(model := syncbn.convert(Net(), world.group)):
            step(model, world.rank)
            if world.rank == 1:
                raise KeyError("late")
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_failure_at_the_end_reaches_ranks_that_are_leaving():
    results = worlds.run(3, _ended)
    assert results[1] == ("KeyError", "'late'")
    for kind, message in (results[0], results[2]):
        assert kind == "CollectiveError"
        assert message.startswith("ranks differ at call 5: rank 1 failed: KeyError: 'late', ranks 0, 2 out of the context;")


def _loop(model, world, odd, end):
    """Five even steps, in the second of which something happens to the odd rank."""
    for number, (x, weight) in enumerate(syncbn.even_steps([torch.ones(2, 3)] * 5, world.group)):
        (model(x).sum() * weight).backward()
        if odd and number == 1:
            if end == "raised":
                raise ZeroDivisionError("of this rank")
            if end == "left":
                break
            if end == "one more":
                model(x)
            if end == "other loop":
                return _loop(model, world, False, end)


# By what happens to rank 1: where it is in the message.
IN_LOOPS = {
    "raised": "rank 1 failed: ZeroDivisionError: of this rank",
    "left": "rank 1 is out of the context",
    "one more": "rank 1 is in first forward",
    "other loop": "rank 1 is in step 0 of loop 2 of even_steps",
}


def _in_loops(world):
    found = {}
    own = dist.new_group(timeout=timeout(dist.group.WORLD))
    for end, group in itertools.product(IN_LOOPS, (world.group, own)):
        model = syncbn.convert(Net(), group)
        start = time.monotonic()
        try:
            with syncbn.checked(model):
                _loop(model, world, world.rank == 1, end)
        except Exception as error:
            found[end, group is own] = type(error).__name__, str(error), time.monotonic() - start
    with syncbn.checked(model):
        found["after"] = [weight for _, weight in syncbn.even_steps([torch.ones(1, 3)] * world.rank, world.group)]
    return found


@pytest.fixture(scope="module")
def in_loops():
    return worlds.run_fresh(3, _in_loops, group_timeout=30.0)


@pytest.mark.parametrize("is_own", [False, True], ids=["", "layers with a group of their own"])
@pytest.mark.parametrize("end", IN_LOOPS)
def test_ranks_that_differ_in_a_loop_of_even_steps_all_raise_at_once(in_loops, end, is_own):
    others = "ranks 0, 2 in step 3 of loop 1 of even_steps; expected the same calls"
    for rank, found in enumerate(in_loops):
        kind, message, seconds = found[end, is_own]
        if end == "raised" and rank == 1:
            assert (kind, message) == ("ZeroDivisionError", "of this rank"), "its own error"
        else:
            assert kind == "CollectiveError"
            assert message.startswith(f"ranks differ: {IN_LOOPS[end]}, {others}")
        assert seconds < AT_ONCE
        assert found["after"] == [3 / 2, 3 / 1], "the ranks can go on"


def _loop_over_more(world):
    """Ranks 0 and 1 are compared, and step together with rank 2; rank 1 leaves the loop early."""
    model = syncbn.convert(Net(), dist.new_group([0, 1]))
    start = time.monotonic()
    try:
        with syncbn.checked(model) if world.rank < 2 else contextlib.nullcontext():
            for number, (x, _) in enumerate(syncbn.even_steps([torch.ones(2, 3)] * 3)):
                if world.rank < 2:
                    model(x)
                if world.rank == 1 and number == 1:
                    break
    except syncbn.CollectiveError as error:
        return str(error), time.monotonic() - start


def _loop_over_fewer(world):
    """All ranks are compared, and ranks 0 and 1 step together, without a layer; rank 1 leaves the loop early."""
    pair = dist.new_group([0, 1], timeout=timeout(dist.group.WORLD))
    model = syncbn.convert(Net())
    start = time.monotonic()
    try:
        with syncbn.checked(model):
            if world.rank < 2:
                for number, _ in enumerate(syncbn.even_steps([torch.ones(2, 3)] * 3, pair)):
                    if world.rank == 1 and number == 1:
                        break
    except syncbn.CollectiveError as error:
        return str(error), time.monotonic() - start


OTHER_TIMEOUT = 4.0


def test_ranks_that_step_with_compared_ones_hear_of_their_end_at_the_timeout():
    """A loop over other ranks than those compared has a channel of its own."""
    *compared, (waited, seconds) = worlds.run_fresh(3, _loop_over_more, group_timeout=OTHER_TIMEOUT)
    for message, at_once in compared:
        assert message.startswith("ranks differ at call 5: rank 0 is in first forward, rank 1 out of the context;")
        assert at_once < OTHER_TIMEOUT
    assert waited.startswith("no answer from ranks 0, 1, where rank 2 is in step 3 of loop 1 of even_steps: gone, frozen, or")
    assert OTHER_TIMEOUT - 1 < seconds < OTHER_TIMEOUT + AT_ONCE


def test_a_rank_that_waits_in_a_loop_over_fewer_than_are_compared_hears_of_their_end_at_the_timeout():
    (waited, _), *others = results = worlds.run_fresh(3, _loop_over_fewer, group_timeout=OTHER_TIMEOUT)
    assert waited.startswith("no answer from rank 1, where rank 0 is in step 3 of loop 1 of even_steps: gone, frozen, or")
    assert all(" at call 1" in message and "out of the context" in message for message, _ in others)
    assert all(OTHER_TIMEOUT - 1 < seconds < 2 * OTHER_TIMEOUT + AT_ONCE for _, seconds in results)


def _not_finite(world, value, where):
    """Rank 1's share, or its output gradient, holds a value that is not finite."""
    model = syncbn.convert(Net(), world.group)
    x = torch.randn(4, 3).requires_grad_()
    factor = torch.ones(4, 3)
    if world.rank == 1:
        (x.data if where == "forward" else factor)[2, 1] = value
    with warnings.catch_warnings(record=True) as caught, syncbn.checked(model):
        warnings.simplefilter("always")
        for _ in range(2):
            y = model(x)
            (y * factor).square().sum().backward()
    return [str(warning.message) for warning in caught], y.isfinite().all(0).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_values_that_are_not_finite_are_named_once(value, where):
    place = "first forward, call 1" if where == "forward" else "second.0 backward, call 3"
    for texts, finite in worlds.run(3, _not_finite, value, where):
        assert texts == [f"NaN or Inf in the share of rank 1 of 3 in {place}"]
        assert finite == [True, where == "backward", True], "and propagates as in one process, on every rank"


def _caught(world):
    """The error is caught inside, by one rank, which goes on."""
    model, errors = syncbn.convert(Net(), world.group), []
    try:
        with syncbn.checked(model):
            for _ in range(2):
                try:
                    skipped(model, world.rank == 1, world.rank)
                except syncbn.CollectiveError as error:
                    errors.append(str(error))
                    if world.rank == 0:
                        raise
    except syncbn.CollectiveError:
        pass
    return errors


def test_after_the_error_there_is_nothing_more_to_agree_on():
    start = time.monotonic()
    first, second = worlds.run(2, _caught)
    assert second[0] == first[0]
    assert second[1].startswith("in second.0 forward: checked mode ended before, with an error on every rank")
    assert time.monotonic() - start < AT_ONCE


def _while_handling(world):
    """Entered where another error is being handled, which is not one of the run inside."""
    model = syncbn.convert(Net(), world.group)
    try:
        raise KeyError("before")
    except KeyError:
        try:
            with syncbn.checked(model):
                step(model, world.rank)
                if world.rank == 1:
                    raise ZeroDivisionError("inside")
        except Exception as error:
            return type(error).__name__, str(error)


def test_an_error_handled_around_the_context_is_not_taken_for_one_inside():
    first, second = worlds.run(2, _while_handling)
    assert second == ("ZeroDivisionError", "inside")
    assert first[0] == "CollectiveError"
    assert "rank 0 is out of the context, rank 1 failed: ZeroDivisionError: inside;" in first[1]


def _of_a_group(world):
    """Ranks 1 and 3 of four have a model of their own; the others are not asked. Messages give ranks of the job."""
    part = dist.new_group([1, 3])
    if world.rank in (1, 3):
        model = syncbn.convert(Net(), part)
        try:
            with syncbn.checked(model):
                skipped(model, world.rank == 3, world.rank)
        except syncbn.CollectiveError as error:
            return str(error)
    return None


def test_a_group_of_some_ranks_compares_among_them():
    results = worlds.run_fresh(4, _of_a_group)
    assert results[0] is None
    assert results[1] == results[3]
    assert "rank 1 is in first forward, rank 3 in second.0 forward" in results[1]


def test_a_group_of_a_job_that_has_ended_is_named():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert ranks_of(group) == [0]
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"a process group of a job that has ended; expected one of this job"):
        ranks_of(group)


def test_a_model_without_layers_of_ours_is_an_error():
    with (
        pytest.raises(ValueError, match="given a BatchNorm1d without layers of syncbn; expected some"),
        syncbn.checked(nn.BatchNorm1d(3)),
    ):
        pass
