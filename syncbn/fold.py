"""Fold batch normalization into the layers before it, for inference."""

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .convert import revert

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` for inference, each batch norm right behind a convolution or linear layer being part of that layer.

    W' = s·W and b' = s·(b − E[x]) + β with s = γ·(Var[x] + ε)^(−1/2) (Ioffe & Szegedy 2015, section 3.1, algorithm 2), by
    torch's own fusion. Folded where the layer's output goes to the batch norm alone, and both are of torch's own classes (ours
    are reverted in the copy), have running statistics, and are not called elsewhere in the graph; all else stays as it is.
    A linear layer is taken to have (N, C) input, where its features are the channels.

    Args:
        model: any model that torch.fx can trace. It is left as it is.

    Returns:
        The copy in eval mode, its outputs equal to those of model.eval() to rounding.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    twin = revert(copy.deepcopy(model)).eval()
    try:
        traced = fx.symbolic_trace(twin)
    except Exception as error:
        raise ValueError(
            f"given a {type(model).__name__} that torch.fx cannot trace; expected one without control flow on values: "
            "fold its traceable parts one by one"
        ) from error
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if calls[before.target] > 1 or calls[node.target] > 1:
            continue
        fused = _fused(traced.get_submodule(str(before.target)), traced.get_submodule(str(node.target)))
        if fused is not None:
            traced.set_submodule(str(before.target), fused)
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer that computes both, or None where torch's fusion does not apply."""
    if type(norm) not in NORMS or norm.running_mean is None:
        return None
    if type(layer) in CONVOLUTIONS:
        return fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var,arg-type]
    if type(layer) in TRANSPOSED and layer.groups == 1:
        return fuse_conv_bn_eval(layer, norm, transpose=True)  # type: ignore[type-var,arg-type]
    if type(layer) is nn.Linear and layer.out_features == norm.num_features:
        return fuse_linear_bn_eval(layer, norm)  # type: ignore[arg-type]
    return None
