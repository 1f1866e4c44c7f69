"""What the doctor has to say, and how it is laid out."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Value = TypeVar("Value", bound=Hashable)


class Finding(NamedTuple):
    """One line. Without advice all is well; a note is advice that changes no exit status."""

    text: str
    advice: str | None = None
    note: bool = False

    @property
    def bad(self) -> bool:
        return self.advice is not None and not self.note

    def __str__(self) -> str:
        mark = "BAD " if self.bad else "note" if self.note else "ok  "
        return f"{mark} {self.text}" + (f": {self.advice}" if self.advice else "")


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells in columns, the first of them the heading."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def by_rank(values: Sequence[Value]) -> dict[Value, list[int]]:
    """The ranks that have each value, by the first of them."""
    ranks: dict[Value, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks
