"""How eager training gets into autograd's graph: by the one autograd.Function, or by a node in C++ (`python -m syncbn build`).

Requirements
    - every rank of the group issues one all_reduce in forward and one in backward, whatever its share, gradients or layout;
    - by which of the two is seen in time alone: both run `forward` and `backward` of this file.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import collectives, differentiable, equations, kernels
from .kernels import Affine, Kernels, Running, Saved, extension
from .observing import Call, Observer


class Rest(NamedTuple):
    """What a forward needs beside what autograd has to see, each of which costs it time."""

    affine: Affine  # with weight, bias and residual once more
    running: Running | None  # buffers to move
    call: Call  # of the forward collective
    observers: tuple[Observer, ...]
    mask: Tensor | None  # (N, 1, *) what counts; x is finite elsewhere


# What is kept for backward: by autograd, and as it is.
Tensors = tuple[Tensor | None, ...]  # x, statistics, weight, bias, y, mask
# Whether a ReLU follows, ε, whether there is β; and whether backward is composed, whatever watches it.
Kept = tuple[bool, float, bool, Call, tuple[Observer, ...], bool]


def forward(x: Tensor, rest: Rest, compute: Kernels) -> tuple[Tensor, Tensors, Kept]:
    """Moments, all_reduce, normalize (see `syncbn.equations`): y (N, C, *), and what is kept for backward."""
    affine, running, call, observers, mask = rest
    local = compute.moments(x) if mask is None else equations.moments(x, mask)
    message, hold = collectives.all_reduce(local, call, observers)
    y, saved = compute.normalize(x, message, affine, None if hold else running)
    statistics, weight, bias, saved_y, relu = saved
    # By a ReLU of x other kernels, which round otherwise, would pass other values: backward is composed as forward was.
    composed = relu and saved_y is None and compute is kernels.composed()
    has_bias = affine.bias is not None
    return y, (x, statistics, weight, bias, saved_y, mask), (relu, affine.eps, has_bias, call, observers, composed)


def backward(dy: Tensor, tensors: Tensors, kept: Kept, needs_dx: bool, needs_dresidual: bool) -> Tensors:
    """Gradient sums, all_reduce, input gradient: dx, dγ, dβ, the gradient of the residual, and none of what is no tensor.

    Autograd gives dγ and dβ the dtypes of their parameters. Differentiable again: with create_graph=True backward goes by the
    equations, and so do many gradients at once.
    """
    x, statistics, weight, bias, y, mask = tensors
    assert x is not None
    assert statistics is not None
    relu, eps, has_bias, call, observers, composed = kept
    # A hook of saved tensors may have laid out the statistics otherwise, which kernels read by their address.
    saved, call = Saved(statistics.contiguous(), weight, bias, y, relu), call.backward()
    dx: Tensor | None
    dresidual: Tensor | None
    if differentiable.wanted_backward(dy):
        dx, dweight, dbias, dresidual = differentiable.gradients(dy, x, saved, eps, call, mask, observers)
    else:
        compute = kernels.composed() if composed else kernels.pick(x)
        sums = compute.gradient_sums(dy, x, saved)
        # Issued whether this rank needs dx or not: the others may.
        message, _ = collectives.all_reduce(sums.message, call, observers)
        _, dweight, dbias, dresidual = sums
        passed = dy if dresidual is None else dresidual
        dx = compute.input_gradient(passed, x, saved, message) if needs_dx else None
    return (
        dx if needs_dx else None,
        None if weight is None else dweight,
        dbias if has_bias else None,
        dresidual if needs_dresidual else None,
        None,
    )


FUNCTIONS = (forward, backward, collectives.all_reduce)  # what a node in C++ calls


class _SyncBatchNorm(torch.autograd.Function):
    """`forward` and `backward` in Python's node."""

    @classmethod
    def apply(cls, x: Tensor, *others: Any) -> Any:
        """As Function's, without its search for transforms: `normalize` looked for them, here is what one may have left."""
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return super().apply(x, *others)
        return super(torch.autograd.Function, cls).apply(x, *others)  # type: ignore[misc]

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, *)
        weight: Tensor | None,  # (C,)
        bias: Tensor | None,  # (C,)
        residual: Tensor | None,  # (N, C, *)
        rest: Rest,
    ) -> Tensor:
        y, tensors, ctx.kept = forward(x, rest, kernels.pick(x))
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        return backward(dy, ctx.saved_tensors, ctx.kept, needs[0], needs[3])


def normalize(x: Tensor, rest: Rest) -> Tensor:
    """y (N, C, *) of x by the statistics of its batch, which autograd differentiates, and moved running statistics."""
    affine, running, call, _, mask = rest
    if differentiable.wanted():
        return strided_as(x, differentiable.batch_norm(x, affine, running, call, mask))
    weight, bias, _, _, residual = affine
    library = extension.library
    if library is None or _is_for_python(x, call):
        return _SyncBatchNorm.apply(x, weight, bias, residual, rest)
    return library.record(FUNCTIONS, x, weight, bias, residual, rest, kernels.pick(x))


def _is_for_python(x: Tensor, call: Call) -> bool:
    """Whether the node has to be Python's, where there is another."""
    if call.forward is not None:  # it knows its layer, which may keep its y: Python's collector of garbage has to see the node
        return True
    return torch._C._get_tracing_state() is not None or torch._C._functorch.is_functorch_wrapped_tensor(x)


def strided_as(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides of torch.empty_like(x), which vmap may batch less than y."""
    strides = torch.empty_like(x).stride()
    return y if y.stride() == strides else y.new_empty_strided(y.shape, strides).copy_(y)
