"""What a layer holds to on every device, by the kernels of each: the CPU's everywhere, those of a GPU where there is one.

Memory that nothing was written to holds NaN (conftest.py), but where kernels are counted or torch's own would refuse.
"""

import copy
import math

import batches
import pytest
import test_fused
import torch
from batches import Case
from host_sync import NoHostSync
from test_fused import plain_or_fused
from test_kernels import check_bits_of_the_relu
from torch import nn

import syncbn
from syncbn import kernels
from syncbn.bench import counts
from syncbn.kernels import Affine

pytestmark = [
    pytest.mark.timeout(600),  # on a GPU the first run compiles
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
every_form = pytest.mark.parametrize("fused", batches.FUSED)


def leaves_of(case: Case, device: str, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the layer of a case takes, with gradients, and the gradient of what it gives."""
    (x,), (dy,) = batches.make(case, seed)
    given = [x, *(batches.residuals(case, seed) or [])]
    return [batches.place(t, device).requires_grad_() for t in given], batches.place(dy, device)


def step(layer: nn.Module, leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of all that was given and of γ and β."""
    y = layer(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)]


def test_memory_that_nothing_was_written_to_holds_nan(device):
    assert torch.empty(7, device=device).isnan().all()


@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
@pytest.mark.parametrize("space", batches.SPACES)
@every_form
def test_values_of_every_form(device, fused, space, dtype):
    for layout in ("contiguous", "channels_last", "permuted"):
        for shares in ("equal", "all empty"):
            case = Case(1, shares, space, dtype, layout, fused=fused)
            batches.check(case, [test_fused.on_a_rank(0, case, "eager", device=device)])


@pytest.mark.parametrize("fused", ["relu", "add relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_the_relu_of_backward_is_that_of_forward_to_the_bit(device, dtype, layout, fused):
    kernels_of_device = kernels.pick(batches.lay_out(torch.zeros(2, 3, 4, 5, dtype=dtype, device=device), layout))
    check_bits_of_the_relu(kernels_of_device, (6, 32, 40, 53), dtype, layout, fused, device)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
def test_what_is_no_number_passes_a_relu_as_in_torch(device, dtype, layout, added):
    x = torch.randn(4, 3, 10).to(dtype)
    x[2, 1, 7] = math.nan
    x = batches.place(batches.lay_out(x, layout), device)
    residual, ones, compute = torch.zeros_like(x) if added else None, torch.ones_like(x), kernels.pick(x)
    y, saved = compute.normalize(x, compute.moments(x), Affine(None, None, 1e-5, True, residual), None)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()
    assert compute.gradient_sums(ones, x, saved).message[1].item() == 40


SHAPES = {
    "planes": ((8, 16, 36, 36), torch.contiguous_format),
    "short planes": ((32, 16, 7, 7), torch.contiguous_format),
    "rows": ((8, 16, 36, 36), torch.channels_last),
    "(N, C)": ((2000, 40), torch.contiguous_format),
}


def large(shape: str, dtype: torch.dtype, fused: str, device: str) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor]:
    """A layer and a batch whose sums many programs of a GPU share."""
    (n, c, *space), memory = SHAPES[shape]
    torch.manual_seed(0)
    size = (n if device == "cpu" else 16 * n, c, *space)
    layer = syncbn.SyncBatchNorm(c) if fused == "none" else syncbn.SyncBatchNormReLU(c)
    layer._force_sync = True
    x, residual, dy = (torch.randn(size).to(device, dtype).contiguous(memory_format=memory) for _ in range(3))
    return layer.to(device), [t.requires_grad_() for t in (x, residual)[: 1 + (fused == "add relu")]], dy


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_runs_have_the_same_bits(device, shape, dtype, fused):
    layer, leaves, dy = large(shape, dtype, fused, device)
    runs = []
    for _ in range(10):
        twin = copy.deepcopy(layer)
        runs.append([*step(twin, leaves, dy), *twin.buffers()])
    for run in runs[1:]:
        for number, (first, again) in enumerate(zip(runs[0], run, strict=True)):
            assert torch.equal(first, again), f"result {number}"


@every_form
def test_kernels_of_a_step_in_a_group_of_one(device, fused, memory_as_it_comes):
    """Two of ours each way in Triton; test_nccl.py counts them with the all_reduces."""
    layer, leaves, dy = large("planes", torch.float32, fused, device)
    step(layer, leaves, dy)
    y = layer(*leaves)
    for run in (lambda: layer(*leaves), lambda: torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)):
        found, _ = counts.of(run, torch.device(device))
        assert found is not None, "the profiler saw the GPU"
        assert found.host_synchronizations == found.copies_to_host == 0
        assert (found.kernels > 0) == (device == "cuda")
        assert kernels.TRITON_FROM_BYTES > 0 or found.kernels == 2


class NeverWaiting:
    """Raises inside where the host waits for the device: by what CUDA is asked to do, or the operators of a CPU."""

    def __init__(self, device: str) -> None:
        self.on_cpu = NoHostSync() if device == "cpu" else None

    def __enter__(self) -> None:
        if self.on_cpu is None:
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.on_cpu.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.on_cpu is None:
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.on_cpu.__exit__(*error)


@every_form
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", ["unequal", "all empty"])
def test_a_step_never_waits_for_the_device(device, momentum, shares, fused):
    case = Case(1, shares, momentum=momentum, fused=fused)
    layer = plain_or_fused(case).to(device)
    leaves, dy = leaves_of(case, device)
    step(layer, leaves, dy)  # what is made once may wait
    with NeverWaiting(device):
        found = step(layer, leaves, dy)
    assert found[0].shape == dy.shape


def captured(run, device: str):
    """A function that does again what `run` did, and gives its results: by a CUDA graph; a CPU, which has none, runs it."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


@every_form
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", ["equal", "all empty"])
def test_capture_and_replay_of_a_step(device, momentum, shares, fused):
    """A replayed step moves the statistics and gives the gradients as one that is run."""
    case = Case(1, shares, momentum=momentum, fused=fused)
    eager = plain_or_fused(case).to(device)
    static, twin = leaves_of(case, device)[0], copy.deepcopy(eager)
    dy = leaves_of(case, device)[1]
    in_turn(device, lambda: step(copy.deepcopy(eager), static, dy))
    replay = captured(lambda: step(twin, static, dy), device)
    for seed in range(3):
        fresh, _ = leaves_of(case, device, seed)
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        for got, want in zip(replay(), step(eager, fresh, dy), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(eager.named_buffers()))


def in_turn(device: str, *runs):
    """Run each on a stream of its own, which begins after what was to be done before and ends before what comes next."""
    of = torch.get_device_module(device)
    streams, results = [of.Stream() for _ in runs], []
    for stream, run in zip(streams, runs, strict=True):
        stream.wait_stream(of.current_stream())
        with of.stream(stream):
            results.append(run())
    for stream in streams:
        of.current_stream().wait_stream(stream)
    return results


@every_form
@pytest.mark.parametrize("shape", SHAPES)
def test_streams_side_by_side(device, shape, fused):
    """Forwards on streams of their own, backwards where autograd has them: each has the bits of one that ran alone.

    Inputs outlive the streams' work, so that nothing has to be recorded; what a step makes, its own stream made.
    """
    batch = [large(shape, torch.float32, fused, device)]
    batch.append((copy.deepcopy(batch[0][0]), [t.detach().flip(0).requires_grad_() for t in batch[0][1]], batch[0][2] + 1))
    alone = [step(copy.deepcopy(layer), leaves, dy) for layer, leaves, dy in batch]
    for _ in range(5):
        outputs = in_turn(device, *(lambda layer=layer, leaves=leaves: layer(*leaves) for layer, leaves, _ in batch))
        for (layer, leaves, dy), y, (expected, *gradients) in zip(batch, outputs, alone, strict=True):
            assert torch.equal(y, expected)
            for got, want in zip(torch.autograd.grad(y, [*leaves, *layer.parameters()], dy), gradients, strict=True):
                assert torch.equal(got, want)
        del outputs, y  # their graphs, whose leaves would meet the next round's streams, of which autograd warns
