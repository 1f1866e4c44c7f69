"""The comparisons, and the table of their tolerances.

`check`, of what a layer computes: a result passes if its error against the float64 oracle is at most twice the error of plain
PyTorch on the whole batch in the same dtype, plus a floor. The floors are units in the last place of the result's dtype,
relative to the largest value of the tensor, or to the sizes of the terms of a sum:

    float16, bfloat16   1 unit of the largest value: one rounding of the output is half of that; and what float32 has
    float32             2 units (1.2e-7 each): the roundings of x − hi, of the scale, the addend and the result
    float64             50 units: sums of some hundred terms
    every dtype         1e-14·(1 + (mean/std)²): the message's raw moments S2/n − μ² lose the square of the ratio

`assert_near`, of what steps and derivatives lead to: float64 alone, relative to the largest value of the tensor.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

UNITS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 50}
# Sums in another order differ by 1e-16, which grows over
STEPS = 1e-12  # a few steps of a few layers
FAR = 1e-11  # a dozen steps, or derivatives of derivatives


def floor(dtype: torch.dtype, ratio: float = 1.0) -> float:
    """The relative floor for results of `dtype` from input whose channels have mean/std = `ratio`."""
    return UNITS[dtype] * torch.finfo(dtype).eps + 1e-14 * (1 + ratio**2)


def error(result: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where a value is not finite and the other is, or the shapes differ."""
    if result.shape != expected.shape:
        return math.inf
    difference = (result.detach().double() - expected.double()).abs()
    agree = (result.double() == expected.double()) | (result.isnan() & expected.isnan())
    return torch.where(agree, 0.0, difference).nan_to_num(nan=math.inf).max().item() if result.numel() else 0.0


def check(
    name: str,
    result: Tensor,
    expected: Tensor,
    plain: Tensor | None = None,
    ratio: float = 1.0,
    scale: float | None = None,
    computed: torch.dtype | None = None,
) -> None:
    """Assert that `result` is as near to `expected` (float64) as `plain` is, twice over, plus the floor.

    Args:
        plain: plain PyTorch's result for the whole batch; None allows the floor alone.
        ratio: the largest mean/sqrt(var + eps) of the channels.
        computed: the dtype of the computation, where that of the result may be finer; that of half precision is float32.
        scale: what the floor of the computation is relative to; None: the largest expected value.
    """
    if scale is None:
        scale = expected.abs().max().item() if expected.numel() else 0.0
    is_half = result.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if is_half else result.dtype
    coarser = max((wide, computed or wide), key=lambda dtype: torch.finfo(dtype).eps)
    allowed = floor(coarser, ratio) * scale
    if is_half and expected.numel():
        allowed += floor(result.dtype) * expected.nan_to_num(0, 0, 0).abs().max().item()
    if plain is not None:
        allowed += 2 * error(plain, expected)
    assert math.isfinite(allowed), f"{name}: plain PyTorch itself is off by {error(plain, expected)}"
    off = error(result, expected)
    assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g} (largest value {scale:.3g}, {result.dtype})"


def assert_near(got: Tensor, want: Tensor, name: str = "", relative: float = STEPS) -> None:
    """Assert that two tensors differ by rounding alone, relative to the largest value, or to 1 where that is less."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel():
        off, largest = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
        assert off <= relative * max(1.0, largest), f"{name}: off by {off:.3g}, allowed {relative:.3g} of {largest:.3g}"


def assert_same_state(got: Mapping[str, Tensor], want: Mapping[str, Tensor], relative: float = STEPS, where: str = "") -> None:
    """Assert that two states have the same tensors, as near as `assert_near` has it."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_near(got[name], value, f"{name} {where}".rstrip(), relative)
