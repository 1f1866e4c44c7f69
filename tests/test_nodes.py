"""Two nodes on one machine: torchrun's agents in a network namespace each, with a hostname and an address of its own.

The program is launch/several_nodes.sh, the same command on both.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import launched
import pytest
from launched import LAUNCH, NEAR, OPTIONS, apart, environment, read

ENDPOINT = "10.77.0.1:29411"  # a port of a namespace is nobody else's
CUT_TIMEOUT = 4  # seconds that the workers wait for a peer where the link is cut
MARGIN = 25  # seconds in which an interpreter ends on a loaded machine
whole = launched.whole


class Node(NamedTuple):
    namespace: str
    interface: str
    address: str

    def command(self, *command: object) -> list[str]:
        """The command that runs `command` on this node, with its hostname, and ends it where it does not end by itself."""
        rename = ["sh", "-c", 'hostname "$0" && exec "$@"', self.namespace]
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *rename]
        return [str(part) for part in (*enter, "timeout", "--kill-after=5", "80", *command)]

    def start(self, *command: object, **more: str) -> "subprocess.Popen[str]":
        env = environment(**more, GLOO_SOCKET_IFNAME=self.interface, NODES="2", ENDPOINT=ENDPOINT, PROCESSES="1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(*command), env=env, **pipes)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def up(node: Node, peer: str) -> None:
    ip("-n", node.namespace, "link", "set", "lo", "up")
    ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
    ip("-n", node.namespace, "link", "set", node.interface, "up")


def processes(node: Node) -> dict[int, str]:
    """The command lines of what runs on a node, by process."""
    found = subprocess.run(["ip", "netns", "pids", node.namespace], capture_output=True, text=True, timeout=10, check=True)
    lines = {}
    for process in found.stdout.split():
        with contextlib.suppress(OSError):
            lines[int(process)] = Path("/proc", process, "cmdline").read_text().replace("\0", " ")
    return lines


def workers(node: Node) -> list[str]:
    """The command lines of the training processes of a node."""
    return [
        line for line in processes(node).values() if "program.py" in line and "agent.py" not in line and "hostname" not in line
    ]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    missing = [tool for tool in ("ip", "unshare", "timeout", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} to make network namespaces")
    made = [
        Node(f"syncbn-{letter}-{os.getpid()}", f"sbn{letter}{os.getpid()}", f"10.77.0.{n}")
        for n, letter in ((1, "a"), (2, "b"))
    ]
    try:
        try:
            for node in made:
                ip("netns", "add", node.namespace)
            first, second = made
            ends = ["link", "add", first.interface, "netns", first.namespace, "type", "veth"]
            ip(*ends, "peer", "name", second.interface, "netns", second.namespace)
            for node in made:
                up(node, first.interface)
            subprocess.run(first.command("true"), check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"needs the right to make network namespaces: {error}")
        yield made
    finally:
        for node in made:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True, timeout=10, check=False)


@pytest.fixture
def start(nodes) -> Iterator:
    """Starts a command on a node; what is left on the nodes at the end of the test is killed."""
    started = []

    def start(node: Node, *command: object, **more: str) -> "subprocess.Popen[str]":
        started.append(node.start(*command, **more))
        return started[-1]

    yield start
    for node in nodes:
        for process in processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    for process in started:
        process.communicate(timeout=10)


REACH = """
import os, socket, sys
addresses = ("127.0.0.1", "10.77.0.1", "10.77.0.2")
print(socket.gethostname(), *(socket.socket().connect_ex((address, 4321)) for address in addresses))
"""
LISTEN = """
import socket
listening = socket.create_server(("0.0.0.0", 4321))
print("listening", flush=True)
input()
"""


def test_a_node_is_reached_by_its_address_and_not_over_loopback(nodes, start):
    """What listens on the first node answers there on loopback; on the second the same address is another machine's."""
    listening = subprocess.Popen(
        nodes[0].command(sys.executable, "-c", LISTEN), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with listening:
        assert listening.stdout.readline() == "listening\n"
        seen = [start(node, sys.executable, "-c", REACH).communicate(timeout=20)[0].split() for node in nodes]
        listening.communicate("\n", timeout=20)
    assert seen == [
        [nodes[0].namespace, "0", "0", "111"],
        [nodes[1].namespace, "111", "0", "111"],
    ]
    assert socket.gethostname() not in (node.namespace for node in nodes)


def test_two_nodes_train_as_one_process(nodes, start, tmp_path, whole):
    path = tmp_path / "run.pt"
    options = [*OPTIONS, "--checkpoint", path, "--timeout=60"]
    running = [start(node, LAUNCH / "several_nodes.sh", *options) for node in nodes]
    printed = [process.communicate(timeout=90) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert apart(read(path), whole) < NEAR
    assert ["accuracy" in out for out, _ in printed].count(True) == 1


AS_DEBIAN = """mount --bind "$0" /etc/hosts && exec env ENDPOINT="$(hostname)":29411 "$@\""""


def test_a_node_whose_own_name_is_loopback_says_so_at_once(nodes, start, tmp_path):
    """There the store would listen for no other node."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {nodes[0].namespace}\n")
    command = ["sh", "-c", AS_DEBIAN, tmp_path / "hosts", LAUNCH / "several_nodes.sh", *OPTIONS]
    running = start(nodes[0], *command)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 1
    given = f"several_nodes.sh: given ENDPOINT={nodes[0].namespace}:29411, which is 127.0.1.1 on this machine"
    assert said.startswith(given), said


PAUSED = """
import datetime, os, pathlib, socket, sys, time
sys.path.insert(0, {launch!r})
import torch, train
import torch.distributed as dist

steps = 0

def pause(module, inputs):  # DistributedDataParallel has done its part: what comes next is the first layer's collective
    global steps
    steps += 1
    if steps == 6:
        pathlib.Path({directory!r}, "paused-" + socket.gethostname()).touch()
        while not pathlib.Path({directory!r}, "cut").exists():
            time.sleep(0.02)

build = train.build

def build_paused(*arguments):
    network, optimizer = build(*arguments)
    network.register_forward_pre_hook(pause)
    # From here on: to meet may take longer where a machine is loaded.
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(datetime.timedelta(seconds={timeout}))
    return network, optimizer

train.build = build_paused
train.main()
"""


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_cut_link_ends_in_an_error_on_both_nodes(nodes, start, tmp_path):
    """In mid-training, where the next message is a layer's: its error names layer, phase and rank. The agents follow."""
    (tmp_path / "program.py").write_text(PAUSED.format(launch=str(LAUNCH), directory=str(tmp_path), timeout=CUT_TIMEOUT))
    command = ["sh", "-c", f'exec "$0" "$@" 2> {tmp_path}/$(hostname).txt', LAUNCH / "several_nodes.sh", *OPTIONS]
    for node in nodes:
        start(node, *command, "--timeout=60", PROGRAM=str(tmp_path / "program.py"))
    errors = [tmp_path / f"{node.namespace}.txt" for node in nodes]
    assert wait_for(lambda: len(list(tmp_path.glob("paused-*"))) == 2, 60), [file.read_text() for file in errors]
    assert [len(workers(node)) for node in nodes] == [1, 1]
    ip("-n", nodes[0].namespace, "link", "set", nodes[0].interface, "down")
    try:
        (tmp_path / "cut").touch()
        # The agents are not waited for: the one that is cut off from the store waits for it.
        ended = wait_for(lambda: not any(workers(node) for node in nodes), CUT_TIMEOUT + MARGIN)
    finally:
        ip("-n", nodes[0].namespace, "link", "set", nodes[0].interface, "up")
    texts = [file.read_text() for file in errors]
    assert ended, texts
    told = [re.findall(r"CollectiveError: (.*)", text) for text in texts]
    assert all(told), texts
    expected = r"all_reduce of layer '1' failed in forward on rank ([01]) of 2, in a group of 2 on cpu; expected every rank .*"
    expected += rf"within 0:00:0{CUT_TIMEOUT}: look for the first error among the other ranks"
    assert {re.fullmatch(expected, line)[1] for lines in told for line in lines} == {"0", "1"}
