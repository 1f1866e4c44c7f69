"""What the programs of launch/ are given: options, variables of torchrun, images."""

import re
import sys

import data
import numpy as np
import pytest
import torch
import train
from launched import LAUNCH, alone, start

WRONG = {
    "--steps=0": "given '0'; expected a whole number, 1 or more",
    "--epochs=0": "given '0'; expected a whole number, 1 or more",
    "--batch-size=-3": "given '-3'; expected a whole number, 1 or more",
    "--batch-size=0": "given '0'; expected a whole number, 1 or more",
    "--checkpoint-every=0": "given '0'; expected a whole number, 1 or more",
    "--image-size=0": "given '0'; expected a whole number, 1 or more",
    "--workers=-1": "given '-1'; expected a whole number, 0 or more",
    "--seed=-1": "given '-1'; expected a whole number, from 0 to 18446744073709551615",
    "--seed=18446744073709551616": "given '18446744073709551616'; expected a whole number, from 0 to 18446744073709551615",
    "--learning-rate=nan": "given 'nan'; expected a number above 0",
    "--timeout=0": "given '0'; expected a number above 0, 1e+09 at most",
    "--timeout=1e15": "given '1e15'; expected a number above 0, 1e+09 at most",
    "--bn=torch": "given 'torch' without a GPU; expected local or syncbn",
}


@pytest.mark.parametrize("option", WRONG)
def test_an_option_that_cannot_be_is_an_error_of_one_line(option, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        train.arguments().parse_args([option])
    assert ended.value.code == 2
    name = option.split("=")[0]
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {name}: {WRONG[option]}")


def test_the_largest_seed_and_timeout_train():
    told = start(sys.executable, LAUNCH / "train.py", f"--seed={2**64 - 1}", "--timeout=1e9", "--steps=1")
    assert re.search(r"^accuracy on held-out images: 0\.\d+$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK without LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK='x'"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE='abc'"),
    ],
)
def test_a_variable_that_is_no_number_is_an_error_of_one_line(variables, given, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match=rf"^given {given} in the environment; expected a whole number, as torchrun gives$"):
        train.main()


def test_torchs_synchronized_batch_norm_needs_a_gpu_for_each_process(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus in (2, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert train.arguments().parse_args(["--bn=torch"]).bn == "torch"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.arguments().parse_args(["--bn=local"]).bn == "local"
    with pytest.raises(SystemExit) as ended:
        train.arguments().parse_args(["--bn=torch"])
    assert ended.value.code == 2
    expected = (
        "argument --bn: given 'torch' with 1 GPU for 2 processes of this machine; expected one for each, or local or syncbn"
    )
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


def test_shares_make_up_the_batches_of_the_seed_and_the_epoch():
    images = data.Digits()
    numbers, held_out = data.split(len(images), 0)
    assert sorted([*numbers, *held_out]) == list(range(1797))
    assert len(held_out) == 359
    order = data.shuffled(numbers, 0, 0)
    assert sorted(order) == sorted(numbers)
    others = [data.shuffled(numbers, *key) for key in ((0, 1), (1, 0))]
    assert not any(np.array_equal(order, other) for other in others)
    assert not np.array_equal(*others)
    assert np.array_equal(order, data.shuffled(numbers, 0, 0))
    shares = [list(data.Batches(images, order[:10], 8, rank, 3)) for rank in range(3)]
    assert [[len(x) for x, _, _ in share] for share in shares] == [[3, 1], [3, 1], [2, 0]]
    for batch, parts in zip((order[:8], order[8:10]), zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([x for x, _, _ in parts]), images.images[batch])
        assert torch.cat([labels for _, labels, _ in parts]).tolist() == [images.labels[index] for index in batch]
        assert {samples for _, _, samples in parts} == {len(batch)}
    ((x, _, _),) = data.Batches(images, order[:10], 8, 0, 3, first=1)
    assert torch.equal(x, shares[0][1][0])


def test_a_folder_of_images(tmp_path, capsys):
    pil = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for name, color in (("blue", (20, 20, 220)), ("green", (20, 220, 20)), ("red", (220, 20, 20))):
        (tmp_path / "photos" / name / "more").mkdir(parents=True)
        for number in range(10):
            noise = generator.integers(-20, 20, (6 + number, 9, 3))
            image = pil.fromarray((np.array(color) + noise).astype(np.uint8))
            image.save(tmp_path / "photos" / name / ("more" if number % 2 else ".") / f"{number}.png")
        (tmp_path / "photos" / name / "notes.txt").write_text("no image")
    images = data.open(tmp_path / "photos", 8)
    assert (len(images), images.classes, images.shape) == (30, 3, (3, 8, 8))
    x, label = images[0]
    assert label == 0
    assert x.shape == (3, 8, 8)
    assert x.mean((1, 2)).tolist() == pytest.approx([20 / 255, 20 / 255, 220 / 255], abs=0.03)
    alone("--data", tmp_path / "photos", "--image-size=8", "--batch-size=7", "--epochs=8", "--workers=1")
    assert capsys.readouterr().out.endswith("accuracy on held-out images: 1.000\n")


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_without_images(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "empty":
        (folder / "class").mkdir(parents=True)
    with pytest.raises(
        SystemExit, match=rf"given --data .*{kind} with {int(kind == 'empty')} subfolders and 0 images; expected one"
    ):
        data.open(folder, 8)


@pytest.mark.parametrize("option", ["--bn=torch", "--checkpoint-every=7"])
def test_lightning_takes_no_option_that_it_would_not_follow(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.arguments(for_lightning=True).parse_args([option])
    assert re.search(rf"error: .*{option.split('=')[0]}", capsys.readouterr().err)
