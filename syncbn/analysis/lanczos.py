"""The ends of the spectrum of a symmetric operator that is known by its products alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Ritz(NamedTuple):
    """Approximate eigenvalues, largest first; NaN where a product was not finite.

    An eigenvalue lies within each one's residual of it, apart from the rounding of the products, which are in the dtype of the
    network.
    """

    values: Tensor  # (k,) float64
    residuals: Tensor  # (k,) ‖A·x − θ·x‖ of the unit vector x that belongs to θ


def lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Ritz:
    """Lanczos' method with full reorthogonalization, in float64 (Golub & Van Loan, Matrix Computations, chapter 10).

    One product per iteration; `iterations` vectors are kept. Exact after as many iterations as there are dimensions; ends
    early in an invariant subspace. The outer values converge first, multiplicities are not seen.

    Args:
        multiply: (n,) → (n,), symmetric and linear; the same result on every rank.
        start: (n,) float64, not zero, the same on every rank.
    """
    count = min(iterations, len(start))
    basis = start.new_empty(count, len(start))
    basis[0] = start / start.norm()
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    scale = start.new_zeros(())
    for number in range(1, count + 1):
        spanned = basis[:number]
        product = multiply(spanned[-1])
        diagonal.append(product @ spanned[-1])
        scale = torch.maximum(scale, product.norm())
        for _twice in range(2):
            product = product - spanned.T @ (spanned @ product)
        beside.append(product.norm())
        if beside[-1] <= 1e-13 * scale:
            break
        if number < count:
            basis[number] = product / beside[-1]
    if not torch.stack([*diagonal, *beside]).isfinite().all():
        return Ritz(*start.new_full((2, len(diagonal)), math.nan))
    off = torch.stack(beside[:-1]) if len(beside) > 1 else start.new_zeros(0)
    values, vectors = torch.linalg.eigh(torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1))
    return Ritz(values.flip(0), (beside[-1] * vectors[-1].abs()).flip(0))
