"""torchrun, with two changes: where its stores listen, and what a restart finds in them.

python launch/agent.py --nproc-per-node 2 launch/train.py           options: those of torchrun
"""

import socket
import sys
from typing import Any

import torch.distributed
import torch.distributed.run
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler


class Store(torch.distributed.TCPStore):
    """Listens on the address that it is given: a store has no authentication, and torch's listens on every interface."""

    def __init__(self, host_name: str, port: int, world_size=None, is_master=False, *more: Any, **options: Any):
        if is_master:
            family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
            try:
                listening = socket.create_server(address[:2], family=family, backlog=1024)
            except OSError as error:  # as torch's: upon it an agent may join the store of another
                raise RuntimeError(f"no store on {host_name}:{port}: {error}") from error
            port, options["master_listen_fd"] = listening.getsockname()[1], listening.detach()
        super().__init__(host_name, port, world_size, is_master, *more, **options)


def rendezvous(handler: Any, meet: Any = DynamicRendezvousHandler.next_rendezvous) -> Any:
    """A new store each time. In torch's one store for all restarts, workers find, and try, addresses of those that are dead."""
    handler._shared_tcp_store_server = handler._bootstrap_store_info = None
    return meet(handler)


if __name__ == "__main__":
    torch.distributed.TCPStore = c10d_rendezvous_backend.TCPStore = Store  # type: ignore[misc, attr-defined]
    DynamicRendezvousHandler.next_rendezvous = rendezvous  # type: ignore[method-assign]
    given = any(argument.startswith(("--rdzv", "--standalone", "--master")) for argument in sys.argv)
    torch.distributed.run.main([*([] if given else ["--standalone", "--local-addr=127.0.0.1"]), *sys.argv[1:]])
