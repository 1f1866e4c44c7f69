"""What NCCL has to be told before it starts, so that ranks can share a GPU: for correctness, at milliseconds an operation."""

import os


def settings(rank: int, size: int, gpus: int, version: tuple[int, ...]) -> dict[str, str]:
    """The environment of a rank: all of them are on this machine, and several on a GPU where there are fewer GPUs than ranks.

    From 2.30 on NCCL allows that; before, it is told that each rank is a machine of its own and knows them by sockets alone.
    """
    found = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
    if size <= gpus:
        return found
    if version >= (2, 30):
        return found | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    apart = {"NCCL_HOSTID": f"syncbn-rank-{rank}", "NCCL_NET": "Socket", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    return found | apart


def prepare(rank: int, size: int) -> None:
    """Set this process up, before its first group, to be a rank on a GPU."""
    import torch

    # What CUDA's deterministic mode, in which torch fills memory, asks of matrix products.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    gpus = torch.cuda.device_count()
    os.environ.update(settings(rank, size, gpus, torch.cuda.nccl.version()))
    torch.cuda.set_device(rank % gpus)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with that of a CPU
