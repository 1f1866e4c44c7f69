"""Whether layers compute batch norm: every output and gradient beside the definition in float64.

x (N, C, *), dy alike; values per channel (C,).
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The largest relative error of a case that is reported: the error of torch's channels_last kernel in float32, a few roundings
# of the others; for dweight and dbias, sums over the batch that may cancel, no less than SUMS, the error of the same kernel.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SUMS = 1e-3


class DisagreementError(RuntimeError):
    """Results are not those of batch norm; nothing is to be reported."""


class Outputs(NamedTuple):
    """Of one training step of a layer."""

    y: Tensor
    dx: Tensor
    dweight: Tensor  # (C,)
    dbias: Tensor  # (C,)
    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,)


def outputs(layer: Any, x: Tensor, dy: Tensor) -> Outputs:
    """One step of a layer that made none before; its running statistics move."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    inner = getattr(layer, "layer", layer)
    values = y.detach(), x.grad, inner.weight.grad, inner.bias.grad, inner.running_mean, inner.running_var
    layer.zero_grad()
    return Outputs(*(value.clone() for value in values))


def expected(layer: Any, x: Tensor, dy: Tensor) -> Outputs:
    """The definition in float64, two passes over the values; the derivatives are autograd's. Changes nothing."""
    wide = x.detach().double().requires_grad_()
    weight, bias = (value.detach().double().requires_grad_() for value in (layer.weight, layer.bias))
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    n = x.numel() // x.shape[1]
    mean = wide.mean(dims, keepdim=True)
    var = (wide - mean).square().mean(dims, keepdim=True)
    y = (wide - mean) * (var + layer.eps).rsqrt() * weight.view(shape) + bias.view(shape)
    dx, dweight, dbias = torch.autograd.grad(y, (wide, weight, bias), dy.double())
    m = layer.momentum
    running_mean = (1 - m) * layer.running_mean.double() + m * mean.detach().flatten()
    running_var = (1 - m) * layer.running_var.double() + m * var.detach().flatten() * n / (n - 1)
    return Outputs(y.detach(), dx, dweight, dbias, running_mean, running_var)


def errors(results: Outputs, wanted: Outputs) -> dict[str, float]:
    """The largest error of each, relative to the largest value; NaN where a result has one."""
    found = {}
    for name, value, want in zip(Outputs._fields, results, wanted, strict=True):
        found[name] = float((value.double() - want).abs().max() / want.abs().max())
    return found


def require(
    name: str,
    run: Callable[[nn.Module], Outputs],
    layer: nn.Module,
    wanted: Outputs,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The errors of `run` on a copy of the layer.

    Raises:
        DisagreementError: one of them is more than the dtype allows.
    """
    found = errors(run(copy.deepcopy(layer)), wanted)
    allowed = dict.fromkeys(found, ALLOWED[dtype]) | dict.fromkeys(("dweight", "dbias"), max(SUMS, ALLOWED[dtype]))
    wrong = {tensor: error for tensor, error in found.items() if not error <= allowed[tensor]}
    if wrong:
        told = ", ".join(f"{tensor} by {error:.1e}" for tensor, error in wrong.items())
        raise DisagreementError(f"{name} is not batch norm: relative to the largest value it is off in {told}")
    return found
