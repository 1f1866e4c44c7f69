"""Synchronized batch normalization by the equations, for whatever differentiates more than once or in another way.

Compiled code, torch.func, forward mode and double backward take this path; eager first-order training takes the kernels.

Requirements
    - one autograd.Function, the all_reduce, whose adjoint and tangent are all_reduces: the rest is autograd's, through
      `equations`;
    - no Python state: it traces under torch.compile(fullgraph=True).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import collectives, equations
from .collectives import Call
from .kernels import Affine, Running, move


def wanted() -> bool:
    """Whether this code is compiled, inside a torch.func transform, or in forward mode; the same on every rank of a program."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


class _AllReduce(torch.autograd.Function):
    """The sum over the group of a message (*, M), and of its cotangents: y = Σ x over ranks gives dx = Σ dy over ranks.

    The last `constants` values of the message are not differentiated, and their cotangents not sent.
    """

    @staticmethod
    def forward(message: Tensor, constants: int, call: Call) -> Tensor:
        return collectives.traced_all_reduce(message, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.constants, ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = grad.shape[-1] - ctx.constants
        reduced = all_reduce(grad[..., :kept], ctx.call._replace(phase="backward"))
        return torch.cat([reduced, torch.zeros_like(grad[..., kept:])], -1), None, None


class _EagerAllReduce(_AllReduce):
    """With what torch.compile does not take: tangents and vmap, which batches messages into one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_reduce(tangent, ctx.call)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], message: Tensor, constants: int, call: Call) -> tuple[Tensor, int]:
        return all_reduce(message.movedim(in_dims[0], 0), call, constants), 0


def all_reduce(message: Tensor, call: Call, constants: int = 0) -> Tensor:
    """The sum of messages (*, M) over call.group, differentiable any number of times, forward and backward."""
    function = _AllReduce if torch.compiler.is_compiling() else _EagerAllReduce
    return function.apply(message, constants, call)


def batch_norm(x: Tensor, affine: Affine, running: Running | None, call: Call) -> Tensor:
    """Normalize x (N, C, *) and move the running statistics; all_reduces of 2C+1 values forward and 2C backward."""
    message = all_reduce(equations.moments(x), call, constants=1)
    stats = equations.statistics(message)
    if running is not None:
        move(running, equations.Statistics(*(value.detach() for value in stats)))
    return equations.normalize(x, stats, affine.weight, affine.bias, affine.eps)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    call: Call,  # of the backward collective
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the share's dγ and dβ (C,), as differentiable functions of dy, x and weight.

    The statistics are taken anew, so that their derivative is known: all_reduces of 2C+1 and 2C values here, and two of 2C
    when the result is differentiated, beside those of what dy depends on.
    """
    stats = equations.statistics(all_reduce(equations.moments(x), call, constants=1))
    local = equations.gradient_sums(dy, x, stats.mean)
    sum_dy, sum_dy_xmu = local.chunk(2)
    dx = equations.input_gradient(dy, x, stats, weight, eps, all_reduce(local, call))
    return dx, sum_dy_xmu * equations.invstd(stats.var, eps), sum_dy
