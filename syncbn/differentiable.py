"""Synchronized batch normalization by the equations: compiled code, and what differentiates more than once or another way.

Requirements
    - compiled code is in step with eager code on another rank: [S1, S2, n] forward, and [G1, G2] in every backward that runs;
    - torch.func and forward mode take one autograd.Function, the all_reduce, whose adjoint and tangent are all_reduces: the
      rest is autograd's, through `equations`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import collectives, equations, observing
from .kernels import Affine, Running, Saved, move
from .observing import Call, Observer


def wanted() -> bool:
    """Whether this code is compiled, inside a torch.func transform, or in forward mode; the same on every rank of a program."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether this is inside a torch.func transform; a trace takes the test by type alone."""
    return not isinstance(torch._C._functorch.peek_interpreter_stack(), type(None))


def wanted_backward(dy: Tensor) -> bool:
    """Whether a backward is to be differentiated itself, or dy is of many at once.

    That is by create_graph=True, by forward mode, by is_grads_batched=True or by torch.func.vmap.
    """
    several = torch._C._functorch.is_legacy_batchedtensor(dy) or transformed()
    return several or torch.is_grad_enabled() or forward_ad._current_level >= 0


def batch_norm(x: Tensor, affine: Affine, running: Running | None, call: Call, mask: Tensor | None) -> Tensor:
    """Normalize x (N, C, *) and move the running statistics; all_reduces of 2C+1 values forward and 2C backward.

    With a mask (N, 1, *), by the statistics of where it is true; x is finite elsewhere.
    """
    if torch.compiler.is_compiling() and not transformed():
        return _compiled(x, affine, running, call, mask)
    return _transformable(x, affine, running, call, mask)


def _transformable(x: Tensor, affine: Affine, running: Running | None, call: Call, mask: Tensor | None) -> Tensor:
    watch = _Watch(observing.observers())
    stats = equations.statistics(all_reduce(equations.moments(x, mask), call, watch, constants=1))
    if running is not None and not watch.hold:
        move(running, equations.Statistics(*(value.detach() for value in stats)))
    return equations.normalize(x, stats, affine.weight, affine.bias, affine.eps, affine.relu, affine.residual)


# As torch.compiler.disable, without importing the compiler: a trace of a transform drops tangents and second derivatives.
_transformable._torchdynamo_disable = True  # type: ignore[attr-defined]


def _compiled(x: Tensor, affine: Affine, running: Running | None, call: Call, mask: Tensor | None) -> Tensor:
    message = collectives.traced_all_reduce(equations.moments(x.detach(), mask), call)
    if running is not None:
        move(running, equations.statistics(message))
    weight, bias, eps, relu, residual = affine
    if residual is x:  # a trace takes no tensor twice
        residual = x.view_as(x)
    return _Normalize.apply(x, weight, bias, residual, message, eps, relu, call)


class _Normalize(torch.autograd.Function):
    """The fused function of eager training as a trace takes it: no Python state, and no buffers written."""

    @staticmethod
    def forward(
        x: Tensor,  # (N, C, *)
        weight: Tensor | None,  # (C,)
        bias: Tensor | None,  # (C,)
        residual: Tensor | None,  # (N, C, *)
        message: Tensor,  # (2C+1,) of the whole batch
        eps: float,
        relu: bool,
        call: Call,  # of the forward collective
    ) -> Tensor:
        return equations.normalize(x, equations.statistics(message), weight, bias, eps, relu, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _, message, ctx.eps, relu, call = inputs
        ctx.save_for_backward(x, weight, message, output if relu else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.call = call.backward()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, message, y = ctx.saved_tensors
        stats = equations.statistics(message)
        if y is not None:
            dy = torch.where(y <= 0, 0, dy)
        local = equations.gradient_sums(dy, x, stats.mean)
        sum_dy, sum_dy_xmu = local.chunk(2)
        dx = equations.input_gradient(dy, x, stats, weight, ctx.eps, collectives.traced_all_reduce(local, ctx.call))
        dweight = None if weight is None else (sum_dy_xmu * equations.invstd(stats.var, ctx.eps)).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
        return dx, dweight, dbias, dy if ctx.needs_input_grad[3] else None, None, None, None, None


class _Watch:
    """The observers of a forward, for its backward too, and whether one of them holds the running statistics."""

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self.observers = observers
        self.hold = False


class _AllReduce(torch.autograd.Function):
    """The sum over the group of a message (*, M), and of its cotangents: y = Σ x over ranks gives dx = Σ dy over ranks.

    The last `constants` values of the message are not differentiated, and their cotangents not sent.
    """

    @staticmethod
    def forward(message: Tensor, constants: int, call: Call, watch: _Watch) -> Tensor:
        reduced = collectives.all_reduce(message.clone(), call, watch.observers)
        watch.hold = watch.hold or reduced.hold
        return reduced.message

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.constants, ctx.call, ctx.watch = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = grad.shape[-1] - ctx.constants
        reduced = all_reduce(grad.narrow(-1, 0, kept), ctx.call.backward()._replace(sums=False), ctx.watch)
        return torch.cat([reduced, torch.zeros_like(grad.narrow(-1, kept, ctx.constants))], -1), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_reduce(tangent, ctx.call._replace(sums=False), ctx.watch)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], message: Tensor, constants: int, call: Call, watch: _Watch) -> Any:
        return all_reduce(message.movedim(in_dims[0], 0), call._replace(sums=False), watch, constants), 0


def all_reduce(message: Tensor, call: Call, watch: _Watch, constants: int = 0) -> Tensor:
    """The sum of messages (*, M) over call.group, differentiable any number of times, forward and backward."""
    if torch._C._functorch.is_legacy_batchedtensor(message):  # torch.autograd's own vmap, which asks no function for its rule
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        reduced = all_reduce(torch._remove_batch_dim(message, level, 0, 0), call._replace(sums=False), watch, constants)
        return torch._add_batch_dim(reduced, 0, level)
    return _AllReduce.apply(message, constants, call, watch)


def gradients(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    eps: float,
    call: Call,  # of the backward collective
    mask: Tensor | None,  # (N, 1, *) of the forward
    observers: tuple[Observer, ...],  # of the forward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, the share's dγ and dβ (C,), and what a ReLU leaves of dy, as differentiable functions of dy, x and weight.

    The statistics are taken anew, so that their derivative is known: all_reduces of 2C+1 and 2C values here, and two of 2C
    when the result is differentiated, beside those of what dy depends on. Where nothing was added, what a ReLU passed is found
    anew, and rounded otherwise than by the kernels: a value that is zero but for its last bit may be passed here and not there,
    as by the composed kernels where a mode that watches operators begins between forward and backward.
    """
    watch = _Watch(observers)
    stats = equations.statistics(all_reduce(equations.moments(x, mask), call, watch, constants=1))
    if saved.relu:
        with torch.no_grad():
            y = equations.normalize(x, stats, saved.weight, saved.bias, eps) if saved.y is None else saved.y
        dy = torch.where(y <= 0, 0, dy)
    local = equations.gradient_sums(dy, x, stats.mean)
    sum_dy, sum_dy_xmu = local.chunk(2)
    dx = equations.input_gradient(dy, x, stats, saved.weight, eps, all_reduce(local, call, watch))
    return dx, sum_dy_xmu * equations.invstd(stats.var, eps), sum_dy, dy
