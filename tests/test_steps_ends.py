"""Errors in a loop of even_steps, loops that are left early, and loops inside of each other: no rank waits for ever."""

import time

import pytest
import torch
import torch.distributed as dist
import worlds
from uneven import caught

from syncbn.collectives import timeout
from syncbn.control import side_group
from syncbn.steps import even_steps


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
