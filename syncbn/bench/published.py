"""What others published of NCCL, by name; none of it was measured here."""

from typing import NamedTuple

from .alpha_beta import Model


class Published(NamedTuple):
    """An all_reduce of a few kilobytes."""

    ranks: int
    node_size: int
    lower: float  # seconds
    upper: float
    hardware: str

    @property
    def seconds(self) -> float:
        return (self.lower + self.upper) / 2


ALL_REDUCE = [
    Published(8, 8, 20e-6, 25e-6, "8 H100 of one node, NVLink"),
    Published(16, 8, 30e-6, 47e-6, "16 GPUs on two nodes"),
    Published(256, 8, 62e-6, 65e-6, "256 A100 on 32 nodes"),
]

# A ring all_gather by the constants of NCCL's own cost model (src/graph/tuning.cc, protocol LL): 6.6 µs to begin, 0.6 µs for a
# round over NVLink and 2.7 µs over the network. Nobody's measurement: no latency of a large all_gather was found published. The
# launch, which published latencies hold, is not in it, so that with few ranks it flatters the all_gather.
RING_OVERHEAD = 6.6e-6
RING_ROUND_IN_NODE = 0.6e-6
RING_ROUND_BETWEEN_NODES = 2.7e-6


def ring_all_gather(ranks: int, node_size: int, size: int, beta: float) -> float:
    """Seconds of NCCL's ring, one round in node_size between nodes."""
    between = ranks / node_size if ranks > node_size else 0.0
    within = max(0.0, ranks - 1 - between)
    model = Model(RING_OVERHEAD + between * RING_ROUND_BETWEEN_NODES, RING_ROUND_IN_NODE, beta)
    return model.overhead + model.alpha * within + model.beta * (ranks - 1) * size
