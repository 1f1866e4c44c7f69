"""The pictures of a GPU's benchmarks are drawn from rows alone."""

import itertools
from pathlib import Path
from unittest import mock

import pytest
from bench_files import read, write
from matplotlib.figure import Figure

from syncbn.__main__ import main
from syncbn.bench import draw_layer_cuda, draw_merge, plot, rows

pytestmark = pytest.mark.usefixtures("heap_as_it_is")
CIRCUMSTANCES = {
    "date": "2020-01-01",
    "hardware": "a made-up GPU",
    "driver": "0",
    "torch": "0",
    "triton": "0",
    "commit": "made up",
}


def invented(directory: Path, factor: float) -> None:
    """Rows that nobody measured, of both files."""
    speeds = {
        "torch": 0.6,
        "torch-inductor": 0.7,
        "torch-sync": 0.35,
        "torch-sync-unmasked": 0.4,
        "syncbn": 0.9,
        "syncbn-aten": 0.2,
    }
    found: list[dict[str, object]] = []
    for name, dtype, layout in itertools.product(speeds, ("float32", "bfloat16"), draw_layer_cuda.MARKERS):
        for number in range(4, 9):
            part = speeds[name] * (1 - 1 / (number - 2)) * factor
            over = "" if dtype == "bfloat16" and layout == "rows" else 0.3 / part
            row = {"variant": name, "backend": "cudnn" * (name == "torch"), "dtype": dtype, "layout": layout, "shape": number}
            row |= {
                "bytes": 3 * 10**number,
                "device": "cuda",
                "ranks": 8,
                "chain_over_torch_sync": over,
                "device_over_torch_sync": over,
                "host_ahead": 0 if name == "torch-sync" else 1,
            }
            found.append(row | {"forward_of_copy": part, "backward_of_copy": 0.9 * part})
    write(directory / "layer_cuda.csv", [*found, found[0] | {"variant": "copy"}], CIRCUMSTANCES)
    merges = []
    for name, channels, power in itertools.product(draw_merge.VARIANTS, (64, 512, 2048), range(3, 13)):
        micros = (2**power * channels**0.3 / 50 + 5) * factor if name.startswith("torch") else 4 * factor + len(name) - 6
        parts = zip(("lower_quartile", "median", "upper_quartile"), (0.9, 1, 1.2), strict=True)
        times = {f"device_microseconds_{part}": scale * micros for part, scale in parts}
        row = {"variant": name, "ranks": 2**power, "channels": channels, "device": "cuda"}
        merges.append(row | times | {"host_ahead": 0 if name == "torch-sync" else 1})
    write(directory / "merge.csv", merges, CIRCUMSTANCES)


def pictures(directory: Path) -> list[bytes]:
    assert main(["bench", "plot", "--results", str(directory)]) == 1, "the two of the CPU have no rows"
    return [(directory / name).read_bytes() for name in ("layer_cuda.png", "merge.png")]


def test_pictures_are_drawn_from_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "circumstances", mock.Mock(side_effect=AssertionError))
    invented(tmp_path, 1.0)
    first = pictures(tmp_path)
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert pictures(tmp_path) == first
    for name in ("layer_cuda", "merge"):
        invented(tmp_path, 1.0)
        kept = {path: path.read_text() for path in tmp_path.glob("*.csv") if path.stem != name}
        invented(tmp_path, 0.8)
        for path, text in kept.items():
            path.write_text(text)
        assert [one != other for one, other in zip(pictures(tmp_path), first, strict=True)] == [
            name == "layer_cuda",
            name == "merge",
        ]
    assert "to draw layer.png from" in capsys.readouterr().err


def test_no_point_lies_outside_of_its_picture(tmp_path):
    """Ratios on the device are tenths of those by the clock, on an axis that both share."""
    invented(tmp_path, 1.0)
    recorded = read(tmp_path / "layer_cuda.csv")
    for row in recorded:
        row["device_over_torch_sync"] = row["chain_over_torch_sync"] and str(0.1 * float(row["chain_over_torch_sync"]))
    figure = Figure()
    draw_layer_cuda.draw_layer_cuda(figure, recorded)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        values = [value for line in axes.get_lines() if line.get_marker() != "None" for value in line.get_ydata()]
        assert len(values) > 100
        assert low <= min(values) <= max(values) <= high


def test_pictures_say_whose_time_on_the_device_is_the_hosts(tmp_path):
    invented(tmp_path, 1.0)
    figure = Figure()
    draw_layer_cuda.draw_layer_cuda(figure, read(tmp_path / "layer_cuda.csv"))
    clock, device = (axes.get_title(loc="left") for axes in figure.axes[:2])
    assert device.endswith("in which the host is late with: operators of nn.SyncBatchNorm")
    assert "late" not in clock
    figure = Figure()
    draw_merge.draw_merge(figure, read(tmp_path / "merge.csv"))
    labels = {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines()}
    assert [style for label, style in labels.items() if label.endswith("the host is late")] == [":"]
    assert list(labels.values()).count("-") == 3


def test_without_a_gpus_rows_its_pictures_are_not_missed(tmp_path, capsys, monkeypatch):
    for name in ("draw_layer", "draw_scaling"):
        monkeypatch.setattr(plot, name, lambda figure, *tables: None)
    for name in ("layer", "scaling_projection", "scaling_efficiency"):
        write(tmp_path / f"{name}.csv", [dict.fromkeys({*plot.LAYER, *plot.LATENCY, *plot.EFFICIENCY}, "1")], CIRCUMSTANCES)
    assert main(["bench", "plot", "--results", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["layer.png", "scaling.png"]
    assert "to draw merge.png from; expected some: record them on a GPU" in capsys.readouterr().err
