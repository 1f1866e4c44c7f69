"""Programs of launch/, started as a user would, and how far apart two of their runs end."""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import train

LAUNCH = Path(__file__).parents[1] / "launch"
# 16 steps an epoch of 95 samples, the last of 13: shares of 48 and 47, 7 and 6. So 20 steps pass the end of one.
OPTIONS = ["--dtype=float64", "--batch-size=95", "--steps=20", "--checkpoint-every=7"]
NEAR, FAR = 1e-11, 1e-2  # how far rounding and local batch norm lead in 20 steps: 4e-14 and 0.3 were seen


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "PROCESSES": "2"} | more


def start(*command: object, seconds: float = 200, **more: str) -> str:
    """What a command prints, with more in its environment."""
    line = [str(part) for part in command]
    done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, env=environment(**more), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alone(*options: object) -> None:
    """Train in this process."""
    parsed = train.arguments().parse_args([*OPTIONS, *map(str, options)])
    place = train.start(10)
    try:
        train.train(parsed, place)
    except BaseException as error:  # whose frames hold the model: it goes before the group (see launch/README.md)
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group()


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def apart(state: dict, expected: dict) -> float:
    """The largest difference of parameters, running statistics, momenta and losses, each by the largest of its tensor."""
    assert state["settings"] == expected["settings"]
    assert state["progress"][0] == expected["progress"][0] == 20
    pairs = [(state["network"][name], value) for name, value in expected["network"].items()]
    momenta = [run["optimizer"]["state"] for run in (state, expected)]
    pairs += [(momenta[0][key]["momentum_buffer"], value["momentum_buffer"]) for key, value in momenta[1].items()]
    pairs += [
        (torch.tensor(one), torch.tensor(other)) for one, other in zip(state["progress"], expected["progress"], strict=True)
    ]
    assert len(pairs) == 20 + 11 + 3
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def same_bits(state: dict, other: dict) -> bool:
    assert state["settings"] == other["settings"]
    momenta = [run["optimizer"]["state"] for run in (state, other)]
    return (
        all(torch.equal(value, other["network"][name]) for name, value in state["network"].items())
        and all(torch.equal(momenta[0][key]["momentum_buffer"], momenta[1][key]["momentum_buffer"]) for key in momenta[0])
        and state["progress"][0] == other["progress"][0]
    )


def free_port(low: int = 20000, high: int = 30000) -> int:
    """A port of the range that nothing listens on."""
    for port in np.random.default_rng().permutation(np.arange(low, high)).tolist():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The end of a run of one process."""
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    alone("--checkpoint", path)
    return read(path)
