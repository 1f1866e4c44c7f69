"""What only a GPU can show: values, no host synchronisation, capture and replay of a step, Gloo with CUDA tensors, NCCL."""

import copy
import math

import batches
import pytest
import torch
import worlds
from batches import Case, Result
from test_layer import layer_for, pairs

import syncbn
from syncbn import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(case: Case, rank: int, layer: torch.nn.Module) -> Result:
    """The forward and backward of one rank's share, back on the CPU."""
    xs, dys = batches.make(case)
    x, dy = (t.detach().cuda() if case.layout == "contiguous" else move(t) for t in (xs[rank], dys[rank]))
    layer.cuda()
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    y.backward(dy)
    grads = [None if p is None else p.grad.cpu() for p in (layer.weight, layer.bias)]
    buffers = [None if b is None else b.cpu() for b in (layer.running_mean, layer.running_var)]
    return Result(y.detach().cpu(), dx.cpu(), *grads, *buffers)


def move(t: torch.Tensor) -> torch.Tensor:
    """To the GPU with the strides of t."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)


@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
@pytest.mark.parametrize("space", batches.SPACES)
@pytest.mark.parametrize("triton_from_bytes", [math.inf, 0], ids=["aten", "triton"])
def test_values_on_one_gpu(dtype, space, triton_from_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    for layout in ("contiguous", "channels_last", "permuted"):
        case = Case(1, space=space, dtype=dtype, layout=layout)
        layer = layer_for(case, "module")
        layer._force_sync = True
        batches.check(case, [on_gpu(case, 0, layer)])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", ["unequal", "all empty"])
@pytest.mark.parametrize("triton_from_bytes", [math.inf, 0], ids=["aten", "triton"])
def test_a_step_never_waits_for_the_gpu(momentum, shares, triton_from_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    case = Case(1, shares, momentum=momentum)
    layer = layer_for(case, "module").cuda()
    layer._force_sync = True
    (x,), (dy,) = batches.make(case)
    x, dy = x.cuda().requires_grad_(), dy.cuda()
    layer(x).backward(dy)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None, "and nothing raised"


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", ["unequal", "all empty"])
@pytest.mark.parametrize("triton_from_bytes", [math.inf, 0], ids=["aten", "triton"])
def test_capture_and_replay_of_a_step(momentum, shares, triton_from_bytes, monkeypatch):
    """A replayed step moves the statistics and fills the gradients as one that is run."""
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    case = Case(1, shares, momentum=momentum)
    eager = layer_for(case, "module").cuda()
    eager._force_sync = True
    captured = copy.deepcopy(eager)
    (x,), (dy,) = batches.make(case)
    static, dy = x.cuda().requires_grad_(), dy.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        copy.deepcopy(captured)(static).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    captured.zero_grad()
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(static)
        y.backward(dy)
    for seed in range(3):
        (fresh,), _ = batches.make(case, seed)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        leaf = fresh.cuda().requires_grad_()
        eager.zero_grad()
        expected = eager(leaf)
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(static.grad, leaf.grad)
        torch.testing.assert_close(captured.weight.grad, eager.weight.grad)
        torch.testing.assert_close(captured.running_var, eager.running_var)
        assert captured.num_batches_tracked.item() == eager.num_batches_tracked.item()


def _over_gloo(world):
    results = []
    for case, form in pairs(world.size):
        if form == "module":
            layer = syncbn.convert(layer_for(case, form), world.group)
            results.append(on_gpu(case, world.rank, layer))
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gloo_with_tensors_on_a_gpu(world):
    chosen = [case for case, form in pairs(world) if form == "module"]
    assert chosen
    by_rank = worlds.run(world, _over_gloo)
    for case, results in zip(chosen, zip(*by_rank, strict=True), strict=True):
        batches.check(case, list(results))
