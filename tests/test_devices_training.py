"""Training on every device: under autocast with a gradient scaler, compiled, and watched by compute-sanitizer."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from gpus import needs_gpu
from torch import nn

import syncbn

pytestmark = pytest.mark.timeout(600)  # on a GPU the first run compiles


class Fused(nn.Module):
    """A block of a network with the fused layer, plain and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), syncbn.SyncBatchNormReLU(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), syncbn.SyncBatchNormReLU(4)
        self.norm3 = syncbn.SyncBatchNorm2d(4)
        for layer in (self.norm1, self.norm2, self.norm3):
            layer._force_sync = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm3(self.norm2(self.conv2(y), y))


class Separate(nn.Module):
    """The same by torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return self.norm3((self.norm2(self.conv2(y)) + y).relu())


OVERFLOW = 1  # the step whose gradients do not fit into float16


def train(model: nn.Module, device: str) -> list[float]:
    """Some steps in float16; the losses, then the scales, and in OVERFLOW's place how far the parameters moved: not at all."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler(device, init_scale=2.0**8)
    losses, scales = [], []
    for number in range(4):
        x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(number)).to(device)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            y = model(x)
            assert y.dtype == torch.float16
            loss = (y.float() - x.flip(0)).square().mean()
        scaler.scale(loss * (1e8 if number == OVERFLOW else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert moved == (number != OVERFLOW), "a step that overflows is left out"
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses + scales


def test_autocast_with_a_gradient_scaler(device, memory_as_it_comes):
    torch.manual_seed(0)
    ours, theirs = Fused(), Separate()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)
    assert train(ours, device) == pytest.approx(train(theirs, device), rel=1e-2)
    for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert got.isfinite().all(), name
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


class Layers(nn.Module):
    """Layers with what a compiler fuses between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = syncbn.SyncBatchNormReLU(4), syncbn.SyncBatchNorm2d(4)
        self.norm1._force_sync = self.norm2._force_sync = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.norm1(2 * x, x.sin()).tanh())


@pytest.mark.filterwarnings("ignore")  # a compiler's advice differs with the GPU
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_equals_eager(device, mode, memory_as_it_comes):
    """reduce-overhead is CUDA graphs: a first run to warm up, a second to capture, and replays.

    On a CPU the program runs without inductor, with which test_compile.py has it.
    """
    if device == "cpu" and mode != "default":
        pytest.skip("a CPU has no graphs to capture")
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Layers().to(device)
    module = copy.deepcopy(eager)
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": mode}
    compiled = torch.compile(module, fullgraph=True, **how)
    for number in range(5):
        x, dy = torch.randn(2, 6, 4, 9, 5, generator=torch.Generator().manual_seed(number)).to(device)
        found = []
        for model in (compiled, eager):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            gradients = torch.autograd.grad(y, [leaf, *model.parameters()], dy)
            found.append([t.detach().clone() for t in (y, *gradients)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))


def run_program(device: str, *before: str) -> "subprocess.CompletedProcess[str]":
    """sanitized_program.py, by what is put before it; memory is taken from CUDA in pieces whose ends can be seen."""
    tests = Path(__file__).parent
    return subprocess.run(
        [*before, sys.executable, str(tests / "sanitized_program.py"), device],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_program_that_compute_sanitizer_watches():
    done = run_program("cpu")
    assert (done.returncode, done.stdout) == (0, "37 steps on cpu\n"), done.stderr[-2000:]


@needs_gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_compute_sanitizer_finds_nothing():
    # A call of CUDA that torch makes to be refused is no fault of a kernel.
    watched = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    done = run_program("cuda", *watched)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "37 steps on cuda" in done.stdout
