"""The tests of several processes over NCCL, a rank on each GPU, or up to four on one.

The cases are those that test_layer.py, test_fused.py, test_groups.py, test_ddp.py and test_join.py have over Gloo, by which
this program runs where there is no GPU. All that needs a GPU, on a machine that has one:

    python -m pytest tests/test_*cuda*.py tests/test_devices*.py tests/test_nccl.py tests/test_accelerate.py

The first run takes minutes: it compiles the kernels in Triton for every dtype, layout and choice of parameters.
"""

import contextlib
import functools
import math
import multiprocessing
import sys
from typing import NamedTuple
from unittest import mock

import batches
import gpus
import nccl_ranks
import pytest
import test_ddp
import test_fused
import test_groups
import test_join
import test_layer
import torch
import torch.distributed as dist
import worlds
from batches import Case

import syncbn
from syncbn import kernels
from syncbn.bench import counts

TIMEOUT = 500.0  # of a case on a GPU: Triton compiles programs for every dtype, layout and choice of parameters
pytestmark = pytest.mark.timeout(600)


class Form(NamedTuple):
    """What a rank communicates by and computes with."""

    over: worlds.Transport
    triton_from_bytes: float = math.inf
    by_library: bool = False  # what `python -m syncbn build` makes


needs_nccl = pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="needs a GPU and NCCL")
GLOO = Form(worlds.GLOO)
FORMS = {
    "gloo": GLOO,
    "nccl, aten": pytest.param(Form(worlds.NCCL), marks=needs_nccl),
    "nccl, triton": pytest.param(Form(worlds.NCCL, 0), marks=[needs_nccl, gpus.needs_triton]),
    "gloo, c++": pytest.param(Form(worlds.GLOO, by_library=True), marks=gpus.needs_cxx),
    "nccl, c++": pytest.param(Form(worlds.NCCL, 0, True), marks=[needs_nccl, gpus.needs_triton, gpus.needs_cxx]),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def with_kernels(world, form, poisoned, library, case, *args):
    """A case on a rank, by the kernels of the form; in memory that holds NaN, where `poisoned`, until it is written to."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(poisoned)
    try:
        with mock.patch.object(kernels, "TRITON_FROM_BYTES", form.triton_from_bytes), by_library(library):
            gpus.check_kernels(world.device, form.triton_from_bytes)
            assert not poisoned or torch.empty(3, device=world.device).isnan().all()
            assert dist.get_backend(world.group) == form.over.backend
            return case(world, *args)
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def by_library(path):
    """What is built there is used; nothing that is built, without a path."""
    loaded = None if path is None else kernels.extension.load(path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels.extension, "library", loaded))
        stack.enter_context(mock.patch.object(kernels, "_tried", {}))
        if loaded is not None and kernels.in_triton() is not None:
            kernels.in_triton().use(loaded)
        layer = syncbn.SyncBatchNorm(2, group_size=1)
        layer._force_sync = True
        assert (loaded is not None) == isinstance(layer(torch.randn(3, 2)).grad_fn, getattr(loaded, "Node", ()))
        yield


def run(form, size, case, *args, poisoned=True):
    """As worlds.run."""
    timeout = worlds.CASE_TIMEOUT if form.over.device == "cpu" else TIMEOUT
    library = gpus.library if form.by_library else None
    return worlds.run(size, with_kernels, form, poisoned, library, case, *args, timeout=timeout, over=form.over)


def sizes(test):
    """Worlds of 2 to 4, of which Gloo, by which the others are tested elsewhere, takes one in a sub-group."""
    chosen = [pytest.param(3, GLOO, id="3-gloo")]
    for name, form in list(FORMS.items())[1:]:
        worlds_of = (2, 3, 4) if name.startswith("nccl") else (3,)
        chosen += [pytest.param(size, *form.values, marks=form.marks, id=f"{size}-{name}") for size in worlds_of]
    return pytest.mark.parametrize(("size", "form"), chosen)(test)


@sizes
def test_every_pair_of_variants_of_the_layer(size, form):
    test_layer.check_pairs(size, functools.partial(run, form))


@sizes
def test_every_pair_of_variants_of_the_fused_layer(size, form):
    test_fused.check_pairs(size, functools.partial(run, form))


@every_form
def test_groups_side_by_side(form):
    test_groups.check([(0, 1), (2, 3)], run(form, 4, test_groups._by_size, 2))


@sizes
@pytest.mark.parametrize("shares", ["unequal", "empty", "single"])
def test_training_equals_one_process(size, form, shares):
    ours = functools.partial(run, form, poisoned=False)
    test_ddp.check(size, shares, torch.float64, 1, "before", 1e-11, ours)


@every_form
def test_float32_and_conversion_inside_the_wrapper(form):
    ours = functools.partial(run, form, poisoned=False)
    test_ddp.check(3, "empty", torch.float32, 1, "after", 2e-5, ours)


@every_form
@pytest.mark.parametrize("case", ["uneven", "none without broadcast"])
def test_ranks_with_different_numbers_of_batches(form, case):
    found = run(form, 4, _joined, case, poisoned=False)
    test_join.check_training(4, case, found)


def _joined(world, case):
    return test_join.train(world, **test_join.CASES[case])


def _kernels_of_a_step(world, case):
    """What a forward and backward launch, each with its all_reduce, and whether they wait."""
    layer = syncbn.convert(test_fused.plain_or_fused(case), world.group).to(world.device)
    xs, dys = batches.make(case)
    x, dy = (batches.place(t[world.rank], world.device) for t in (xs, dys))
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    added = batches.residuals(case)
    inputs = [x] if added is None else [x, batches.place(added[world.rank], world.device)]

    def forward():
        return layer(*inputs)

    y = forward()
    torch.autograd.grad(y, leaves, dy)
    y = forward()
    device = torch.device(world.device)
    return [counts.of(run, device)[0] for run in (forward, lambda: torch.autograd.grad(y, leaves, dy))]


@every_form
@pytest.mark.parametrize("fused", batches.FUSED)
def test_kernels_and_waits_of_a_step(form, fused):
    """Three kernels each way in Triton: two of ours and one all_reduce."""
    for found in run(form, 2, _kernels_of_a_step, Case(2, fused=fused), poisoned=False):
        for each in found:
            assert each is not None, "the profiler saw the GPU"
            assert each.host_synchronizations == each.copies_to_host == 0
            assert (each.kernels > 0) == (form.over.device == "cuda")
            assert form.triton_from_bytes > 0 or each.kernels <= 3


def _sum_of_ranks(world):
    total = torch.full((1,), float(world.rank), device=world.device)
    dist.all_reduce(total, group=world.group)
    return total.item(), multiprocessing.current_process().name, "syncbn" in sys.modules


def test_processes_that_are_spawned_as_those_of_nccl():
    """Interpreters of their own, which this file's imports reach when a case is sent to them."""
    over = worlds.NCCL._replace(backend="gloo", device="cpu")
    found = worlds.run_fresh(2, _sum_of_ranks, over=over, timeout=worlds.START_TIMEOUT)
    assert [total for total, *_ in found] == [1.0, 1.0]
    assert all(name.startswith("SpawnProcess") and imported for _, name, imported in found), found


def test_ranks_that_share_a_gpu_are_told_to_nccl():
    """Each rank is a machine of its own to releases that would refuse a GPU twice; none is told where each has its GPU."""
    alone = nccl_ranks.settings(1, 4, 4, (2, 27, 5))
    assert not {"NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_P2P_DISABLE"} & set(alone)
    assert nccl_ranks.settings(1, 4, 1, (2, 30, 1))["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    before = [nccl_ranks.settings(rank, 4, 1, (2, 28, 9)) for rank in range(4)]
    assert len({found["NCCL_HOSTID"] for found in before}) == 4
    assert all(found["NCCL_NET"] == "Socket" and found["NCCL_SHM_DISABLE"] == "1" for found in before)
