"""The images that the programs of launch/ train on, and their order.

The order is a function of seed, epoch and step alone: a run that goes on from a checkpoint, on any number of processes, sees
the batches that it would have seen.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
Numbers: TypeAlias = np.ndarray  # of samples, int64
Sample: TypeAlias = tuple[Tensor, int]  # (C, H, W) float32 from 0 to 1, the number of its class


class Digits(Dataset[Sample]):
    """scikit-learn's 1797 handwritten digits."""

    shape, classes, names = (1, 8, 8), 10, tuple("0123456789")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.labels = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.labels[index]


class Folder(Dataset[Sample]):
    """Images of a folder with one subfolder per class, read when asked for and scaled to a square."""

    def __init__(self, folder: Path, size: int) -> None:
        folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        self.samples = [
            (path, label)
            for label, of_class in enumerate(folders)
            for path in sorted(of_class.rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if len(self.samples) < 5:
            raise SystemExit(
                f"given --data {folder} with {len(folders)} subfolders and {len(self.samples)} images; expected one subfolder "
                f"of images ({', '.join(sorted(SUFFIXES))}) for each class, and 5 images or more"
            )
        self.shape, self.classes, self.names = (3, size, size), len(folders), tuple(of_class.name for of_class in folders)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB").resize(self.shape[1:]), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, label


Images: TypeAlias = Digits | Folder


def open(folder: Path | None, size: int) -> Images:
    """The images of a folder, scaled to squares of this size; without one the digits."""
    return Digits() if folder is None else Folder(folder, size)


def split(samples: int, seed: int) -> tuple[Numbers, Numbers]:
    """The numbers of the samples to train on, and of the fifth that is held out."""
    order = np.random.default_rng(seed).permutation(samples)
    return order[samples // 5 :], order[: samples // 5]


def shuffled(numbers: Numbers, seed: int, epoch: int) -> Numbers:
    return np.random.default_rng([seed, epoch]).permutation(numbers)


class Batches:
    """This rank's share of each batch, (n, C, H, W) and (n,), and how many samples all ranks have together."""

    def __init__(
        self,
        images: Images,
        numbers: Numbers,  # in order
        size: int,  # of a batch of all ranks
        rank: int,
        world_size: int,
        first: int = 0,  # the batch to begin with
        workers: int = 0,  # processes that read ahead
    ) -> None:
        self.first = first
        self.whole = [numbers[start : start + size] for start in range(first * size, len(numbers), size)]
        shares = [np.array_split(batch, world_size)[rank].tolist() for batch in self.whole]
        collate = functools.partial(_stack, images.shape)
        self.loader = DataLoader(images, batch_sampler=shares, collate_fn=collate, num_workers=workers)

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        return ((x, labels, len(batch)) for (x, labels), batch in zip(self.loader, self.whole, strict=True))


def _stack(shape: tuple[int, ...], samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """A share may be empty: the last batch of an epoch can have fewer samples than there are ranks."""
    images = [image for image, _ in samples]
    return torch.stack(images) if images else torch.zeros(0, *shape), torch.tensor([label for _, label in samples]).long()
