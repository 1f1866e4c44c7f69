"""The layer on a GPU, alone and over Gloo. test_devices.py has what a CPU can run too, test_nccl.py the processes over NCCL."""

import math

import batches
import pytest
import test_layer
import torch
import worlds
from batches import Case
from test_layer import pairs

from syncbn import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
@pytest.mark.parametrize("space", batches.SPACES)
@pytest.mark.parametrize("triton_from_bytes", [math.inf, 0], ids=["aten", "triton"])
def test_values_on_one_gpu(dtype, space, triton_from_bytes, monkeypatch):
    monkeypatch.setattr(kernels, "TRITON_FROM_BYTES", triton_from_bytes)
    for layout in ("contiguous", "channels_last", "permuted"):
        case = Case(1, space=space, dtype=dtype, layout=layout)
        batches.check(case, [test_layer.on_a_rank(worlds.World(0, 1, None, "", "cuda"), case, "module")])


def _over_gloo(world):
    chosen = [(case, form) for case, form in pairs(world.size) if form == "module"]
    return [test_layer.on_a_rank(world, case, form) for case, form in chosen]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gloo_with_tensors_on_a_gpu(world):
    chosen = [case for case, form in pairs(world) if form == "module"]
    assert chosen
    by_rank = worlds.run(world, _over_gloo, over=worlds.GLOO_ON_GPU)
    for case, results in zip(chosen, zip(*by_rank, strict=True), strict=True):
        batches.check(case, list(results))
