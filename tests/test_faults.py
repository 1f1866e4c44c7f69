"""Ranks that die, freeze, fail or run out of memory: what the others see, and when, with checked mode and without."""

import contextlib
import datetime
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import control

TIMEOUT = 3.0  # of the groups
MARGIN = 5.0  # seconds that a loaded machine may add
VICTIM = 1
PROGRAM = str(Path(__file__).with_name("fault_program.py"))
LAUNCHED_TIMEOUT = 5.0  # of the group under torchrun
AGENT_GRACE = 5  # seconds that torch's launcher, which has 30, gives a worker that does not answer its signal
STARTUP = 40.0  # seconds in which torchrun and three processes import torch on a loaded machine


def impatient(seconds, ranks=None):
    """A new group whose collectives wait so long; where a machine is loaded, to make it may take longer."""
    group = dist.new_group(ranks)
    if group is not dist.GroupMember.NON_GROUP_MEMBER:
        group._get_backend(torch.device("cpu"))._set_default_timeout(datetime.timedelta(seconds=seconds))
    return group


class LostError(Exception):
    """What the victim raises."""


def strike(fault):
    """What happens to the victim between two layers."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "exception":
        raise LostError("by accident")
    if fault == "memory":
        torch.empty(2**60)


class Net(nn.Module):
    """Two layers; at the second forward of the victim something happens in between."""

    def __init__(self, fault, victim):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.fault, self.victim, self.calls = fault, victim, 0

    def forward(self, x):
        x = self.first(x)
        self.calls += 1
        if self.victim and self.calls == 2:
            strike(self.fault)
        return self.second(x)


def train(group, fault, victim, checked):
    """Three steps, in the second of which something happens to the victim; what it raised, and how long after a step."""
    model = syncbn.convert(Net(fault, victim), group)
    start = time.monotonic()
    try:
        with syncbn.checked(model) if checked else contextlib.nullcontext():
            for _ in range(3):
                model(torch.randn(4, 3)).square().sum().backward()
                start = time.monotonic()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def last_step_without_backward(group, rank):
    """What a rank says, and how long after: the last has a step more, followed by the others, and it is only a forward."""
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), group)
    ddp = DistributedDataParallel(model, process_group=group)
    joined = syncbn.SyncBatchNormJoin(ddp)
    try:
        with Join([joined, ddp]), ddp.no_sync():  # or the wrapper's own collectives fail first
            for step in range(2 if rank == 2 else 1):
                loss = ddp(torch.randn(4, 3)).square().sum()
                if step == 0:
                    loss.backward()
                start = time.monotonic()
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def lost_between_two_messages(group, rank):
    """What a rank says, and how long after: the last says how much it has to send, and sends nothing."""
    side = control.side_group(group)
    start = time.monotonic()
    try:
        if rank == 2:
            return side.gather_rows(control.Place("objects", ""), [10])()
        side.gather_objects("a value")
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - start


def _failing(world):
    """Errors of one rank; each on groups of its own, with checks and without."""
    found = {}
    for fault in ("exception", "memory"):
        for checked in (True, False):
            group = impatient(TIMEOUT)
            found[fault, checked] = train(group, fault, world.rank == VICTIM, checked)
            dist.barrier()  # the victim lives on, and says nothing
    found["join"] = last_step_without_backward(impatient(TIMEOUT), world.rank)
    found["messages"] = lost_between_two_messages(impatient(TIMEOUT), world.rank)
    return found


@functools.cache
def failing():
    return worlds.run_fresh(3, _failing, group_timeout=30.0)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("fault", ["exception", "memory"])
def test_an_error_on_one_rank_reaches_the_others_within_the_timeout(fault, checked):
    for rank, found in enumerate(failing()):
        kind, message, seconds = found[fault, checked]
        own = "LostError: by accident" if fault == "exception" else "RuntimeError: "
        if rank == VICTIM:
            assert f"{kind}: {message}".startswith(own), "its own error"
            assert fault == "exception" or "can't allocate memory" in message
        elif checked:
            assert message.startswith(f"ranks differ at call 6: rank 1 failed: {own}")
            assert ", ranks 0, 2 in second forward; expected" in message
            assert seconds < TIMEOUT, "at once"
        else:
            where = f"layer 'second' failed in forward on rank {rank} of 3, in a group of 3 on cpu"
            assert_unchecked(kind, message, seconds, where)


def test_a_rank_out_of_data_waits_no_longer_than_the_timeout():
    for found in failing()[:2]:
        kind, message, seconds = found["join"]
        assert kind == "CollectiveError"
        assert message.startswith("a rank out of data waited in vain for backward of layer '1'; expected the ranks with data")
        assert seconds < TIMEOUT + MARGIN


def test_a_rank_lost_between_two_control_messages_is_an_error_of_the_others_within_the_timeout():
    for rank, found in enumerate(failing()[:2]):
        kind, message, seconds = found["messages"]
        assert kind == "CollectiveError"
        where = f"where rank {rank} is in an exchange of objects: gone, frozen, or elsewhere for longer than 0:00:03"
        assert message.startswith(f"no answer from rank 2, {where}")
        assert seconds < TIMEOUT + MARGIN


def assert_unchecked(kind, message, seconds, where):
    assert kind == "CollectiveError"
    assert message.startswith(f"all_reduce of {where}; expected every rank of the group to reach it within 0:00:03")
    assert "look for the first error among the other ranks" in message
    assert seconds < TIMEOUT + MARGIN


def _lost(world, fault):
    """Two groups side by side, the second in checked mode, that lose a rank each."""
    groups = [impatient(TIMEOUT, ranks) for ranks in ([0, 1], [2, 3])]
    return train(groups[world.rank // 2], fault, world.rank % 2 == VICTIM, world.rank > 1)


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_a_rank_that_is_gone_or_frozen_is_an_error_of_the_others_within_the_timeout(fault):
    unchecked, checked = worlds.run_fresh(4, _lost, fault, lost=[1, 3])
    assert_unchecked(*unchecked, "layer 'second' failed in forward on rank 0 of 4, in a group of 2 on cpu")
    kind, message, seconds = checked
    assert kind == "CollectiveError"
    assert message.startswith("no answer from rank 3 at call 6, where rank 2 is in second forward: gone, frozen, or elsewhere")
    assert seconds < TIMEOUT + MARGIN


def late(way, group, model, odd):
    """What happens where the odd rank comes later than the timeout, or not at all."""
    x, wait = torch.randn(4, 3), lambda: time.sleep((TIMEOUT + 1.5) * odd)
    if way == "not at all" and odd:
        return wait()
    try:
        if way == "loop":
            for step, _ in enumerate(syncbn.even_steps([x] * 3, group)):
                if step == 0:
                    wait()
        with syncbn.checked(model):
            model(x)
            wait()
            model(x)
    except syncbn.CollectiveError as error:
        return str(error)


def _late(world):
    """In two pairs of ranks side by side, twice: what the ranks say, and what is checked right afterwards."""
    group = [impatient(TIMEOUT, ranks) for ranks in ([0, 1], [2, 3])][world.rank // 2]
    found = {}
    for ways in (("in a forward", "not at all"), ("loop", "once more")):
        way, odd = ways[world.rank // 2], world.rank % 2
        model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), group)
        message = late(way, group, model, odd)
        results = []
        for context in (syncbn.checked(model), contextlib.nullcontext()):
            x = torch.randn(3 + odd, 3, generator=torch.Generator().manual_seed(odd)).requires_grad_()
            with context:
                for batch, weight in syncbn.even_steps([x] * (1 + odd), group):
                    (model(batch).pow(3).sum() * weight).backward()
            results.append(x.grad)
        found[way] = message, results, group.size()
    return found


@functools.cache
def came_late():
    pairs = worlds.run_fresh(4, _late, group_timeout=30.0)
    return {way: [rank[way] for rank in pairs if way in rank] for one in pairs for way in one}


@pytest.mark.parametrize("way", ["in a forward", "not at all", "loop", "once more"])
def test_control_messages_go_on_after_one_without_an_answer(way):
    (first, *_), (second, *_) = came_late()[way]
    place = {"loop": "in step 2 of loop 3 of even_steps", "not at all": "opening the control channel"}
    assert first.startswith("no answer from rank ")
    assert f"is {place.get(way, 'in 0 forward')}: gone, frozen, or elsewhere for longer than 0:00:03; expected every" in first
    assert second is None if way == "not at all" else "every rank came there, but not within 0:00:03" in second
    for _, (checked, plain), size in came_late()[way]:
        assert size == 2
        assert torch.equal(checked, plain)
        assert plain.abs().max() > 0.01


TORCHRUN = f"""
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import PContext
assert PContext.close.__defaults__ == (None, 30)
PContext.close.__defaults__ = (None, {AGENT_GRACE})
torch.distributed.run.main()
"""


class Launched:
    """torchrun with one of the faults, started."""

    def __init__(self, fault, directory):
        self.output = open(directory / f"{fault}.txt", "w+")  # noqa: SIM115
        self.mark = f"syncbn-fault={directory / fault}"
        self.start = time.monotonic()
        options = ["--standalone", "--nproc-per-node=3", "--monitor-interval=0.1"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TORCHRUN, *options, PROGRAM, fault, str(LAUNCHED_TIMEOUT), self.mark],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def left(self):
        """The processes that have the mark in their command line."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if self.mark in path.read_text() and "\nState:\tZ" not in (path.parent / "status").read_text():
                    found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory):
    """Started before the other tests of this file: they mostly wait."""
    directory = tmp_path_factory.mktemp("launched")
    runs = {fault: Launched(fault, directory) for fault in ("frozen", "killed", "exception")}
    yield runs
    for run in runs.values():
        run.process.kill()
        for process in run.left():
            os.kill(process, signal.SIGKILL)
        run.process.wait()
        run.output.close()


