"""What is beside the layer, over processes on a GPU: its results are those over Gloo on the CPU, which other tests check."""

import functools
import math

import pytest
import test_nccl
import torch
from test_nccl import FORMS, GLOO
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

pytestmark = pytest.mark.timeout(600)  # on a GPU the first run compiles
SHARES = (3, 1, 0, 4)  # samples by rank
RANKS = len(SHARES)


class Network(nn.Module):
    """Two layers, the first of which takes a mask."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm1, self.norm2 = syncbn.SyncBatchNorm(4), syncbn.SyncBatchNormReLU(4)
        self.to(dtype)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm1(self.conv(x), mask)
        return self.norm2(y.sin(), y)


def batch(world, number: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's share."""
    generator = torch.Generator().manual_seed(number)
    whole = torch.randn(sum(SHARES), 2, 5, 5, generator=generator, dtype=torch.float64) * (1 + number) + number
    return whole.split(SHARES)[world.rank].to(world.device, dtype)


def _step(model, x, *more):
    model(x, *more).square().sum().backward()


def _checked(world, model, dtype):
    with syncbn.checked(model):
        _step(model, batch(world, 0, dtype))
    return []


def _masked(world, model, dtype):
    x = batch(world, 0, dtype)
    _step(model, x, x[:, :1] > 0)
    return []


def _checkpointed(world, model, dtype):
    x = batch(world, 0, dtype).requires_grad_()
    checkpoint(model, x, use_reentrant=False, context_fn=syncbn.checkpoint_context).square().sum().backward()
    return [x.grad]


def _accumulated(world, model, dtype):
    with syncbn.accumulate_statistics(model):
        for number in range(3):
            _step(model, batch(world, number, dtype))
    return []


def _population(world, model, dtype):
    syncbn.update_bn_stats(model, [batch(world, number, dtype) for number in range(3)], progress=False)
    return []


def _even(world, model, dtype):
    """The ranks have 3, 2, 1 and 0 batches."""
    loader = [(batch(world, number, dtype),) for number in range(RANKS - 1 - world.rank)]
    weights = []
    for (x,), weight in syncbn.even_steps(loader, world.group):
        _step(model, x.to(world.device))  # that of a rank without any is on the CPU
        weights.append(weight)
    return [torch.tensor(weights)]


def _watched(world, model, dtype):
    with syncbn.monitor(model) as watched:
        _step(model, batch(world, 0, dtype))
        report = watched.read()
    figures = [figure for layer in report.layers.values() for figure in layer if isinstance(figure, float)]
    return [torch.tensor(figures).nan_to_num(-1)]  # of a rank without samples


USES = {use.__name__.strip("_"): use for use in (_checked, _masked, _checkpointed, _accumulated, _population, _even, _watched)}


def _used(world, name, dtype):
    """What a use gives, and how it leaves gradients and buffers."""
    model = Network(dtype).to(world.device)
    for layer in model.modules():
        if isinstance(layer, syncbn.SyncBatchNorm):
            layer.process_group = world.group
    given = USES[name](world, model, dtype)
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [value.detach().double().cpu() for value in (*given, *gradients, *model.buffers())]


@functools.cache
def on_the_cpu(name, dtype):
    return test_nccl.run(GLOO, RANKS, _used, name, dtype, poisoned=False)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", USES)
def test_it_gives_what_it_gives_on_the_cpu(name, form):
    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        expected = on_the_cpu(name, torch.float64)
        found = test_nccl.run(form, RANKS, _used, name, dtype, poisoned=False)
        for rank, (values, wanted) in enumerate(zip(found, expected, strict=True)):
            assert values
            for value, want in zip(values, wanted, strict=True):
                assert math.isfinite(value.abs().sum())
                scale = max([1.0, *want.abs().flatten().tolist()])
                torch.testing.assert_close(value, want, rtol=allowed, atol=allowed * scale, msg=f"rank {rank}")
