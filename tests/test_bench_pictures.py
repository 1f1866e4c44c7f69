"""The pictures of the CPU's benchmarks are drawn from rows alone."""

from pathlib import Path
from unittest import mock

import pytest
from bench_files import write
from matplotlib.figure import Figure

from syncbn.__main__ import main
from syncbn.bench import plot, processes, rows, timing
from syncbn.bench.draw_layer import draw_layer
from syncbn.bench.draw_scaling import draw_scaling

pytestmark = pytest.mark.usefixtures("heap_as_it_is")
CIRCUMSTANCES = {"date": "2020-01-01", "hardware": "a machine", "python": "3", "torch": "2", "commit": "c", "command": "x"}


def invented(directory: Path, ratio: float) -> None:
    """Rows of all files that pictures are drawn from, which nobody measured."""
    of = {"dtype": "float32", "shape": "8x64x7x7", "threads": 1, "device": "cpu", "ratio": ratio}
    of |= {"ratio_lower_quartile": 0.4, "ratio_upper_quartile": 0.9}
    layouts = ("contiguous", "channels_last", "rows")
    write(
        directory / "layer.csv",
        [{"variant": name, "layout": layout} | of for name in ("torch", "syncbn") for layout in layouts],
        CIRCUMSTANCES,
    )
    times = {"bytes": 8200, "microseconds": 10 * ratio, "microseconds_lower": 9 * ratio, "microseconds_upper": 11 * ratio}
    kinds = ("measured", "published", "modelled")
    point = {"machine": "NCCL", "operation": "all_reduce", "ranks": 8} | times | {"note": "n"}
    write(directory / "scaling_projection.csv", [{"kind": kind} | point for kind in kinds], CIRCUMSTANCES)
    assumed = {
        "node_size": 8,
        "images_per_rank": 32,
        "image_microseconds": 1,
        "floor_milliseconds": 1,
        "bandwidth_gb_per_second": 1,
    }
    efficient = [
        {"kind": "modelled", "scaling": scaling, "scheme": scheme, "ranks": ranks, "efficiency": ratio / ranks} | assumed
        for scaling in ("weak", "strong")
        for scheme in ("all_reduce", "all_gather forward", "all_reduce in a node")
        for ranks in (1, 2)
    ]
    write(directory / "scaling_efficiency.csv", efficient, CIRCUMSTANCES)


def pictures(directory: Path) -> list[bytes]:
    assert main(["bench", "plot", "--results", str(directory)]) == 0
    return [(directory / name).read_bytes() for name in ("layer.png", "scaling.png")]


def test_pictures_are_drawn_from_the_rows_and_nothing_else(tmp_path, monkeypatch):
    """The same rows, the same picture; other rows, another; and nothing is measured or asked of the machine."""
    for module, name in ((timing, "timed"), (processes, "run"), (rows, "circumstances"), (rows, "hardware")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=AssertionError(name)))
    invented(tmp_path, 0.5)
    first = pictures(tmp_path)
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert pictures(tmp_path) == first
    for name in ("layer", "scaling_projection", "scaling_efficiency"):
        invented(tmp_path, 0.5)
        kept = {path: path.read_text() for path in tmp_path.glob("*.csv") if path.stem != name}
        invented(tmp_path, 0.7)
        for path, text in kept.items():
            path.write_text(text)
        assert [one != other for one, other in zip(pictures(tmp_path), first, strict=True)] == [
            name == "layer",
            name != "layer",
        ]


def test_rows_of_other_hardware_and_older_ones_are_not_drawn():
    old, other, new, another = (
        {"key": key, "hardware": hardware, "ratio": ratio}
        for key, hardware, ratio in (("k", "a", "1"), ("k", "b", "2"), ("k", "a", "3"), ("l", "a", "4"))
    )
    assert plot.latest([old, other, new, another], ["key"], None) == [new, another]
    assert plot.latest([old, other, new, another], ["key"], "b") == [other]
    assert plot.latest([], ["key"], None) == []


@pytest.mark.parametrize("name", ["layer", "scaling"])
def test_a_picture_names_all_commits_of_what_it_shows(name, tmp_path):
    invented(tmp_path, 0.5)
    tables = [rows.read(table, tmp_path) for table in {"layer": ["layer"], "scaling": ["scaling_projection"]}[name]]
    tables[0][0] |= {"date": "2019-12-31", "commit": "older"}
    figure = Figure()
    if name == "layer":
        draw_layer(figure, *tables)
    else:
        draw_scaling(figure, *tables, rows.read("scaling_efficiency", tmp_path))
    assert "a machine, torch 2, 2019-12-31 and 2020-01-01, commit older and c; " in figure.get_suptitle()
