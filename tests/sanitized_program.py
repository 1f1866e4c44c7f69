"""What test_devices_training.py has compute-sanitizer watch: steps by the kernels of a device. The sizes fit no tile.

python sanitized_program.py cpu|cuda
"""

import itertools
import sys

import batches
import torch
from batches import Case
from test_fused import plain_or_fused

from syncbn import kernels


def main() -> None:
    device = sys.argv[1]
    kernels.TRITON_FROM_BYTES = 0
    spaces, dtypes, layouts = ("0d", "2d", "3d"), (torch.float32, torch.bfloat16), ("contiguous", "channels_last")
    steps = 0
    for space, dtype, layout, fused in itertools.product(spaces, dtypes, layouts, batches.FUSED):
        case = Case(1, "equal", space, dtype, layout, fused=fused)
        layer = plain_or_fused(case).to(device)
        (x,), (dy,) = batches.make(case)
        leaves = [batches.place(t, device).requires_grad_() for t in (x, *(batches.residuals(case) or []))]
        found = torch.autograd.grad(layer(*leaves), leaves, batches.place(dy, device))
        assert all(gradient.isfinite().all() for gradient in found)
        steps += 1
    x = torch.randn(3, 5, 71, 67, device=device, requires_grad=True)  # a sum is shared by several programs
    plain_or_fused(Case(1)).to(device)(x).square().sum().backward()
    print(f"{steps + 1} steps on {device}")


if __name__ == "__main__":
    main()
