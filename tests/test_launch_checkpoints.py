"""Checkpoints of launch/: one that cannot be used or written is named before the first step, and the one before is left."""

import os
import pickle
import re
import resource
import signal
import sys
from pathlib import Path

import checkpoint
import data
import loop
import pytest
import torch
import torch.distributed as dist
import train
import worlds
from launched import OPTIONS, alone


def test_what_is_wrong_with_the_settings_of_a_checkpoint():
    assert checkpoint.difference({"seed": 0}, {"seed": 0}) is None
    assert checkpoint.difference(None, {"seed": 0}) == f"which another program wrote. {checkpoint.ADVICE}"
    of_another = f"of a run with {{'seed': 1}}, where this one has {{'seed': 0}}. {checkpoint.ADVICE}"
    assert checkpoint.difference({"seed": 1, "bn": "local"}, {"seed": 0, "bn": "local"}) == of_another
    of_before = f"of a run with {{}}, where this one has {{'bn': 'local'}}. {checkpoint.ADVICE}"
    assert checkpoint.difference({"seed": 0}, {"seed": 0, "bn": "local"}) == of_before
    assert checkpoint.difference([0], {"seed": 0}) == checkpoint.difference(None, {"seed": 0})


def test_images_of_another_size_or_other_classes_are_another_run(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").touch()
    options = train.arguments().parse_args([])
    sixteen = train.settings(options, data.open(tmp_path, 16))
    problem = checkpoint.difference(sixteen, train.settings(options, data.open(tmp_path, 32)))
    assert problem.startswith("of a run with {'shape': (3, 16, 16)}, where this one has {'shape': (3, 32, 32)}. ")
    (tmp_path / "dog").rename(tmp_path / "cow")
    problem = checkpoint.difference(sixteen, train.settings(options, data.open(tmp_path, 16)))
    assert problem.startswith("of a run with {'classes': ('cat', 'dog')}, where this one has {'classes': ('cat', 'cow')}. ")


def test_a_checkpoint_in_no_folder_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(checkpoint.CheckpointError, match=r"given .*none/run.pt, in a folder that is not there; expected one"):
        alone("--checkpoint", tmp_path / "none" / "run.pt")


@pytest.mark.parametrize("kind", ["long name", "folder beside it", "folder"])
def test_a_checkpoint_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loop, "train_step", None)
    path = tmp_path / {"long name": 252 * "a", "folder beside it": "run.pt", "folder": "."}[kind]
    expected = r"which cannot be written \((OSError|IsADirectoryError): .*\.part'\); expected a place for it and"
    if kind == "folder beside it":
        (tmp_path / "run.pt.part").mkdir()
    if kind == "folder":
        expected = "which is a folder; expected a file"
    with pytest.raises(checkpoint.CheckpointError, match=rf"^given {path}, {expected}"):
        alone("--checkpoint", path)


def _no_room(world, directory: str):
    """Rank 0 meets what torch.save makes of a full disk."""
    made = _made(Path(directory, "run.pt"), 1.0)._replace(rank=world.rank)
    made.save(checkpoint.Progress(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        made.save(checkpoint.Progress(2))
    except checkpoint.CheckpointError as error:
        return str(error)
    return "no error"


def test_every_rank_is_told_that_a_checkpoint_could_not_be_written(tmp_path):
    for message in worlds.run_fresh(2, _no_room, str(tmp_path), timeout=60):
        expected = rf"given {tmp_path}/run.pt, which cannot be written \(OSError: .*File too large\); expected a place for it"
        assert re.match(expected, message), message
    assert _made(tmp_path / "run.pt", 0.0).restore() == checkpoint.Progress(1), "the one before is left"


class _Runs:
    def __reduce__(self):
        return len, ("",)


def _damaged(kind: str, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other program":
        torch.save({"model": {}}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(_Runs(), protocol=2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"truncated or not a checkpoint \(RuntimeError: "),
        ("empty", r"truncated or not a checkpoint \(EOFError: "),
        ("other program", "which another program wrote"),
        ("code", r"truncated or not a checkpoint \(UnpicklingError: "),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_kept(tmp_path, monkeypatch, kind, message):
    path = tmp_path / "run.pt"
    alone("--checkpoint", path, "--steps=1")
    _damaged(kind, path)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", *OPTIONS, f"--checkpoint={path}"])
    with pytest.raises(SystemExit, match=rf"^train.py: given .*run.pt, {message}.*\. The file is left as it is: move it away"):
        train.main()
    assert not dist.is_initialized(), "an error of every rank: the way out is as ever"
    assert path.read_bytes() == before


def _made(path: Path, value: float) -> checkpoint.Checkpoint:
    network = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(network.weight, value)
    return checkpoint.Checkpoint(path, {}, network, torch.optim.SGD(network.parameters(), 0.1), 0)


@pytest.mark.parametrize("killed_in", ["save", "fsync", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, killed_in):
    path = tmp_path / "run.pt"
    _made(path, 1.0).save(checkpoint.Progress(1))

    def half(state, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    def killed(*_) -> None:
        raise KeyboardInterrupt

    place = {"save": (torch, half), "fsync": (os, killed), "replace": (Path, killed)}[killed_in]
    monkeypatch.setattr(place[0], killed_in, place[1])
    with pytest.raises(KeyboardInterrupt):
        _made(path, 2.0).save(checkpoint.Progress(2))
    monkeypatch.undo()
    later = _made(path, 0.0)
    assert later.restore() == checkpoint.Progress(1)
    assert later.network.weight.tolist() == [[1.0, 1.0]]
    _made(path, 3.0).save(checkpoint.Progress(3))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (seen.append("replace"), replace(old, new)))
    _made(tmp_path / "run.pt", 1.0).save(checkpoint.Progress())
    assert seen == [str(tmp_path / "run.pt.part"), "replace", str(tmp_path)]
