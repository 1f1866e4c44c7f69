"""Two nodes on one machine: network namespaces with a virtual link between them, which may be throttled.

For root on Linux. What is made here goes when the context ends, whatever happens.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from .processes import Place


@contextlib.contextmanager
def two_nodes(rate: str | None = None, latency: str = "200ms") -> Iterator[list[Place]]:
    """The place of a rank on each node. `rate` in the terms of tc's tbf, as "200mbit": each direction of the link has it.

    Raises:
        OSError: they cannot be made here, or not throttled.
    """
    names = [f"syncbn-bench-{letter}-{os.getpid()}" for letter in "ab"]
    links = [f"sbb{letter}{os.getpid()}" for letter in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = ["ip", "link", "add", links[0], "netns", names[0], "type", "veth"]
        _run(*ends, "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            _run("ip", "-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", link)
            for up in ("lo", link):
                _run("ip", "-n", name, "link", "set", up, "up")
            if rate is not None:
                shape = ["tbf", "rate", rate, "burst", "64kb", "latency", latency]
                _run("tc", "-n", name, "qdisc", "add", "dev", link, "root", *shape)
        yield [
            Place(["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": link}) for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
