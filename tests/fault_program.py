"""What test_faults.py starts by torchrun: trains, and something happens to rank 1 in the third step.

torchrun ... fault_program.py FAULT SECONDS
"""

import sys

import torch
import torch.distributed as dist
from test_faults import VICTIM, Net, impatient
from torch.nn.parallel import DistributedDataParallel

import syncbn


def main() -> None:
    fault, seconds = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # processes may start far apart; what counts is the group of the layers
    group = impatient(seconds)
    model = DistributedDataParallel(syncbn.convert(Net(fault, dist.get_rank() == VICTIM), group))
    dist.barrier()
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()


if __name__ == "__main__":
    main()