def _not_finite(world, value):
    x, dy = (t.split([3, 2, 4])[world.rank] for t in data(value))
    layer = syncbn.convert(nn.BatchNorm1d(3, momentum=0.5, dtype=torch.float64), world.group)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var


def data(value):
    x, dy = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0)).double()
    x[4, 1] = value
    return x, dy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_propagate_as_in_one_process(value):
    """NaN in the channel on every rank, and nowhere else."""
    x, dy = data(value)
    one = torch.nn.BatchNorm1d(3, momentum=0.5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = one(leaf)
    y.backward(dy)
    results = worlds.run(3, _not_finite, value)
    pairs = [
        (torch.cat([result[0] for result in results]), y.detach()),
        (torch.cat([result[1] for result in results]), leaf.grad),
        (sum(result[2] for result in results), one.weight.grad),
        *((result[place], buffer) for result in results for place, buffer in ((3, one.running_mean), (4, one.running_var))),
    ]
    for got, expected in pairs:
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fault", ["killed", "exception", "frozen"])
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_under_torchrun_every_process_ends_within_the_timeout_and_its_grace(launched, fault):
    run = launched[fault]
    limit = run.start + STARTUP + LAUNCHED_TIMEOUT + AGENT_GRACE + MARGIN
    assert run.process.wait(max(1.0, limit - time.monotonic())) == 1
    assert run.left() == []
    run.output.seek(0)
    printed = run.output.read()
    says = {
        "exception": "LostError: by accident",
        "killed": r"Signal 9 \(SIGKILL\) received",  # before or after the others' own errors
        "frozen": "CollectiveError: all_reduce of layer 'second' failed in forward on rank [02] of 3",
    }
    assert re.search(says[fault], printed), printed
