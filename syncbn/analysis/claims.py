"""A claim of the literature, what was measured of it, and whether it holds."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..doctor.finding import table


class Claim(NamedTuple):
    """One row."""

    text: str
    expected: str
    measured: str
    holds: bool

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "FAILS"


class Settings(NamedTuple):
    """How an experiment is run."""

    quick: bool  # fewer sizes and steps; the claims and their limits stay
    seeds: tuple[int, ...]
    track: Callable[[Sequence[Any], str], Iterable[Any]]  # shows progress over the items


class Outcome(NamedTuple):
    """What an experiment gives."""

    claims: list[Claim]
    notes: list[str]  # what of the literature is not to be taken literally
    draw: Callable[[Any], None]  # on a matplotlib Figure


def at_most(text: str, measured: float, limit: float) -> Claim:
    """A claim on a number; one that is not a number holds nothing."""
    return _compared(text, measured, "≤", limit, operator.le)


def at_least(text: str, measured: float, limit: float) -> Claim:
    return _compared(text, measured, "≥", limit, operator.ge)


def near(text: str, measured: float, expected: float, relative: float) -> Claim:
    """|measured/expected − 1| ≤ relative."""
    holds = abs(measured / expected - 1) <= relative
    return Claim(text, f"{expected:.4g} ± {100 * relative:g} %", f"{measured:.4g}", holds)


def _compared(text: str, measured: float, sign: str, limit: float, holds: Callable[[float, float], bool]) -> Claim:
    return Claim(text, f"{sign} {limit:.5g}", f"{measured:.5g}", bool(holds(measured, limit)))


def shown(outcome: Outcome) -> str:
    """The table of claims, then the notes."""
    rows = [("claim", "expected", "measured", "verdict")]
    rows += [(claim.text, claim.expected, claim.measured, claim.verdict) for claim in outcome.claims]
    return "\n".join([table(rows), *(f"note: {note}" for note in outcome.notes)])
