"""The programs of kernels/triton.py: what runs on the device. Legend: see tiles.py.

Requirements
    - no program is compiled for a size: a last, smaller batch would have to be, while other ranks wait. Programs are compiled
      for their constants, which are the same for every batch, and for which pointers are aligned to 16 bytes;
    - a program takes several tiles of its channels: what is computed for a channel costs as much as a tile.
"""

import triton
import triton.language as tl

from .tiles import apply, coefficients, merge, move, once, parameter, passed, pivot_of, place, sizes, tile

NUMBERS = ["n", "c", "s", "tiles", "splits", "team", "eps", "eps_rest", "momentum", "momentum_rest"]


@triton.jit(do_not_specialize=NUMBERS)
def moments(
    x,  # (N, C, S) in memory
    message,  # (2C+1,) float64
    partials,  # (splits + teams, 2, C) float64
    arrived,  # (blocks of channels, 1 + teams) int32, 0 before and after
    team,
    n,
    c,
    s,
    tiles,
    splits,
    IS_ROWS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, s = sizes(n, c, s, IS_ROWS, IS_WIDE, UNIT)
    part, block, channel = place(c, BLOCK_C)
    pivot = once(pivot_of(x, channel, n, c, s, IS_ROWS, IS_WIDE))
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in tl.range(part, tiles, splits, num_stages=6 if IS_ROWS else 4):  # five or three on their way, if loads are wide
        offset, valid = tile(t, channel, n, c, s, IS_ROWS, IS_WIDE, BLOCK_P)
        value = tl.load(x + offset, mask=valid, other=0.0)
        centered = tl.where(valid, value.to(tl.float32) - pivot[None, :], 0.0)
        first += centered
        second += centered * centered
    s1, s2 = tl.sum(first.to(tl.float64), 0), tl.sum(second.to(tl.float64), 0)
    s1, s2, last = merge(s1, s2, partials, arrived, part, block, channel, c, splits, team)
    if last:
        count, shift = tl.zeros([1], tl.float64) + n * s, pivot.to(tl.float64)
        tl.store(message + channel, s1 + count * shift, mask=channel < c)
        tl.store(message + c + channel, s2 + shift * (2 * s1 + count * shift), mask=channel < c)
        if block == 0:
            tl.store(message + 2 * c + tl.arange(0, 1), count)


@triton.jit(do_not_specialize=NUMBERS)
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
    partials,  # (splits + teams, 2, C) float64
    arrived,  # (blocks of channels, 1 + teams) int32, 0 before and after
    team,
    n,
    c,
    s,
    tiles,
    splits,
    RELU: tl.constexpr,  # goes by x
    IS_ROWS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, s = sizes(n, c, s, IS_ROWS, IS_WIDE, UNIT)
    part, block, channel = place(c, BLOCK_C)
    mu = tl.load(statistics + channel, mask=channel < c, other=0.0)
    inv = tl.load(statistics + c + channel, mask=channel < c, other=0.0)
    hi, lo, scale, shift = coefficients(mu, inv, parameter(weight, channel, c, 1.0), parameter(bias, channel, c, 0.0))
    hi, lo, scale, shift = once(hi), once(lo.to(tl.float32)), once(scale.to(tl.float32)), once(shift)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in tl.range(part, tiles, splits, num_stages=3):  # two of each
        offset, valid = tile(t, channel, n, c, s, IS_ROWS, IS_WIDE, BLOCK_P)
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
    g1, g2, last = merge(g1, g2, partials, arrived, part, block, channel, c, splits, team)
    if last:
        valid_channel = channel < c
        tl.store(message + channel, g1, mask=valid_channel)
        tl.store(message + c + channel, g2, mask=valid_channel)
        tl.store(dweight + channel, g2 * inv, mask=valid_channel)
        tl.store(dbias + channel, g1, mask=valid_channel)


@triton.jit(do_not_specialize=NUMBERS)
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
    splits,
    RELU: tl.constexpr,
    IS_CUMULATIVE: tl.constexpr,  # the momentum is 1 / tracked, which has been counted up before
    IS_ROWS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, s = sizes(n, c, s, IS_ROWS, IS_WIDE, UNIT)
    part, block, channel = place(c, BLOCK_C)
    real = channel < c
    one = tl.arange(0, 1)
    # All that memory has to bring is asked for at once: a load behind a division would wait for it, and be waited for.
    count = tl.load(message + 2 * c + one)
    s1 = tl.load(message + channel, mask=real, other=0.0)
    s2 = tl.load(message + c + channel, mask=real, other=0.0)
    gamma, beta = parameter(weight, channel, c, 1.0), parameter(bias, channel, c, 0.0)
    mine = real & (channel * 0 + part == 0)
    if running_mean is not None:
        old_mean = tl.load(running_mean + channel, mask=mine, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + channel, mask=mine, other=0.0).to(tl.float64)
        if tracked is not None:
            batches = tl.load(tracked + one, mask=one + part == 0, other=0)
    values = tl.maximum(count, 1.0)
    mean = s1 / values  # a product would go unrounded into its rest, here alone
    square = s2 / values - mean * mean
    var = tl.where(square < 0, 0.0, square)
    invstd = 1 / tl.sqrt(var + (tl.full([1], eps, tl.float64) + eps_rest))  # tl.rsqrt is an approximation
    hi, _, scale, shift = coefficients(mean, invstd, gamma, beta)
    hi, scale, shift = once(hi), once(scale.to(tl.float32)), once(shift)
    for back in tl.range(part, tiles, splits, num_stages=3):  # what was read last, and may still be in a cache, comes first
        offset, valid = tile(tiles - 1 - back, channel, n, c, s, IS_ROWS, IS_WIDE, BLOCK_P)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        value = apply(value, hi, scale, shift)
        if residual is not None:
            value += tl.load(residual + offset, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            value = passed(value, value)
        tl.store(y + offset, value, mask=valid)
    if part == 0:
        tl.store(statistics + channel, mean, mask=real)
        tl.store(statistics + c + channel, invstd, mask=real)
        if block == 0:
            tl.store(statistics + 2 * c + one, count)
        if running_mean is not None:
            factor = tl.full([1], momentum, tl.float64) + momentum_rest
            if IS_CUMULATIVE:
                factor = 1 / tl.maximum(batches, 1).to(tl.float64)
            elif tracked is not None and block == 0:
                tl.store(tracked + one, batches + (count > 0).to(tl.int64))
            move(running_mean, channel, old_mean, mean, factor, real & (count > 0))
            move(running_var, channel, old_var, var * (count / tl.maximum(count - 1, 1.0)), factor, real & (count > 1))


@triton.jit(do_not_specialize=NUMBERS)
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
    splits,
    RELU: tl.constexpr,  # goes by x
    IS_ROWS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, s = sizes(n, c, s, IS_ROWS, IS_WIDE, UNIT)
    part, _, channel = place(c, BLOCK_C)
    real = channel < c
    count = tl.load(statistics + 2 * c)
    sum_dy = tl.load(message + channel, mask=real, other=0.0)
    sum_dy_xmu = tl.load(message + c + channel, mask=real, other=0.0)
    mean = tl.load(statistics + channel, mask=real, other=0.0)
    invstd = tl.load(statistics + c + channel, mask=real, other=0.0)
    gamma, beta = parameter(weight, channel, c, 1.0), parameter(bias, channel, c, 0.0)
    each = 1 / tl.maximum(count, 1.0)
    hi, lo, scale, shift = coefficients(mean, invstd, gamma, beta)
    slope = -scale * invstd * invstd * sum_dy_xmu * each
    addend = (-scale * sum_dy * each - slope * lo).to(tl.float32)
    hi, slope, addend = once(hi), once(slope.to(tl.float32)), once(addend)
    scale, shift = once(scale.to(tl.float32)), once(shift)
    for back in tl.range(part, tiles, splits, num_stages=3):
        offset, valid = tile(tiles - 1 - back, channel, n, c, s, IS_ROWS, IS_WIDE, BLOCK_P)
        gradient = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            gradient = passed(gradient, apply(value, hi, scale, shift).to(x.dtype.element_ty))
        tl.store(dx + offset, apply(value, hi, slope, addend) + gradient * scale[None, :], mask=valid)
