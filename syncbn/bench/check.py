"""`bench layer --check`: ratios of this run beside those recorded on the same hardware and torch.

A single small shape is off by a fifth now and then; the geometric mean over the shapes of a dtype, layout and number of threads
is not. So means decide, and single cases are told.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .peers import TORCH
from .timing import geometric_mean

LIMIT = 1.2  # of the recorded ratio
SAME = ("variant", "dtype", "layout", "shape", "threads", "device", "hardware", "torch")
GROUP = ("variant", "dtype", "layout", "threads")


def report(measured: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, str]], here: Mapping[str, str]) -> int:
    """Print how far ratios moved; 0 if no mean grew past the limit, 1 if one did, 2 where nothing recorded matches."""
    last = {_key(row): float(row["ratio"]) for row in recorded if all(name in row for name in (*SAME, "ratio"))}
    changes: dict[tuple[str, ...], list[float]] = {}
    for row in measured:
        whole = {**row, "hardware": here["hardware"], "torch": here["torch"]}
        before = last.get(_key(whole))
        if before is None or row["variant"] == TORCH:
            continue
        change = row["ratio"] / before
        changes.setdefault(tuple(str(row[name]) for name in GROUP), []).append(change)
        if change > LIMIT:
            print(f"note {', '.join(str(row[name]) for name in SAME[:5])}: ratio {row['ratio']:.2f}, recorded {before:.2f}")
    if not changes:
        print(f"no recorded row matches: hardware {here['hardware']}, torch {here['torch']}; record some without --check")
        return 2
    worse = 0
    for group, factors in changes.items():
        mean = geometric_mean(factors)
        worse += mean > LIMIT
        print(f"{'BAD ' if mean > LIMIT else 'ok  '} {', '.join(group)}: {mean:.2f} times the recorded ratio")
    print(f"{worse} of {len(changes)} grew past {LIMIT:g} times what was recorded" if worse else "no ratio grew past the limit")
    return 1 if worse else 0


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in SAME)
