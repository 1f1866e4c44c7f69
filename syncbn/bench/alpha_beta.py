"""The α-β model of a collective: T = overhead + α·rounds + β·bytes, fitted to what was measured.

    ring all_reduce     2(W − 1) rounds,     2(W − 1)/W · B bytes from each rank       Gloo
    ring all_gather      (W − 1) rounds,      (W − 1)   · B bytes from each rank       Gloo, NCCL
    tree all_reduce      2·log2(nodes) rounds between nodes,    2·B bytes              NCCL

W ranks, B bytes of the message of one rank. Where ranks outnumber the cores of their machine they take turns: a round counts
ranks/cores times.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Terms(NamedTuple):
    """What a collective is made of."""

    rounds: float
    bytes: float


class Model(NamedTuple):
    """Seconds; not one of them is negative."""

    overhead: float
    alpha: float  # a round
    beta: float  # a byte

    def seconds(self, terms: Terms) -> float:
        return self.overhead + self.alpha * terms.rounds + self.beta * terms.bytes


def ring(operation: str, ranks: int, size: int, turns: float = 1.0) -> Terms:
    """A ring over all ranks; `turns` is how many times a round counts."""
    if operation == "all_gather":
        return Terms(turns * (ranks - 1), (ranks - 1) * size)
    return Terms(turns * 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size)


def tree(ranks: int, node_size: int, size: int) -> Terms:
    """An all_reduce up and down a binary tree of nodes; what happens inside a node is overhead."""
    nodes = max(1.0, ranks / node_size)
    return Terms(2 * math.log2(nodes), 2 * size)


def fit(terms: Sequence[Terms], seconds: Sequence[float]) -> Model:
    """The model of least squares of relative error, among those without a negative part.

    Raises:
        ValueError: no measurement.
    """
    if not terms:
        raise ValueError("given no measurement; expected one or more")
    weights = torch.tensor(seconds, dtype=torch.float64).reciprocal()
    columns = torch.tensor([(1.0, *one) for one in terms], dtype=torch.float64) * weights[:, None]
    best, least = Model(0.0, 0.0, 0.0), math.inf
    parts = range(3)
    for chosen in (list(some) for count in (1, 2, 3) for some in itertools.combinations(parts, count)):
        scale = columns[:, chosen].norm(dim=0)
        if (scale == 0).any():
            continue
        target = torch.ones(len(terms), 1, dtype=torch.float64)
        found = torch.linalg.lstsq(columns[:, chosen] / scale, target, driver="gelsd").solution[:, 0] / scale
        if (found < 0).any():
            continue
        whole = torch.zeros(3, dtype=torch.float64)
        whole[chosen] = found
        residual = float((columns @ whole - 1).square().sum())
        if residual < least * (1 - 1e-9):
            best, least = Model(*whole.tolist()), residual
    return best


class Fitted(NamedTuple):
    """A model, and how well it fits."""

    model: Model
    deviation: float  # the largest relative difference from what it was fitted to
    points: int


def fitted(terms: Sequence[Terms], seconds: Sequence[float]) -> Fitted:
    """`fit`, and how far it is off."""
    model = fit(terms, seconds)
    off = max(abs(model.seconds(one) / taken - 1) for one, taken in zip(terms, seconds, strict=True))
    return Fitted(model, off, len(terms))
