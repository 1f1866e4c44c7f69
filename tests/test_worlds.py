"""The multi-process helper itself: results by rank, the first error, and a hang that ends."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import worlds


def _sum_of_ranks(world, offset):
    value = torch.tensor([float(world.rank + offset)])
    dist.all_reduce(value, group=world.group)
    return world.rank, world.size, value.item()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_results_come_by_rank_from_a_group_of_the_size(size):
    total = float(sum(range(size)) + 10 * size)
    assert worlds.run(size, _sum_of_ranks, 10) == [(rank, size, total) for rank in range(size)]


def _fail_on_the_last(world):
    if world.rank == world.size - 1:
        raise ValueError("planted")
    dist.barrier(group=world.group)


def test_the_first_traceback_wins_and_the_next_case_runs():
    with pytest.raises(worlds.CaseError, match=r"rank 2 failed first:[^$]*ValueError: planted"):
        worlds.run(3, _fail_on_the_last)
    assert worlds.run(2, _sum_of_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]


def _hang_on_rank_1(world):
    if world.rank == 1:
        time.sleep(600)


def test_a_hang_ends_at_the_timeout_and_names_the_rank():
    start = time.monotonic()
    with pytest.raises(worlds.CaseError, match=r"no answer from ranks \[1\] within 2 s"):
        worlds.run(2, _hang_on_rank_1, timeout=2)
    assert time.monotonic() - start < 10


def _exit_on_rank_0(world):
    if world.rank == 0:
        os._exit(3)


def test_a_dead_process_is_named_with_its_exit_code():
    with pytest.raises(worlds.CaseError, match=r"rank 0 failed first:\nthe process ended \(exit code 3\)"):
        worlds.run_fresh(2, _exit_on_rank_0)
