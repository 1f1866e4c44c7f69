"""How the kernels in Triton share out a tensor: tiles for the programs, programs for the device. Chosen by hand on an H200.

Requirements
    - the choice is static: ranks that tune would do so at different speeds, and others wait for them;
    - no program adds more than TILES tiles in float32, and what all of them leave is added by teams, not by the last one alone;
    - offsets are 64 bits wide where 32 do not reach.
"""

import functools
import math
from typing import NamedTuple

CHANNELS = 8  # of a tile of planes, if they are long enough
SHORT = 128  # values of a plane, at most
TILES = 256  # of a program, at most: what a lane adds in float32
TEAM = 16  # splits whose sums one program adds without a team
WIDE = 2**31 - 2**26  # values of which 32 bits reach the positions, those of a program's next tiles, past the end, included


class Share(NamedTuple):
    """How a function shares out a tensor."""

    tile: int  # values of a tile, at most
    row: int  # bytes of a tile that are one piece of a row of channels
    programs: int  # about, that share the tiles


def shares(s: int, itemsize: int) -> tuple[Share, Share]:
    """Of what adds and of what does not: no more programs than the multiprocessors of an H100 or H200 hold at once.

    One wave of programs: a second one would start when the first ends, and take as long to its first value and from its last.
    What programs of sums leave for the last one is less if there are few of them, and each has few channels; but short planes,
    of which a thread loads one value at a time, want many threads, and registers for few channels.
    """
    if s == 1:
        return Share(1024, 64, 528), Share(4096 // itemsize, 128, 924)
    if s <= SHORT:
        return Share(1024, 0, 924), Share(1024, 0, 924)
    return Share(2048, 0, 528), Share(4096 // itemsize, 0, 924)


class Tiles(NamedTuple):
    """How a tensor (N, C, S) is cut, for any N; the constants of a program, as tiles.py has them."""

    IS_ROWS: bool
    IS_WIDE: bool
    UNIT: int
    BLOCK_P: int
    BLOCK_C: int


def tiling(c: int, s: int, itemsize: int, is_wide: bool, share: Share) -> Tiles:
    """Static, so that all ranks compile the same. In small planes a thread has values, and so registers, of many channels."""
    channels, plane, tile = _power_of_2(c), _power_of_2(s), share.tile
    if s == 1:
        block_c = min(channels, share.row // itemsize, tile)
        return Tiles(True, is_wide, math.gcd(c, 16), tile // block_c, block_c)
    block_p = min(plane, max(tile // CHANNELS, tile // channels))
    values = tile if plane > tile // 16 else tile // 2
    return Tiles(False, is_wide, math.gcd(s, 16), block_p, min(channels, max(1, values // block_p), 256))


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


class Plan(NamedTuple):
    """The launch of a kernel over the tiles of a tensor."""

    numbers: tuple[int, int, int, int, int]  # N, C, S, tiles, splits
    cut: Tiles
    is_long: tuple[bool, bool]  # whether N and S take 64 bits
    grid: tuple[int, int, int]
    team: int  # splits, of which one program adds the sums
    counters: int  # of the programs that have arrived, one for each team and one for all teams, by block of channels
    partials: int  # float64 values of partial sums


class Plans(NamedTuple):
    """Of the functions that add and of those that do not."""

    sums: Plan
    elements: Plan


def planned(n: int, c: int, s: int, itemsize: int, share: Share) -> Plan:
    """Of a tensor (N, C, S) in memory; of one without a value N is 0 and S is 1."""
    cut = tiling(c, s, itemsize, n * c * s >= WIDE, share)
    blocks = -(-c // cut.BLOCK_C)
    tiles = -(-n // cut.BLOCK_P) if cut.IS_ROWS else n * -(-s // cut.BLOCK_P)
    splits = max(1, min(tiles, share.programs // blocks), -(-tiles // TILES))
    team = splits if splits <= TEAM else math.isqrt(splits - 1) + 1
    teams = -(-splits // team)
    counters, rows = (blocks * (1 + teams), splits + teams) if splits > 1 else (0, 0)
    return Plan((n, c, s, tiles, splits), cut, (n >= 2**31, s >= 2**31), (blocks * splits, 1, 1), team, counters, 2 * c * rows)


@functools.lru_cache(4096)
def of(n: int, c: int, s: int, itemsize: int) -> Plans:
    """Of a tensor (N, C, S) in memory, S = 1 where channels are its contiguous dimension; empty or not."""
    n, s = (n, s) if n * s else (0, 1)
    return Plans(*(planned(n, c, s, itemsize, share) for share in shares(s, itemsize)))
