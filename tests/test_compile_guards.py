"""What compiled code is guarded by: groups, jobs, shapes, and tensors given twice. Backend aot_eager, which is fast."""

import datetime
import os

import oracle
import pytest
import tolerance
import torch
import torch._dynamo
import torch.distributed as dist
import worlds
from torch import nn

import syncbn

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # what tracing does to an autograd.Function
]
CHANNELS = 4


def share(rank):
    """(5, C) float64."""
    return torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(rank)).double() + 3 * rank


def layer(**options):
    return syncbn.SyncBatchNorm1d(CHANNELS, dtype=torch.float64, **options)


def assert_by_ranks(y, rank, ranks):
    """y is of this rank's share, normalized with those of the ranks."""
    shares = [share(each) for each in ranks]
    expected = oracle.batch_norm(shares, [torch.zeros_like(x) for x in shares]).y[ranks.index(rank)]
    tolerance.assert_near(y, expected)


def _in_jobs(world, sizes, options):
    """The output of a compiled model in jobs of these sizes, 0 where there is none, begun one after the other."""
    dist.destroy_process_group()
    torch._dynamo.reset()
    compiled, found = torch.compile(nn.Sequential(layer(**options)), backend="aot_eager", fullgraph=True), []
    for number, size in enumerate(sizes):
        if size:
            path = os.path.join(world.directory, f"job-{number}{'' if size > 1 else f'-{world.rank}'}")
            waiting = datetime.timedelta(seconds=20)
            dist.init_process_group(
                "gloo", init_method=f"file://{path}", rank=world.rank if size > 1 else 0, world_size=size, timeout=waiting
            )
        found.append(compiled(share(world.rank)).detach())
        if size:
            dist.barrier()
            dist.destroy_process_group()
    return found


@pytest.mark.parametrize(("sizes", "options"), [([2, 0, 2], {}), ([0, 2], {"group_size": 2})], ids=str)
def test_a_job_begun_after_code_was_compiled(sizes, options):
    """A dry run before init_process_group is nothing that later steps go by."""
    for rank, found in enumerate(worlds.run_fresh(2, _in_jobs, sizes, options, timeout=100, group_timeout=20.0)):
        for y, size in zip(found, sizes, strict=True):
            assert_by_ranks(y, rank, [0, 1] if size == 2 else [rank])


class Strided(nn.Module):
    """Behind a convolution of stride 2 lengths of the input differ where those of the mask are the same."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(3, CHANNELS, 3, stride=2, dtype=torch.float64)
        self.norm = layer(track_running_stats=False)
        self.norm._force_sync = True

    def forward(self, x, mask):
        return self.norm(self.convolution(x), mask)


def test_a_mask_fits_where_the_length_of_the_input_is_symbolic():
    torch._dynamo.reset()
    module = Strided()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for length in (9, 10, 12):
        mask = torch.arange((length - 3) // 2 + 1) < torch.tensor([[1], [2], [3], [4]])
        x = torch.randn(4, 3, length).double()
        torch.testing.assert_close(compiled(x, mask), module(x, mask), rtol=1e-12, atol=1e-12)
    with pytest.raises(Exception, match=r"a mask of shape|Observed exception"):  # the latter is all that torch 2.11 says
        compiled(torch.randn(4, 3, 11).double(), torch.ones(4, 3, dtype=torch.bool))


def test_the_input_as_its_own_residual():
    torch._dynamo.reset()
    module = syncbn.SyncBatchNormReLU(CHANNELS, dtype=torch.float64, track_running_stats=False)
    module._force_sync = True
    nn.init.uniform_(module.weight)
    compiled, results = torch.compile(module, backend="aot_eager", fullgraph=True), []
    for each in (compiled, module):
        x = share(0).requires_grad_()
        y = each(x, x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, module.weight.grad.clone()))
        module.zero_grad()
    for found, eager in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-12, atol=1e-12)


def _in_groups(world, assigned):
    """Outputs over a group of this rank alone, and of both: layers of one class, or one layer that is given another."""
    torch._dynamo.reset()
    single = [dist.new_group([rank]) for rank in range(2)][world.rank]
    x = share(world.rank)
    if assigned:
        model = nn.Sequential(layer(process_group=single))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        first = compiled(x).detach()
        model[0].process_group = world.group
        return first, compiled(x).detach()
    blocks = [nn.Sequential(layer(process_group=group)) for group in (single, world.group)]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # whose code they share
    return tuple(block(x).detach() for block in blocks)


@pytest.mark.parametrize("assigned", [True, False])
def test_a_group_of_one_rank_and_then_another(assigned):
    for rank, (alone, together) in enumerate(worlds.run_fresh(2, _in_groups, assigned, timeout=100, group_timeout=20.0)):
        assert_by_ranks(alone, rank, [rank])
        assert_by_ranks(together, rank, [0, 1])
