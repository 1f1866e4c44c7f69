"""The layer on a GPU, alone and over Gloo. test_devices.py has what a CPU can run too, test_nccl.py the processes over NCCL."""

import math

import batches
import pytest
import test_layer
import torch
import worlds
from batches import Case
from gpus import check_kernels, needs_gpu, needs_triton
from test_layer import pairs

import syncbn
from syncbn import kernels

pytestmark = needs_gpu


@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
@pytest.mark.parametrize("space", batches.SPACES)
@pytest.mark.parametrize(
    "triton_from_bytes", [pytest.param(math.inf, id="aten"), pytest.param(0, id="triton", marks=needs_triton)]
)
def test_values_on_one_gpu(dtype, space, triton_from_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    check_kernels("cuda", triton_from_bytes)
    for layout in ("contiguous", "channels_last", "permuted"):
        case = Case(1, space=space, dtype=dtype, layout=layout)
        batches.check(case, [test_layer.on_a_rank(worlds.World(0, 1, None, "", "cuda"), case, "module")])


@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_on_a_gpu_that_is_not_the_current_one(layout):
    check_kernels("cuda:1", 0)
    assert torch.cuda.current_device() == 0
    case = Case(1, space=(5, 5), layout=layout)
    batches.check(case, [test_layer.on_a_rank(worlds.World(0, 1, None, "", "cuda:1"), case, "module")])


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout, monkeypatch):
    """The channels at both ends, of which the last is beyond 2^31, beside float64."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", 0)
    x = torch.randn(3, 16, 6689, 6689, device="cuda", dtype=torch.bfloat16)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    assert kernels.pick(x) is kernels.in_triton()
    layer = syncbn.SyncBatchNorm2d(16, momentum=1.0, device="cuda")
    layer._force_sync = True
    y = layer(x.requires_grad_())
    dy = (y * y).detach()
    (dx,) = torch.autograd.grad(y, x, dy)
    for channel in (0, 15):
        wide, gradient = x[:, channel].detach().double(), dy[:, channel].double()
        mean, var = wide.mean(), wide.var(correction=0)
        assert abs(layer.running_mean[channel] - mean) <= 1e-6
        xhat, invstd = (wide - mean) * (var + layer.eps).rsqrt(), (var + layer.eps).rsqrt()
        expected = invstd * (gradient - gradient.mean() - xhat * (gradient * xhat).mean())
        for got, want in ((y[:, channel], xhat), (dx[:, channel], expected)):
            assert (got - want).abs().max() <= 2**-8 * want.abs().max()


def _over_gloo(world):
    check_kernels(world.device, kernels.TRITON_FROM_BYTES)
    chosen = [(case, form) for case, form in pairs(world.size) if form == "module"]
    return [test_layer.on_a_rank(world, case, form) for case, form in chosen]


@needs_triton
@pytest.mark.parametrize("world", [2, 3, 4])
def test_gloo_with_tensors_on_a_gpu(world):
    chosen = [case for case, form in pairs(world) if form == "module"]
    assert chosen
    by_rank = worlds.run(world, _over_gloo, over=worlds.GLOO_ON_GPU)
    for case, results in zip(chosen, zip(*by_rank, strict=True), strict=True):
        batches.check(case, list(results))
