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
from .kernels import Affine, Running, Saved, move


def wanted() -> bool:
    """Whether this code is compiled, inside a torch.func transform, or in forward mode; the same on every rank of a program."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


class _Watch:
    """The observers of a forward, for its backward too, and whether one of them holds the running statistics."""

    def __init__(self) -> None:
        self.observers = collectives.observers()
        self.hold = False


class _AllReduce(torch.autograd.Function):
    """The sum over the group of a message (*, M), and of its cotangents: y = Σ x over ranks gives dx = Σ dy over ranks.

    The last `constants` values of the message are not differentiated, and their cotangents not sent.
    """

    @staticmethod
    def forward(message: Tensor, constants: int, call: Call, watch: _Watch | None) -> Tensor:
        if watch is None:
            return collectives.traced_all_reduce(message, call)
        reduced = collectives.all_reduce(message.clone(), call, watch.observers)
        watch.hold = watch.hold or reduced.hold
        return reduced.message

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.constants, ctx.call, ctx.watch = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = grad.shape[-1] - ctx.constants
        reduced = all_reduce(grad[..., :kept], ctx.call._replace(phase="backward", sums=False), ctx.watch)
        return torch.cat([reduced, torch.zeros_like(grad[..., kept:])], -1), None, None, None


class _EagerAllReduce(_AllReduce):
    """With what torch.compile does not take: tangents and vmap, which batches messages into one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_reduce(tangent, ctx.call._replace(sums=False), ctx.watch)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], message: Tensor, constants: int, call: Call, watch: _Watch) -> Any:
        return all_reduce(message.movedim(in_dims[0], 0), call, watch, constants), 0


def all_reduce(message: Tensor, call: Call, watch: _Watch | None, constants: int = 0) -> Tensor:
    """The sum of messages (*, M) over call.group, differentiable any number of times, forward and backward."""
    function = _AllReduce if watch is None else _EagerAllReduce
    return function.apply(message, constants, call, watch)


def batch_norm(x: Tensor, affine: Affine, running: Running | None, call: Call, mask: Tensor | None = None) -> Tensor:
    """Normalize x (N, C, *) and move the running statistics; all_reduces of 2C+1 values forward and 2C backward.

    With a mask (N, 1, *), only where it is true; y and dx are 0 elsewhere, whatever x is there.
    """
    watch = None if torch.compiler.is_compiling() else _Watch()
    given = x
    if mask is not None:
        if torch.is_grad_enabled() and not x.requires_grad and not wanted():
            # The backward's all_reduce is issued, needed here or not, as the kernels do: another rank may have no mask.
            x = x.detach().requires_grad_(
                any(p is not None and p.requires_grad for p in (affine.weight, affine.bias, affine.residual))
            )
        x = torch.where(mask, x, 0)
    stats = equations.statistics(all_reduce(equations.moments(x, mask), call, watch, constants=1))
    if running is not None and (watch is None or not watch.hold):
        move(running, equations.Statistics(*(value.detach() for value in stats)))
    y = equations.normalize(x, stats, affine.weight, affine.bias, affine.eps, affine.relu, affine.residual)
    if mask is not None:
        y = torch.where(mask, y, 0)
    like = torch.empty_like(given)
    return y if y.stride() == like.stride() else like.copy_(y)


def gradients(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    eps: float,
    call: Call,  # of the backward collective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, the share's dγ and dβ (C,), and what a ReLU leaves of dy, as differentiable functions of dy, x and weight.

    The statistics are taken anew, so that their derivative is known: all_reduces of 2C+1 and 2C values here, and two of 2C
    when the result is differentiated, beside those of what dy depends on.
    """
    watch = _Watch()
    stats = equations.statistics(all_reduce(equations.moments(x), call, watch, constants=1))
    if saved.relu:
        with torch.no_grad():
            y = equations.normalize(x, stats, saved.weight, saved.bias, eps) if saved.y is None else saved.y
        dy = torch.where(y <= 0, 0, dy)
    local = equations.gradient_sums(dy, x, stats.mean)
    sum_dy, sum_dy_xmu = local.chunk(2)
    dx = equations.input_gradient(dy, x, stats, saved.weight, eps, all_reduce(local, call, watch))
    return dx, sum_dy_xmu * equations.invstd(stats.var, eps), sum_dy, dy
