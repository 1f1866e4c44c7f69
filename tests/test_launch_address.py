"""Where the programs of launch/ meet: on the address given, and nowhere else."""

import re
import socket
import subprocess
import sys

import address
import pytest
from launched import LAUNCH, environment, free_port, start

LISTENING = """
import os, socket
for port in (int(os.environ["MASTER_PORT"]), {port}):
    for address in ("127.0.0.1", "127.0.0.2"):
        print(socket.socket().connect_ex((address, port)), end=" ")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address, as Linux has")
def test_the_rendezvous_listens_on_the_address_given_and_nowhere_else(tmp_path):
    """127.0.0.2 is this machine too, and answers where something listens on every interface."""
    port = free_port()
    (tmp_path / "program.py").write_text(LISTENING.format(port=port))
    where = {"PROGRAM": str(tmp_path / "program.py"), "ENDPOINT": f"127.0.0.1:{port}", "PROCESSES": "1"}
    assert start(LAUNCH / "several_nodes.sh", **where).split() == ["0", "111", "0", "111"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address, as Linux has")
def test_a_static_rendezvous_listens_on_the_address_given_and_nowhere_else(tmp_path):
    """torchrun's --master-addr, which gives its store the timeout by position."""
    port = free_port()
    (tmp_path / "program.py").write_text(LISTENING.format(port=port))
    where = ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1"]
    assert start(sys.executable, LAUNCH / "agent.py", *where, tmp_path / "program.py").split() == ["0", "111", "0", "111"]


class _Hosts(socket.socket):
    """Knows nodea, as /etc/hosts of Debian does on that machine."""

    def connect(self, where):
        super().connect(({"nodea": "127.0.1.1"}.get(where[0], where[0]), where[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address, as Linux has")
def test_an_endpoint_by_a_name_for_loopback_is_an_error_where_other_machines_are_to_come(monkeypatch):
    monkeypatch.setattr(socket, "socket", _Hosts)
    expected = "given ENDPOINT=nodea:29400, which is 127.0.1.1 on this machine, where no other reaches it; expected this"
    with pytest.raises(SystemExit, match=rf"^several_nodes.sh: {re.escape(expected)} machine's address:port"):
        address.towards("nodea:29400", "2")
    for endpoint, nodes in (("nodea:29400", "1"), ("localhost:29400", "2"), ("127.0.1.1:29400", "2")):
        assert address.towards(endpoint, nodes)[1] == "", "all agents are of this machine"


def test_an_endpoint_that_nobody_knows_is_an_error_of_one_line():
    command = [str(LAUNCH / "several_nodes.sh")]
    where = environment(ENDPOINT="nowhere.invalid:29400")
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    expected = (
        r"several_nodes.sh: given ENDPOINT=nowhere.invalid:29400 \(.*\); expected the address:port of one of the machines\n"
    )
    assert re.fullmatch(expected, done.stderr)
