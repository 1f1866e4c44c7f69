"""The loss of a network on one batch, over all ranks, and its gradients: what every measure is made of.

Requirements
    - the objective is the mean over the ranks of `loss(model, batch)`, as DistributedDataParallel has it: gradients are
      averaged first and compared afterwards, for a mean of the ranks' cosines or norms is not that of the mean gradient;
    - every pass begins with the same buffers, the same random state and the same batch;
    - whatever happens, an exception included, parameters, buffers, gradients, modes and random state are as before, and a
      graph that was made before can still be differentiated, if the measure takes no steps;
    - every rank runs the same passes: nothing here depends on the values of one rank.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import observing
from ..accumulation import Calls, eagerly, unwrapped
from ..collectives import GroupLike
from .batch import copied
from .ranks import resolve, size_of, sum_over_ranks

Loss = Callable[[nn.Module, Any], Tensor]


class State:
    """All that a pass may change: parameters, their gradients, buffers, modes, and the random state of torch."""

    def __init__(self, model: nn.Module) -> None:
        tensors = list(itertools.chain(model.parameters(), model.buffers()))
        self.modules = [(module, module.training) for module in model.modules()]
        self.parameters = [(p, p.requires_grad, p.detach().clone()) for p in model.parameters()]
        self.gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module, _ in self.modules
            for name, buffer in module._buffers.items()
        ]
        self.names = [(module, frozenset(module._buffers)) for module, _ in self.modules]
        self.devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
        self.random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.devices]

    @torch.no_grad()
    def begin(self) -> None:
        """Buffers and random state as they were; those that a pass has registered are gone."""
        for module, names in self.names:
            for name in module._buffers.keys() - names:
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
        for module, name, buffer, value in self.buffers:
            module._buffers[name] = buffer
            _put(buffer, value)
        torch.set_rng_state(self.random[0])
        for device, state in zip(self.devices, self.random[1], strict=True):
            torch.cuda.set_rng_state(state, device)

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was."""
        self.begin()
        for parameter, requires_grad, value in self.parameters:
            _put(parameter, value)
            parameter.requires_grad_(requires_grad)
        for parameter, gradient, kept in self.gradients:
            _put(gradient, kept)
            parameter.grad = gradient
        for module, training in self.modules:
            module.training = training


def _put(tensor: Tensor | None, value: Tensor | None) -> None:
    """The value as it was when it was kept, so that a graph that saved the tensor before finds no other version of it."""
    if tensor is not None and value is not None:
        there = tensor.data
        has_strides = there.layout == torch.strided and not there.is_nested
        for dim, stride in enumerate(there.stride() if has_strides else ()):
            if stride == 0 and there.size(dim) > 1:  # its elements there are one in memory, as expand() leaves them
                there, value = there.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        there.copy_(value)


@contextlib.contextmanager
def objective(model: nn.Module, loss: Loss, batch: Any, process_group: GroupLike = None) -> Iterator["Objective"]:
    """The objective of a model on one batch; afterwards the model is as before, also after an exception.

    Inside of `accumulate_statistics` its forwards do not count.

    Args:
        model: any module, in DistributedDataParallel or not; it stays in the mode it is in, and a compiled one runs eagerly.
        loss: called with the model (out of its wrappers) and the batch, gives the mean loss of this rank's share, (). Where
            shares are unequal, times n_rank·W/n, so that the mean over ranks is that of all samples.
        batch: this rank's share. Each pass hands `loss` a copy of its own, for a forward may normalize its input in place:
            tensors in lists, tuples, named tuples, dict, UserDict and dataclasses are copied; other containers, and what
            else there is, stay as they are, and must not be written to.
        process_group: the ranks whose shares make the batch; None: all ranks. Each of them comes.

    Raises:
        ValueError: no parameter of the model requires a gradient, or one does that is complex; parameters are sharded, by
            fully_shard or FullyShardedDataParallel; a call inside of torch.inference_mode(); in a pass, `loss` gives no scalar
            tensor with a gradient.
    """
    inner = unwrapped(model)
    _refuse_parameters(inner)
    state = State(inner)
    try:
        apart = observing.forwards_apart(list(inner.modules()))
        with eagerly(), torch.enable_grad(), observing.hidden_from(Calls), apart:
            yield Objective(inner, loss, batch, process_group, state)
    finally:
        state.restore()


class Objective:
    """`objective` makes it."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Any, process_group: GroupLike, state: State) -> None:
        self.model, self.loss, self.batch, self.state = model, loss, batch, state
        self.group = resolve(process_group)
        self.size = size_of(self.group)
        self.own = [*model.parameters(), *model.buffers()]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if torch.is_inference_mode_enabled():
            raise ValueError("given a measure inside of torch.inference_mode(); expected it outside: gradients are taken")
        if not self.parameters:
            raise ValueError(
                f"given a {type(model).__name__} of which no parameter requires a gradient; expected one that trains"
            )

    def local(self) -> Tensor:
        """This rank's part of the objective, () with its graph: loss(model, batch)/W. The parts add up to the objective."""
        self.state.begin()
        value = self.loss(self.model, copied(self.batch, self.own))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"given a loss that returns {given}; expected a tensor of one value that needs a gradient")
        return value.reshape(()) / self.size

    def gradients(self, parameters: Sequence[Tensor] | None = None) -> tuple[float, list[Tensor]]:
        """The objective, and its gradients by the parameters (None: all), float64 and averaged over the ranks."""
        wanted = self.parameters if parameters is None else list(parameters)
        part = self.local()
        found = torch.autograd.grad(part, wanted, allow_unused=True)
        value, *summed = self.sum(
            [part, *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True))]
        )
        return value.item(), summed

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks, float64."""
        return sum_over_ranks(tensors, self.group, "syncbn.analysis")


def _refuse_parameters(model: nn.Module) -> None:
    """ValueError where gradients are not those of the parameters that the model shows."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"given parameter {name!r} of {parameter.dtype}; expected real parameters: keep its torch.view_as_real, and "
                "take torch.view_as_complex of that in forward"
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"given parameter {name!r} sharded over {parameter.device_mesh}, as fully_shard leaves it; expected a whole "
                "one: measure the model before fully_shard, or a copy with the same state"
            )
    for name, module in model.named_modules():
        if hasattr(module, "_fsdp_wrapped_module"):
            raise ValueError(
                f"given {f'module {name!r}' if name else 'a model'} in FullyShardedDataParallel, which shards its parameters; "
                "expected whole ones: measure the model before it is wrapped, or a copy with the same state"
            )


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all values together, in float64."""
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def inner(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The inner product of all values, in float64: float32 gives 0.9999994 for the cosine of equal vectors."""
    return sum((one.double() * other.double()).sum().item() for one, other in zip(ones, others, strict=True))


def cosine(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Of the angle between two gradients; NaN where one is zero."""
    lengths = norm(ones) * norm(others)
    return inner(ones, others) / lengths if lengths > 0 else float("nan")
