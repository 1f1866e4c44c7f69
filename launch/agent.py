"""torchrun whose stores listen on the address that they are given, where torch's own listen on every interface.

    python launch/agent.py --nproc-per-node 2 launch/train.py           options: those of torchrun

A store has no authentication: who reaches it is in the job. Given no endpoint, it listens on loopback.
"""

import socket
import sys
from typing import Any

import torch.distributed
import torch.distributed.run
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend


class Store(torch.distributed.TCPStore):
    """A TCPStore of one address. A taken port is a RuntimeError, upon which an agent may join the store that is there."""

    def __init__(self, host_name: str, port: int, world_size: int | None = None, is_master: bool = False, **options: Any):
        if is_master:
            family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
            try:
                listening = socket.create_server(address[:2], family=family, backlog=1024)
            except OSError as error:
                raise RuntimeError(f"no store on {host_name}:{port}: {error}") from error
            port, options["master_listen_fd"] = listening.getsockname()[1], listening.detach()
        super().__init__(host_name, port, world_size, is_master, **options)


def main() -> None:
    torch.distributed.TCPStore = c10d_rendezvous_backend.TCPStore = Store  # type: ignore[misc, attr-defined]
    arguments = sys.argv[1:]
    if not any(argument.startswith(("--rdzv", "--standalone", "--master")) for argument in arguments):
        arguments = ["--standalone", "--local-addr=127.0.0.1", *arguments]
    torch.distributed.run.main(arguments)


if __name__ == "__main__":
    main()
