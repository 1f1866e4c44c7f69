"""The programs of launch/, started by torch's launcher as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"


RUNS = [(1, ()), (2, ()), (2, ("--bn", "local"))]


def train(world_size: int, *options: str) -> str:
    """What launch/train.py prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*launcher, str(LAUNCH / "train.py"), "--epochs", "1", *options],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?:loss|images:) (\d+\.\d+)", printed)]


def test_the_training_program_gives_the_same_on_two_processes_as_on_one():
    """Batches of 33 on two ranks: shares of 17 and 16. Printed to 4 digits."""
    alone, two, local = (figures(train(size, "--batch-size", "33", *bn)) for size, bn in RUNS)
    assert len(alone) == len(two) == 2
    assert two == pytest.approx(alone, abs=2e-3)
    assert alone[-1] > 0.5
    assert abs(local[0] - alone[0]) > 4e-3, "local batch norm is another network"
