"""Fold batch normalization into the layers before it, for inference."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights

from .convert import revert
from .module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncBatchNormReLU, _Synchronized

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncBatchNormReLU),
)
# With the batch norm of their dimensions.
CONVOLUTIONS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
TRANSPOSED = {nn.ConvTranspose1d: nn.BatchNorm1d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.ConvTranspose3d: nn.BatchNorm3d}
SPATIAL = (nn.BatchNorm2d, nn.BatchNorm3d)  # no (N, C) input
HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # how torch's names begin: of the hooks and of their flags


def fold(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` for inference, each batch norm right behind a convolution or linear layer being part of that layer.

    W' = s·W and b' = s·(b − E[x]) + β with s = γ·(Var[x] + ε)^(−1/2) (Ioffe & Szegedy 2015, section 3.1, algorithm 2), by
    torch's own fusion. Folded where the layer's output goes to the batch norm alone, the batch norm has running statistics and
    no mask, model.eval() puts both into eval mode, both are of torch's own classes or ours and have no hooks around their
    forward (the older weight_norm, spectral_norm and prune are such hooks), neither is called elsewhere in the graph, and
    nothing else reads the layer's parameters; all else stays as it is, as do the addition and the ReLU of a SyncBatchNormReLU.
    A convolution is taken to have a batch, and a linear layer (N, C) input, where its features are the channels, but for a
    batch norm of two or three dimensions, which refuses it.

    Args:
        model: any model that torch.fx can trace. It is left as it is.

    Returns:
        The copy in eval mode, its outputs equal to those of model.eval() to rounding.

    Raises:
        ValueError: torch.fx cannot trace the model, it cannot be copied, or its forward was replaced in the instance.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"given a {type(model).__name__} whose forward was replaced in the instance; expected that of its class, which "
            "torch.fx traces: undo the replacement, or fold the model before it"
        )
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # of whatever class the model's parts raise
        raise ValueError(
            f"given a {type(model).__name__} that cannot be copied ({type(error).__name__}: {error}); expected one that "
            "copy.deepcopy takes: weights that hooks compute, as the older weight_norm's, are copied inside of torch.no_grad()"
        ) from error
    revert(twin).eval()
    try:
        traced = fx.GraphModule(twin, _Tracer().trace(twin))
    except Exception as error:
        raise ValueError(
            f"given a {type(model).__name__} that torch.fx cannot trace; expected one without control flow on values: "
            "fold its traceable parts one by one"
        ) from error
    vars(traced).update({name: value for name, value in vars(twin).items() if name.startswith(HOOKS)})
    read = {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if before in (*node.args[1:], *node.kwargs.values()):
            continue
        if calls[before.target] > 1 or calls[node.target] > 1 or before.target in read:
            continue
        norm = traced.get_submodule(str(node.target))
        fused = None if _is_masked(node, norm) else _fused(traced.get_submodule(str(before.target)), norm)
        if fused is not None:
            traced.set_submodule(str(before.target), fused)
            node.replace_all_uses_with(_activated(traced.graph, node, before) if type(norm) is SyncBatchNormReLU else before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    """Torch's, to which layers made as ours are layers too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _Synchronized) or super().is_leaf_module(m, module_qualified_name)


def _is_masked(node: fx.Node, norm: nn.Module) -> bool:
    """Whether a layer of ours is given a mask."""
    return "mask" in node.kwargs or len(node.args) > (2 if type(norm) is SyncBatchNormReLU else 1)


def _activated(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """What a SyncBatchNormReLU does with the normalized values."""
    residual: Any = node.kwargs.get("residual", node.args[1] if len(node.args) > 1 else None)
    with graph.inserting_before(node):
        value = before if residual is None else graph.call_function(torch.add, (before, residual))
        return graph.call_function(torch.relu, (value,))


def _is_changed(layer: nn.Module) -> bool:
    """Whether calling a layer does more than the forward of its class."""
    own = vars(layer)
    return "forward" in own or any(own[name] for name in own if name.startswith(HOOKS))


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer that computes both, or None where torch's fusion does not apply."""
    if type(norm) not in NORMS or norm.running_mean is None or _is_changed(layer) or _is_changed(norm):
        return None
    if layer.training or norm.training or not _fits(layer, norm):
        return None
    if type(layer) in CONVOLUTIONS:
        return fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var,arg-type]
    if type(layer) in TRANSPOSED and layer.groups == 1:
        return fuse_conv_bn_eval(layer, norm, transpose=True)  # type: ignore[type-var,arg-type]
    if type(layer) is nn.Linear:
        return _fused_linear(layer, norm)
    return None


def _fits(layer: Any, norm: Any) -> bool:
    """Whether the layer's channels are those of the batch norm, and its dimensions, if that has its own."""
    if type(layer) is nn.Linear:
        return bool(layer.out_features == norm.num_features) and not isinstance(norm, SPATIAL)
    its = CONVOLUTIONS.get(type(layer)) or TRANSPOSED.get(type(layer))
    others = [cls for cls in CONVOLUTIONS.values() if cls is not its]
    return its is not None and layer.out_channels == norm.num_features and not isinstance(norm, tuple(others))


def _fused_linear(layer: nn.Linear, norm: Any) -> nn.Linear:
    """By torch's function of weights: the one of modules takes no norm without a weight or a bias."""
    mean, var = norm.running_mean, norm.running_var
    weight = torch.ones_like(var) if norm.weight is None else norm.weight
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
    fused = copy.deepcopy(layer)
    fused.weight, fused.bias = fuse_linear_bn_weights(layer.weight, layer.bias, mean, var, norm.eps, weight, bias)
    return fused
