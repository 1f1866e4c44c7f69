"""What the programs of programs.py have in common: where a tile lies, sums over programs, and a channel's coefficients.

Legend: a tensor (N, C, S) in memory has planes of S values, or rows of C values where channels are contiguous (S = 1). A tile
is BLOCK_P positions, values of one plane or rows, of BLOCK_C channels. `splits` programs share those of a block of channels.
(C,) coefficients are float64, and float32 where they meet values.
"""

import triton
import triton.language as tl

SAMPLES = tl.constexpr(16)  # of the pivot; twice as many take as many registers as all the rest
MERGED = tl.constexpr(512)  # values of the splits of a sum that are read at a time: one by one, each would wait for memory


@triton.jit
def sizes(n, c, s, IS_ROWS: tl.constexpr, IS_WIDE: tl.constexpr, UNIT: tl.constexpr):
    """N, C and S. UNIT divides C where channels are contiguous, else S: the compiler learns it here, and can load as wide."""
    if IS_WIDE:
        n = n.to(tl.int64)
    if IS_ROWS:
        c = c // UNIT * UNIT
    else:
        s = s // UNIT * UNIT
    return n, c, s


@triton.jit
def place(c, BLOCK_C: tl.constexpr):
    """This program's split, its block of channels, and the channels (BLOCK_C,)."""
    blocks = tl.cdiv(c, BLOCK_C)
    block = tl.program_id(0) % blocks
    return tl.program_id(0) // blocks, block, block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tile(
    t,  # number of the tile
    channel,  # (BLOCK_C,)
    n,
    c,
    s,
    IS_ROWS: tl.constexpr,
    IS_WIDE: tl.constexpr,  # offsets are of 64 bits
    BLOCK_P: tl.constexpr,
):
    """Offsets and mask (BLOCK_P, BLOCK_C) of a tile; past the last one nothing is valid.

    Before the first one, of which loops that go back ask ahead, the mask is not to be trusted: loads ahead have the loop's own.
    """
    lane = tl.arange(0, BLOCK_P)
    if IS_WIDE:
        channel, lane = channel.to(tl.int64), lane.to(tl.int64)
        t = lane * 0 + t
    if IS_ROWS:
        position = t * BLOCK_P + lane
        valid = position < n
        offset = (position * c)[:, None] + channel[None, :]
    else:
        parts = tl.cdiv(s, BLOCK_P)  # of a plane
        position = t % parts * BLOCK_P + lane
        valid = position < tl.where(t // parts < n, s, 0)
        offset = (t // parts * c * s + position)[:, None] + (channel * s)[None, :]
    return offset, valid[:, None] & (channel < c)[None, :]


@triton.jit
def pivot_of(x, channel, n, c, s, IS_ROWS: tl.constexpr, IS_WIDE: tl.constexpr):
    """(BLOCK_C,) mean of some values spread over the share; 0 where it is not finite.

    One out of each equal part, each at another place of its part: that may be an image, and its corner blank in all images.
    """
    j, positions = tl.arange(0, SAMPLES), n * s
    if IS_WIDE:
        channel, j = channel.to(tl.int64), j.to(tl.int64)
    count = tl.minimum(positions, SAMPLES)
    step = positions // tl.maximum(count, 1)
    position = j * step + (j * 5 + 3) % SAMPLES * step // (SAMPLES + 1)
    if IS_ROWS:
        offset = (position * c)[:, None] + channel[None, :]
    else:
        offset = (position // s * c * s + position % s)[:, None] + (channel * s)[None, :]
    valid = (j < count)[:, None] & (channel < c)[None, :]
    mean = tl.sum(tl.load(x + offset, mask=valid, other=0.0).to(tl.float32), 0) / tl.maximum(count, 1)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def total(partials, first, last, channel, c):
    """The sums (BLOCK_C,) float64 of the rows from `first` up to `last` of partials (rows, 2, C), in their order."""
    at_once: tl.constexpr = MERGED // channel.shape[0]
    firsts = tl.zeros([at_once, channel.shape[0]], tl.float64)
    seconds = tl.zeros([at_once, channel.shape[0]], tl.float64)
    for k in range(first, last, at_once):  # past the nearest cache, which may hold a line from before
        its = k + tl.arange(0, at_once)
        theirs = partials + (its * 2 * c)[:, None] + channel[None, :]
        there = (its < last)[:, None] & (channel < c)[None, :]
        firsts += tl.load(theirs, mask=there, other=0.0, cache_modifier=".cg")
        seconds += tl.load(theirs + c, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(firsts, 0), tl.sum(seconds, 0)


@triton.jit
def arrive(first, second, partials, row, counter, expected, channel, c):
    """Leave the sums (BLOCK_C,) in a row of the partials; whether this program is the last of those expected to do so."""
    mine = partials + row * 2 * c + channel
    tl.store(mine, first, mask=channel < c)
    tl.store(mine + c, second, mask=channel < c)
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1) == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merge(first, second, partials, arrived, part, block, channel, c, splits, team):
    """The sums (BLOCK_C,) float64 of all splits, and whether this program is the one that has them: the last to come.

    Splits are added by teams, then the teams' sums: by one program alone, all would be a long wait for memory.
    """
    teams = tl.cdiv(splits, team)
    mine = part // team
    counters = arrived + block * (1 + teams)
    row, counter = part, counters + 1 + mine
    start, stop = mine * team, tl.minimum(mine * team + team, splits)
    last = part >= 0
    level, levels = teams * 0, tl.where(teams > 1, 2, tl.where(splits > 1, 1, 0))
    while level < levels:  # one piece of code for both: it is fetched from memory while everything waits for it
        last = arrive(first, second, partials, row, counter, stop - start, channel, c)
        if last:
            first, second = total(partials, start, stop, channel, c)
        level = tl.where(last, level + 1, levels)
        row, counter = splits + mine, counters
        start, stop = splits, splits + teams
    return first, second, last


@triton.jit
def parameter(vector, channel, c, otherwise):
    """(BLOCK_C,) float64 of a vector (C,), or `otherwise` where there is none."""
    if vector is None:
        values = tl.zeros_like(channel).to(tl.float64) + otherwise
    else:
        values = tl.load(vector + channel, mask=channel < c, other=0.0).to(tl.float64)
    return values


@triton.jit
def once(vector):
    """The vector (BLOCK_C,) as it is, each value computed by one thread and given to those that need it.

    Else each thread computes, in float64, all the channels of which it has values.
    """
    return tl.gather(vector, tl.arange(0, vector.shape[0]), 0)


# Where a ReLU goes by x, it has to pass in backward what it passed in forward, to the bit, in programs that are compiled apart.
# So all take the next two functions, in which every fused multiply-add is named: what to round is not the compiler's choice.


@triton.jit
def coefficients(mean, invstd, gamma, beta):
    """hi and shift (BLOCK_C,) float32, lo and scale float64: the mean is hi + lo, γ·x̂ + β is (x − hi)·scale + shift."""
    hi = mean.to(tl.float32)
    lo = mean - hi.to(tl.float64)
    scale = invstd * gamma
    return hi, lo, scale, tl.fma(-scale, lo, beta).to(tl.float32)


@triton.jit
def apply(value, hi, scale, shift):
    """(value − hi)·scale + shift of a tile (BLOCK_P, BLOCK_C), all of float32."""
    return tl.fma(value - hi[None, :], scale[None, :], shift[None, :])


@triton.jit
def passed(value, y):
    """The value where a ReLU passed y. It passes what is no number, as torch's does; tl.maximum would not."""
    return tl.where(y.to(tl.float32) <= 0, 0.0, value)


@triton.jit
def move(running, channel, old, value, factor, moves):
    """Move a running statistic (C,) towards `value` (BLOCK_C,) where `moves`."""
    new = (1 - factor) * old + factor * value
    if running.dtype.element_ty != tl.float64:
        new = new.to(tl.float32)
    tl.store(running + channel, new, mask=moves)
