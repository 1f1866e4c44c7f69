"""A data-parallel training program with synchronized batch norm, to start or to copy.

    torchrun --standalone --nproc-per-node 2 launch/train.py --bn syncbn

Trains a small network on scikit-learn's digits and prints the loss of each epoch and the accuracy on held-out images. Runs
on GPUs with NCCL where there is one for each process, else on CPUs with Gloo.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bn", choices=("local", "torch", "syncbn"), default="syncbn", help="torch: on GPUs only")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples of all processes in a step")
    options = parser.parse_args()

    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)
    model = network().to(device)
    if options.bn == "syncbn":
        syncbn.convert(model)
    elif options.bn == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

    for epoch in range(options.epochs):
        order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch)).to(device)
        total = torch.zeros((), device=device)
        for batch in order.split(options.batch_size):
            mine = batch.tensor_split(world_size)[rank]  # shares may be unequal: hence the sum, times W / N
            loss = F.cross_entropy(ddp(images[mine]), labels[mine], reduction="sum")
            optimizer.zero_grad()
            (loss * world_size / len(batch)).backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / len(order):.4f}", flush=True)

    with torch.no_grad():
        right = (ddp.eval()(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
    if rank == 0:
        print(f"accuracy on held-out images: {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
