"""What the collectives of a layer, and a ResNet-50 step, take on many ranks: modelled, from models fitted to latencies.

Assumed, and recorded in each row: the network bandwidth of a GPU, the computing time of an image, the shortest step. Not
counted: the all_reduce of the gradients, which overlaps with the backward, in any of the schemes.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import published
from .alpha_beta import Fitted, Model, Terms, fitted, ring, tree

RANKS = [2**power for power in range(1, 15)]  # to 16 384
# Output channels of the 53 batch norm layers of a ResNet-50: the first; then by stage, bottleneck (C, C, 4C), and a shortcut.
RESNET50 = [64] + [
    channels
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512))
    for channels in [*[width, width, 4 * width] * blocks, 4 * width]
]
Latency = Callable[[int, int], float]  # (ranks, bytes of a rank's message) → seconds


class Scheme(NamedTuple):
    """How the layers of a job exchange statistics."""

    forward: Latency
    backward: Latency
    value: int  # bytes of a number on the wire


class Assumed(NamedTuple):
    images_per_rank: int  # weak scaling
    global_batch: int  # strong scaling
    seconds_per_image: float
    floor: float  # seconds of the shortest step


def published_model() -> Fitted:
    """The model of NCCL's all_reduce, fitted to the published latencies; they tell nothing of bytes."""
    terms = [Terms(tree(one.ranks, one.node_size, 0).rounds, 0) for one in published.ALL_REDUCE]
    return fitted(terms, [one.seconds for one in published.ALL_REDUCE])


def nccl(node_size: int, beta: float) -> dict[str, Latency]:
    """By operation: all_reduce by the published latencies, all_gather by NCCL's own constants, all_reduce in each node."""
    model = published_model().model._replace(beta=beta)
    return {
        "all_reduce": lambda ranks, size: model.seconds(tree(ranks, node_size, size)),
        "all_gather": lambda ranks, size: published.ring_all_gather(ranks, node_size, size, beta),
        "all_reduce in a node": lambda ranks, size: model.seconds(tree(min(ranks, node_size), node_size, size)),
    }


def gloo(models: Mapping[str, Model], node_size: int) -> dict[str, Latency]:
    """By operation, from models fitted to Gloo, for ranks with a core each."""

    def latency(operation: str, most: int) -> Latency:
        model = models[operation]
        return lambda ranks, size: model.seconds(ring(operation, min(ranks, most), size))

    found = {operation: latency(operation, RANKS[-1]) for operation in models}
    if "all_reduce" in models:
        found["all_reduce in a node"] = latency("all_reduce", node_size)
    return found


def schemes(operations: Mapping[str, Latency]) -> dict[str, Scheme]:
    """syncbn in one group and in groups of a node; and torch.nn.SyncBatchNorm, which gathers in forward, and sends float32."""
    reduce, gather, node = (operations[name] for name in ("all_reduce", "all_gather", "all_reduce in a node"))
    return {
        "all_reduce": Scheme(reduce, reduce, 8),
        "all_gather forward": Scheme(gather, reduce, 4),
        "all_reduce in a node": Scheme(node, node, 8),
    }


def step_communication(scheme: Scheme, ranks: int) -> float:
    """Seconds that the layers of a ResNet-50 wait for their collectives, none of which overlaps with computing."""
    if ranks == 1:
        return 0.0
    value = scheme.value
    return sum(scheme.forward(ranks, value * (2 * c + 1)) + scheme.backward(ranks, value * 2 * c) for c in RESNET50)


def computing(images: float, assumed: Assumed) -> float:
    """Seconds of a step of one rank without any collective."""
    return max(assumed.floor, images * assumed.seconds_per_image)


def efficiency(kind: str, scheme: Scheme, ranks: int, assumed: Assumed) -> tuple[float, float]:
    """(seconds of a step, efficiency): a rank's images, or the whole batch's, in a second, over those of one rank alone."""
    images = float(assumed.images_per_rank) if kind == "weak" else assumed.global_batch / ranks
    step = computing(images, assumed) + step_communication(scheme, ranks)
    alone = assumed.images_per_rank if kind == "weak" else assumed.global_batch
    return step, (images / step) / (alone / computing(alone, assumed))
