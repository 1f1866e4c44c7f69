"""Where each rank runs: versions, machine, device, network; and whether the ranks agree."""

import contextlib
import os
import platform
import re
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import kernels
from .._version import __version__
from ..control import listed
from .finding import Finding, by_rank, table

NONE = "-"


class Facts(NamedTuple):
    """What a rank knows of itself, as text; the names are the columns of the table."""

    host: str
    os: str
    python: str
    torch: str
    syncbn: str
    kernels: str  # composed of torch's operators, or compiled; and whether C++ launches them
    cuda: str  # what torch was built for
    nccl: str
    driver: str  # of NVIDIA's GPUs
    backend: str
    device: str
    interface: str  # name and address, of Gloo or NCCL

    @property
    def on_loopback(self) -> bool:
        return self.interface.startswith("lo ") or " 127." in self.interface


MATTER = ("torch", "syncbn", "cuda", "nccl", "backend")  # python: by its minor version


def facts(backend: str, device: torch.device) -> Facts:
    """Of this process."""
    on_gpu = device.type == "cuda"
    return Facts(
        host=socket.gethostname(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        syncbn=__version__,
        kernels=_kernels(device),
        cuda=torch.version.cuda or NONE,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if on_gpu and backend == "nccl" else NONE,
        driver=driver() or NONE,
        backend=backend,
        device=torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        interface=interface(backend),
    )


def _kernels(device: torch.device) -> str:
    picked: Any = kernels.pick(torch.empty(1, 1, device=device))
    found = "composed" if picked is kernels.composed() else "compiled"
    if kernels.extension.library is None:
        return found
    launched = getattr(picked, "__name__", "") == f"{kernels.__name__}.host"
    return f"{found}, {'launched' if launched else 'recorded'} by C++"  # what `python -m syncbn build` made


def driver() -> str:
    """The version of NVIDIA's, as nvidia-smi tells it, or the kernel; nothing where it is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0:
            return done.stdout.split("\n", 1)[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        pass  # a container may be without it
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else ""
    return ""


def interface(backend: str) -> str:
    """The network interface that the backend takes, and its address: what the user names, or what the backend chooses."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    addresses = _addresses()
    if os.environ.get(variable):
        name = os.environ[variable]
        return f"{name} {addresses.get(name, '')} ({variable})"
    if backend == "nccl":  # InfiniBand first, loopback and containers last
        names = sorted(addresses, key=lambda name: (name.startswith(("lo", "docker")), not name.startswith("ib")))
        return f"{names[0]} {addresses[names[0]]}" if names else "?"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # as Gloo does where the hostname has no address
    return f"{next((name for name, mine in addresses.items() if mine == address), '?')} {address}"


def _addresses() -> dict[str, str]:
    """The IPv4 address of each interface; none where the system cannot be asked."""
    found = {}
    try:
        import fcntl

        names = [name for _, name in socket.if_nameindex()]
    except (ImportError, OSError):
        return {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name in names:
            try:
                answer = fcntl.ioctl(asking.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def shown(ranks: Sequence[Facts]) -> str:
    """A row for each set of ranks that have the same to say."""
    rows = [(listed(those), *facts) for facts, those in by_rank(ranks).items()]
    return table([("", *(name if name != "os" else "OS" for name in Facts._fields)), *rows])


def judge(ranks: Sequence[Facts]) -> list[Finding]:
    """Whether versions agree, and nodes can reach each other."""
    found = []
    values = {name: [getattr(facts, name) for facts in ranks] for name in MATTER}
    values["python"] = [".".join(facts.python.split(".")[:2]) for facts in ranks]
    for name, given in values.items():
        groups = by_rank(given)
        if len(groups) > 1:
            told = "; ".join(f"{value} on {listed(those)}" for value, those in groups.items())
            advice = "start every rank alike" if name == "backend" else "install the same version on every machine"
            found.append(Finding(f"{name} differs between ranks, {told}", advice))
    hosts = len({facts.host for facts in ranks})
    lost = [rank for rank, facts in enumerate(ranks) if facts.on_loopback]
    if hosts > 1 and lost:
        variable = f"{ranks[0].backend.upper()}_SOCKET_IFNAME"
        advice = f"set {variable} there to the interface of the network between the machines"
        found.append(Finding(f"the ranks are on {hosts} hosts, and {listed(lost)} on loopback", advice))
    return found or [Finding("every rank has the same versions and backend")]
