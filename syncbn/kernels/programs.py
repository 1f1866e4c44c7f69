"""The programs of kernels/triton.py: what runs on the device.

Legend: a tile is BLOCK_P positions of BLOCK_C channels of a tensor (N, C, S) in memory. A position is a row where channels are
contiguous (S = 1), and else a value of a plane; `positions` is N·S. `splits` programs share a sum, BLOCKS blocks of channels
are beside each other. (C,) coefficients are float64, and float32 where they meet values.

Nothing is compiled for one size of the batch: that of a last, smaller batch would be compiled for while other ranks wait. C and
S are looked at: loads can be wide where 16 divides them.
"""

import triton
import triton.language as tl

SAMPLES = tl.constexpr(32)  # of the pivot
MERGED = tl.constexpr(16)  # splits of a sum that are read at a time: one by one, each would wait for memory
ROWS, PLANES, SHORT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how tiles lie: see tile
BY_BATCH = ["n", "tiles", "splits"]  # numbers of which no program is compiled for a value


@triton.jit
def count_positions(n, s, IS_WIDE: tl.constexpr):
    """N·S, which the compiler knows 16 to divide where it divides S."""
    if IS_WIDE:
        n = n.to(tl.int64)
    return n * s


@triton.jit
def tile(
    t,  # number of the tile
    channel,  # (BLOCK_C,)
    positions,
    c,
    s,
    KIND: tl.constexpr,  # ROWS: s = 1; PLANES: a tile is in one plane; SHORT: it goes through several
    IS_WIDE: tl.constexpr,  # offsets are of 64 bits
    BLOCK_P: tl.constexpr,
):
    """Offsets and mask (BLOCK_P, BLOCK_C) of a tile."""
    lane = tl.arange(0, BLOCK_P)
    if IS_WIDE:
        channel, lane = channel.to(tl.int64), lane.to(tl.int64)
        t = lane * 0 + t
    if KIND == PLANES:
        tiles = tl.cdiv(s, BLOCK_P)
        within = t % tiles * BLOCK_P + lane
        valid = within < s
        offset = ((t // tiles) * c * s + within)[:, None] + (channel * s)[None, :]
    else:
        position = t * BLOCK_P + lane
        valid = position < positions
        if KIND == ROWS:
            offset = (position * c)[:, None] + channel[None, :]
        else:
            offset = (position // s * c * s + position % s)[:, None] + (channel * s)[None, :]
    return offset, valid[:, None] & (channel < c)[None, :]


@triton.jit
def pivot_of(x, channel, positions, c, s, IS_WIDE: tl.constexpr):
    """(BLOCK_C,) mean of some values spread over the share; 0 where it is not finite."""
    j = tl.arange(0, SAMPLES)
    if IS_WIDE:
        channel, j = channel.to(tl.int64), j.to(tl.int64)
    count = tl.minimum(positions, SAMPLES)
    position = j * (positions // tl.maximum(count, 1))
    offset = (position // s * c * s + position % s)[:, None] + (channel * s)[None, :]
    valid = (j < count)[:, None] & (channel < c)[None, :]
    mean = tl.sum(tl.load(x + offset, mask=valid, other=0.0).to(tl.float32), 0) / tl.maximum(count, 1)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def merge(first, second, partials, arrived, channel, c, splits, BLOCKS: tl.constexpr):
    """The sums (BLOCK_C,) float64 of all splits, and whether this program is the one that has them: the last to come."""
    last = tl.program_id(0) >= 0
    if splits > 1:
        block, part, valid = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS, channel < c
        mine = partials + part * 2 * c + channel
        tl.store(mine, first, mask=valid)
        tl.store(mine + c, second, mask=valid)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + block, 1) == splits - 1
        if last:
            firsts = tl.zeros([MERGED, channel.shape[0]], tl.float64)
            seconds = tl.zeros([MERGED, channel.shape[0]], tl.float64)
            for k in range(0, splits, MERGED):  # past the nearest cache, which may hold a line from before
                its = k + tl.arange(0, MERGED)
                theirs = partials + (its * 2 * c)[:, None] + channel[None, :]
                there = (its < splits)[:, None] & valid[None, :]
                firsts += tl.load(theirs, mask=there, other=0.0, cache_modifier=".cg")
                seconds += tl.load(theirs + c, mask=there, other=0.0, cache_modifier=".cg")
            first, second = tl.sum(firsts, 0), tl.sum(seconds, 0)
            tl.store(arrived + block, 0)
    return first, second, last


@triton.jit
def parameter(vector, channel, c, otherwise):
    """(BLOCK_C,) float64 of a vector (C,), or `otherwise` where there is none."""
    if vector is None:
        values = tl.zeros_like(channel).to(tl.float64) + otherwise
    else:
        values = tl.load(vector + channel, mask=channel < c, other=0.0).to(tl.float64)
    return values


# Where a ReLU goes by x, it has to pass in backward what it passed in forward, to the bit, in programs that are compiled apart.
# So all take the next two functions, in which every fused multiply-add is named: what to round is not the compiler's choice.


@triton.jit
def coefficients(mean, invstd, weight, bias, channel, c):
    """The mean (BLOCK_C,) float64 as a pair of float32, and float64 scale and shift: γ·x̂ + β = (x − hi)·scale + shift."""
    hi = mean.to(tl.float32)
    lo = mean - hi.to(tl.float64)
    scale = invstd * parameter(weight, channel, c, 1.0)
    return hi, lo.to(tl.float32), scale, tl.fma(-scale, lo, parameter(bias, channel, c, 0.0))


@triton.jit
def apply(value, hi, scale, shift):
    """(value − hi)·scale + shift of a tile (BLOCK_P, BLOCK_C) of float32."""
    return tl.fma(value - hi[None, :], scale.to(tl.float32)[None, :], shift.to(tl.float32)[None, :])


@triton.jit
def passed(value, y):
    """The value where a ReLU passed y. It passes what is no number, as torch's does; tl.maximum would not."""
    return tl.where(y.to(tl.float32) <= 0, 0.0, value)


@triton.jit(do_not_specialize=BY_BATCH)
def moments(
    x,  # (N, C, S) in memory
    message,  # (2C+1,) float64
    partials,  # (splits, 2, C) float64
    arrived,  # (BLOCKS,) int32, 0 before and after
    n,
    c,
    s,
    tiles,
    splits,
    KIND: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = count_positions(n, s, IS_WIDE)
    pivot = pivot_of(x, channel, positions, c, s, IS_WIDE)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tl.program_id(0) // BLOCKS, tiles, splits):
        offset, valid = tile(t, channel, positions, c, s, KIND, IS_WIDE, BLOCK_P)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        centered = tl.where(valid, value - pivot[None, :], 0.0)
        first += centered
        second += centered * centered
    s1, s2 = tl.sum(first.to(tl.float64), 0), tl.sum(second.to(tl.float64), 0)
    s1, s2, last = merge(s1, s2, partials, arrived, channel, c, splits, BLOCKS)
    if last:
        count, shift = tl.zeros([1], tl.float64) + positions, pivot.to(tl.float64)
        tl.store(message + channel, s1 + count * shift, mask=channel < c)
        tl.store(message + c + channel, s2 + shift * (2 * s1 + count * shift), mask=channel < c)
        if tl.program_id(0) % BLOCKS == 0:
            tl.store(message + 2 * c + tl.arange(0, 1), count)


@triton.jit(do_not_specialize=BY_BATCH)
def gradient_sums(
    dy,  # (N, C, S) in memory
    x,  # (N, C, S)
    y,  # (N, C, S) where a ReLU goes by it, or None
    passed_dy,  # (N, C, S) what the ReLU leaves of dy there, or None
    statistics,  # (2C+1,) float64, saved
    weight,  # (C,) or None
    bias,  # (C,) or None
    message,  # (2C,) float64
    dweight,  # (C,)
    dbias,  # (C,)
    partials,  # (splits, 2, C) float64
    arrived,  # (BLOCKS,) int32, 0 before and after
    n,
    c,
    s,
    tiles,
    splits,
    RELU: tl.constexpr,  # goes by x
    KIND: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = count_positions(n, s, IS_WIDE)
    mu = tl.load(statistics + channel, mask=channel < c, other=0.0)
    inv = tl.load(statistics + c + channel, mask=channel < c, other=0.0)
    hi, lo, scale, shift = coefficients(mu, inv, weight, bias, channel, c)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in range(tl.program_id(0) // BLOCKS, tiles, splits):
        offset, valid = tile(t, channel, positions, c, s, KIND, IS_WIDE, BLOCK_P)
        gradient = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        if y is not None:
            gradient = passed(gradient, tl.load(y + offset, mask=valid, other=0.0))
            tl.store(passed_dy + offset, gradient, mask=valid)
        if RELU:
            gradient = passed(gradient, apply(value, hi, scale, shift).to(x.dtype.element_ty))
        first += gradient
        second += tl.where(valid, gradient * (value - hi[None, :] - lo[None, :]), 0.0)
    g1, g2 = tl.sum(first.to(tl.float64), 0), tl.sum(second.to(tl.float64), 0)
    g1, g2, last = merge(g1, g2, partials, arrived, channel, c, splits, BLOCKS)
    if last:
        valid_channel = channel < c
        tl.store(message + channel, g1, mask=valid_channel)
        tl.store(message + c + channel, g2, mask=valid_channel)
        tl.store(dweight + channel, g2 * inv, mask=valid_channel)
        tl.store(dbias + channel, g1, mask=valid_channel)


@triton.jit
def move(running, channel, value, factor, moves):
    """Move a running statistic (C,) towards `value` (BLOCK_C,) where `moves`."""
    old = tl.load(running + channel, mask=moves, other=0.0).to(tl.float64)
    new = old + factor * (value - old)
    if running.dtype.element_ty != tl.float64:
        new = new.to(tl.float32)
    tl.store(running + channel, new, mask=moves)


@triton.jit(do_not_specialize=BY_BATCH)
def normalize(
    x,  # (N, C, S) in memory
    y,  # (N, C, S)
    residual,  # (N, C, S) or None
    message,  # (2C+1,) float64, of the whole batch
    statistics,  # (2C+1,) float64 [mean, invstd, n], to be saved
    weight,  # (C,) or None
    bias,  # (C,) or None
    running_mean,  # (C,) or None
    running_var,  # (C,) or None
    tracked,  # () int64 or None
    eps,  # and eps_rest: what a float32 does not hold of it
    eps_rest,
    momentum,
    momentum_rest,
    n,
    c,
    s,
    tiles,
    RELU: tl.constexpr,
    IS_CUMULATIVE: tl.constexpr,  # the momentum is 1 / tracked, which has been counted up before
    KIND: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, t = tl.program_id(0) % BLOCKS, tiles - 1 - tl.program_id(0) // BLOCKS  # what was read last is read first
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < c
    one = tl.arange(0, 1)
    count = tl.load(message + 2 * c + one)
    values = tl.maximum(count, 1.0)
    mean = tl.load(message + channel, mask=real, other=0.0) / values
    square = tl.load(message + c + channel, mask=real, other=0.0) / values - mean * mean
    var = tl.where(square < 0, 0.0, square)
    invstd = 1 / tl.sqrt(var + (tl.full([1], eps, tl.float64) + eps_rest))
    hi, _, scale, shift = coefficients(mean, invstd, weight, bias, channel, c)
    if t <= 0:
        tl.store(statistics + channel, mean, mask=real)
        tl.store(statistics + c + channel, invstd, mask=real)
        if block == 0:
            tl.store(statistics + 2 * c + one, count)
        if running_mean is not None:
            factor = tl.full([1], momentum, tl.float64) + momentum_rest
            if IS_CUMULATIVE:
                factor = 1 / tl.maximum(tl.load(tracked + one), 1).to(tl.float64)
            elif tracked is not None and block == 0:
                tl.store(tracked + one, tl.load(tracked + one) + (count > 0).to(tl.int64))
            move(running_mean, channel, mean, factor, real & (count > 0))
            move(running_var, channel, var * (count / tl.maximum(count - 1, 1.0)), factor, real & (count > 1))
    offset, valid = tile(tl.maximum(t, 0), channel, count_positions(n, s, IS_WIDE), c, s, KIND, IS_WIDE, BLOCK_P)
    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    value = apply(value, hi, scale, shift)
    if residual is not None:
        value += tl.load(residual + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        value = passed(value, value)
    tl.store(y + offset, value, mask=valid)


@triton.jit(do_not_specialize=BY_BATCH)
def input_gradient(
    dy,  # (N, C, S) in memory
    x,  # (N, C, S)
    dx,  # (N, C, S)
    message,  # (2C,) float64, of the whole batch
    statistics,  # (2C+1,) float64, saved
    weight,  # (C,) or None
    bias,  # (C,) or None
    n,
    c,
    s,
    tiles,
    RELU: tl.constexpr,  # goes by x
    KIND: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, t = tl.program_id(0) % BLOCKS, tiles - 1 - tl.program_id(0) // BLOCKS
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < c
    values = tl.maximum(tl.load(statistics + 2 * c), 1.0)
    sum_dy = tl.load(message + channel, mask=real, other=0.0)
    sum_dy_xmu = tl.load(message + c + channel, mask=real, other=0.0)
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    invstd = tl.load(statistics + c + channel, mask=real, other=0.0)
    hi, lo, scale, shift = coefficients(mean, invstd, weight, bias, channel, c)
    slope = -scale * invstd * invstd * sum_dy_xmu / values
    addend = -scale * sum_dy / values - slope * lo
    offset, valid = tile(t, channel, count_positions(n, s, IS_WIDE), c, s, KIND, IS_WIDE, BLOCK_P)
    gradient = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        gradient = passed(gradient, apply(value, hi, scale, shift).to(x.dtype.element_ty))
    tl.store(dx + offset, apply(value, hi, slope, addend) + gradient * scale.to(tl.float32)[None, :], mask=valid)
