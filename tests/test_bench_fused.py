"""`bench fused`: what it measures is checked, and what it reports is what was measured."""

import csv
from statistics import median

import pytest
import torch
from gpus import needs_gpu
from torch import nn

from syncbn import kernels
from syncbn.__main__ import main
from syncbn.bench import device_time, fused
from syncbn.bench.agreement import DisagreementError
from syncbn.bench.cases import Case

CASE = Case("channels_last", (4, 3, 5, 5), torch.float32, 1)
needs_library = pytest.mark.skipif(kernels.compiled() is None, reason="needs the compiled kernels")
CPU = torch.device("cpu")


class Wrong(nn.Module):
    """Batch norm and ReLU, off in one of the results."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.norm, self.what = CASE.layer(), what

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.what == "dx":
            x = x.lerp(x.detach(), 0.02)
        if self.what == "dresidual" and residual is not None:
            residual = residual.lerp(residual.detach(), 0.02)
        y = self.norm(x) + (0 if residual is None else residual)
        if self.what in ("dweight", "dbias"):
            vector = getattr(self.norm, self.what[1:])
            y = y + 5 * (vector - vector.detach()).view(1, -1, 1, 1)
        return y.relu() * (1.02 if self.what == "y" else 1)


@pytest.mark.parametrize("form", fused.FORMS)
def test_the_definition_agrees_with_torchs_modules(form):
    leaves = fused.leaves_of(CASE, form, CPU)
    errors = fused.require("torch", fused.Separate(CASE.layer()), CASE.layer(), leaves, torch.float32)
    assert list(errors) == ["y", "dx", *["dresidual"] * (form == "add relu"), "dweight", "dbias"]
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("what", ["y", "dx", "dresidual", "dweight", "dbias"])
def test_a_way_that_is_off_is_not_reported(what):
    leaves = fused.leaves_of(CASE, "add relu", CPU)
    with pytest.raises(DisagreementError, match=f"{what} is off"):
        fused.require("wrong", Wrong(what), CASE.layer(), leaves, torch.float32)


@needs_library
def test_a_row_for_each_way_and_form(tmp_path, capsys, monkeypatch):
    taken = []
    real = fused.interleaved
    monkeypatch.setattr(fused, "interleaved", lambda *args, **options: taken.append(real(*args, **options)) or taken[-1])
    options = ["--shapes", "256x64", "--dtypes", "float32", "bfloat16", "--threads", "1", "--repeats", "2"]
    assert main(["bench", "fused", *options, "--results", str(tmp_path)]) == 0
    with (tmp_path / "fused.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["form"] for row in rows} == set(fused.FORMS)
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        times = taken[rows.index(row) // 5]
        over = median(one / other for one, other in zip(times[row["way"]], times[fused.BASE], strict=True))
        assert float(row["ratio"]) == pytest.approx(over, abs=6e-4)
        assert float(row["microseconds_median"]) == pytest.approx(1e6 * median(times[row["way"]]), abs=0.06)
        assert float(row["ratio_lower_quartile"]) <= float(row["ratio"]) <= float(row["ratio_upper_quartile"])
        assert row["commit"]
    out = capsys.readouterr().out
    assert "syncbn, fused, ATen" in out
    assert "faster than separate" in out
    x = [float(row["peak_over_separate"]) for row in rows if row["way"] == "syncbn, fused"]
    assert max(x) < 1


@needs_library
def test_what_a_gpu_takes_is_timed_pass_by_pass(monkeypatch):
    """Its columns, by the clock of a CPU in place of events."""
    asked, taken = [], {}
    real = fused.layer_step.interleaved

    def interleaved(passes, repeats, device, clock):
        asked.append(list(passes))
        found = real(passes, repeats, CPU, device_time.clock(CPU))
        taken.update({name: one._replace(ahead=[True, False]) for name, one in found.items()})
        return taken

    monkeypatch.setattr(fused.layer_step, "interleaved", interleaved)
    monkeypatch.setattr(fused, "clock", lambda device: None)
    monkeypatch.setattr(fused, "peak", lambda step, device: 1)
    ways = {name: fused.WAYS[name] for name in (fused.BASE, "syncbn, fused")}

    class Cuda:
        type = "cuda"

    monkeypatch.setattr(fused, "leaves_of", lambda case, form, device, real=fused.leaves_of: real(case, form, CPU))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    found = fused.measure(CASE, "add relu", ways, 2, Cuda())
    assert asked == [list(ways)]
    for row in found:
        assert (row["host_ahead"], row["device"]) == (0.5, "cuda")
        over = median(one / other for one, other in zip(taken[row["way"]].device, taken[fused.BASE].device, strict=True))
        assert row["device_ratio"] == pytest.approx(over, abs=6e-4)
    assert "on the device" in fused.summary([row | {"heap": "as it is"} for row in found])


@needs_gpu
def test_on_a_gpu(tmp_path):
    assert main(["bench", "fused", "--device", "cuda", "--quick", "--repeats", "2", "--results", str(tmp_path)]) == 0
    assert "syncbn, fused" in (tmp_path / "fused_cuda.csv").read_text()
