"""The layers of a network in the order in which its forward runs them, which need not be that of registration.

A layer is a module with a weight of two dimensions or more of its own, together with the parameters of what runs after it and
before the next (the affine of its batch norm, say). Parametrized (torch.nn.utils.parametrize), it is the module, and its
weights are those that are trained in their place.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..module import SyncBatchNormReLU, _Synchronized

Hook = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class Layer(NamedTuple):
    name: str  # path of the module in the model
    weights: list[nn.Parameter]  # of two dimensions or more: what is measured
    parameters: list[nn.Parameter]  # all: what is updated with it


@contextlib.contextmanager
def calls_seen(
    model: nn.Module, hook: Hook, wanted: Callable[[nn.Module], bool], begins: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Call `hook(path, module, args, kwargs, output)` after each forward of the modules wanted, and `begins(path)` before it.

    What the hook returns, if it is not None, takes the place of the output. Where `begins` is given, a forward that raises has
    an output too, None.
    """

    def seen_by(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        return lambda module, args, kwargs, output: hook(path, module, args, kwargs, output)

    def begun_by(path: str, begins: Callable[[str], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: begins(path)

    handles: list[Any] = []
    for path, module in modules_of(model):
        if wanted(module):
            name = path or type(module).__name__
            handles.append(module.register_forward_hook(seen_by(name), with_kwargs=True, always_call=begins is not None))
            if begins is not None:
                handles.append(module.register_forward_pre_hook(begun_by(name, begins), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalizes_by_its_batch(module: nn.Module) -> bool:
    """Whether it is a batch norm layer, and not a frozen one."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def mask_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask in a call of a batch norm layer, (N, *) or (N, 1, *) bool."""
    place = 2 if isinstance(layer, SyncBatchNormReLU) else 1
    given = args[place] if len(args) > place else kwargs.get("mask")
    return given if isinstance(layer, _Synchronized) and isinstance(given, Tensor) else None


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its named_modules(), without those that are inside of parametrizations only."""
    found: dict[nn.Module, str] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if module in found:
            continue
        found[module] = path
        inside = module.parametrizations if parametrize.is_parametrized(module) else None
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        stack += [(name, child) for name, child in reversed(children) if child is not inside]
    return [(path, module) for module, path in found.items()]


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that require a gradient, those of its parametrizations among them."""
    parameters = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        parameters += module.get_submodule("parametrizations").parameters()
    return [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """Those of them with two dimensions or more."""
    return [parameter for parameter in trained(module) if parameter.dim() > 1]


def layers_run(model: nn.Module, forward: Callable[[], Tensor]) -> list[Layer]:
    """The layers by where their first call in `forward` begins, which is run once. A shared parameter belongs to the first.

    Parameters that no called module holds go with the module registered before theirs.

    Raises:
        ValueError: there is none.
    """
    order: dict[nn.Module, str] = {}
    paths = {module: path or type(module).__name__ for path, module in modules_of(model) if trained(module)}

    def begins(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        order.setdefault(module, paths[module])

    handles = [module.register_forward_pre_hook(begins) for module in paths]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    followers = _followers(model, order)
    layers: list[Layer] = []
    early: list[nn.Parameter] = []  # before the first layer: updated with it
    owned: set[nn.Parameter] = set()
    for module, path in order.items():
        own = [p for each in (module, *followers.get(module, [])) for p in trained(each) if p not in owned]
        owned |= set(own)
        if any(p.dim() > 1 for p in own):
            layers.append(Layer(path, [p for p in own if p.dim() > 1], [*early, *own]))
            early = []
        else:
            (layers[-1].parameters if layers else early).extend(own)
    if not layers:
        raise ValueError(
            f"given a {type(model).__name__} whose forward runs no module with a weight that requires a gradient; "
            "expected one or more"
        )
    return layers


def _followers(model: nn.Module, order: dict[nn.Module, str]) -> dict[nn.Module, list[nn.Module]]:
    """Modules that are not called, by the called one registered before them, or by the first called."""
    found: dict[nn.Module, list[nn.Module]] = {}
    last = next(iter(order), None)
    for _, module in modules_of(model):
        if module in order:
            last = module
        elif last is not None and trained(module):
            found.setdefault(last, []).append(module)
    return found
