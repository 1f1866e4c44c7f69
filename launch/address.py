"""For several_nodes.sh: this machine's address towards the rendezvous, and whether that is here.

python launch/address.py 10.0.0.1:29400 2           the endpoint, and how many machines come to it
"""

import socket
import sys


def towards(endpoint: str, nodes: str) -> tuple[str, str]:
    """This machine's address on the way to the endpoint, and torchrun's `--rdzv-conf` for it.

    Exits where the endpoint has no way to it, or is a name for loopback, which the other machines know as another address.
    """
    host = endpoint.rsplit(":", 1)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except (OSError, UnicodeError) as error:  # the latter of a name that is none
            sys.exit(f"several_nodes.sh: given ENDPOINT={endpoint} ({error}); expected the address:port of one of the machines")
        (ours, _), (theirs, _) = probe.getsockname(), probe.getpeername()
    if not theirs.startswith("127."):
        return ours, f"is_host={int(ours == theirs)}"
    if nodes != "1" and not host.startswith(("127.", "localhost")):
        sys.exit(
            f"several_nodes.sh: given ENDPOINT={endpoint}, which is {theirs} on this machine, where no other reaches it; "
            "expected this machine's address:port on the network between them"
        )
    return ours, ""  # several agents of this machine may meet, and the first to come makes the store: torch's own guess


if __name__ == "__main__":
    print(*towards(*sys.argv[1:]))
