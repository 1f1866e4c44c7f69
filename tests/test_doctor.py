"""The doctor: what holds is said to hold, and whatever is broken for it is found, named, and ends in exit status 1."""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import interrupts
import pytest
import torch
import worlds
from broken import scaled
from torch import nn

from syncbn import collectives, control, kernels
from syncbn.__main__ import main
from syncbn.convert import convert
from syncbn.doctor import exact, latency, model, place, run
from syncbn.doctor.latency import Key, Measured, Taken
from syncbn.doctor.model import Collective, Layer, Steps
from syncbn.kernels import aten

CPU = torch.device("cpu")
MODULE = "test_doctor"


class Small(nn.Module):
    """Two layers of 16 channels and one of 64."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Conv2d(16, channels, 1), nn.BatchNorm2d(channels))
        self.swap = False

    def forward(self, x):
        one, two = (self.second, self.first) if self.swap else (self.first, self.second)
        return {"logits": self.head(two(one(x)))}


def small():
    return Small(), torch.randn(2, 16, 3, 3)


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def one_rank_has_other_channels():
    return Small(32 if rank() == 2 else 64), torch.randn(2, 16, 3, 3)


def one_rank_has_more():
    made = Small()
    if rank() == 3:
        made.more = nn.BatchNorm1d(7)
    return made, torch.randn(2, 16, 3, 3)


def one_rank_in_another_order():
    made, x = small()
    made.swap = rank() == 1
    return made, x


def one_rank_is_slow():
    made, x = small()
    if rank() == 1:
        made.first.register_forward_pre_hook(lambda layer, inputs: time.sleep(0.2))
    return made, x


def one_rank_fails():
    if rank() == 1:
        raise OSError("no such file of weights")
    return small()


def without_batch_norm():
    return nn.Linear(2, 2), torch.randn(2, 2)


def only_a_model():
    return Small()


def that_exits():
    sys.exit(0)


def that_exits_in_its_forward():
    made, x = small()
    made.register_forward_pre_hook(lambda module, inputs: that_exits())
    return made, x


def that_cannot_be_converted():
    class Own(nn.SyncBatchNorm):
        pass

    return nn.Sequential(Own(16)), torch.randn(2, 16, 3, 3)


def that_cannot_be_moved():
    made, x = small()
    made.to = that_exits
    return made, x


def each_rank_by_itself():
    return convert(Small(), group_size=1), torch.randn(2, 16, 3, 3)


def lazy():
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()), torch.randn(4, 3, 8, 8)


def lazy_of_another_input():
    return lazy()[0], torch.randn(4)


def without_gradient():
    made, x = small()
    made.register_forward_hook(lambda module, inputs, output: output["logits"].argmax(1))
    return made, x


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_command(parser.add_subparsers())
    return parser.parse_args(["doctor", "--repeats=2", "--steps=2", *arguments])


def half_wrong(x, message, affine, running):
    y, saved = NORMALIZE(x, message, affine, running)
    return (y * 1.05 if x.dtype == torch.float16 else y), saved


def composed():
    """Batch norm by the kernels that are broken here, where the compiled ones are there too."""
    return mock.patch.object(kernels, "compiled", return_value=None)


NORMALIZE = aten.normalize
BROKEN = {
    "torch": lambda: mock.patch.object(torch, "__version__", "9.9"),
    "syncbn": lambda: mock.patch.object(place, "__version__", "9.9"),
    "python": lambda: mock.patch.object(place.platform, "python_version", return_value="9.9.1"),
    "cuda": lambda: mock.patch.object(torch.version, "cuda", "9.9"),
    "y": lambda: mock.patch.object(aten, "normalize", scaled(aten.normalize, 0)),
    "dx": lambda: mock.patch.object(aten, "input_gradient", scaled(aten.input_gradient, None)),
    "dweight": lambda: mock.patch.object(aten, "gradient_sums", scaled(aten.gradient_sums, "weight")),
    "dbias": lambda: mock.patch.object(aten, "gradient_sums", scaled(aten.gradient_sums, "bias")),
    "running": lambda: mock.patch.object(aten, "move"),
    "half": lambda: mock.patch.object(aten, "normalize", half_wrong),
    "sum": lambda: mock.patch.object(collectives, "_all_reduce", scaled(collectives._all_reduce, None)),
    "nothing": contextlib.nullcontext,
}


def _examined(world, breakage: str, ranks: tuple[int, ...], sizes: tuple[int, ...], *arguments: str) -> tuple[int, str]:
    """The exit status and what was printed, with something broken on some ranks."""
    broken = BROKEN[breakage]() if world.rank in ranks else contextlib.nullcontext()
    with broken, composed(), mock.patch.object(latency, "SIZES", sizes), contextlib.redirect_stdout(io.StringIO()) as printed:
        return run.examine(options(*arguments), CPU), printed.getvalue()


def examined(breakage: str, ranks: tuple[int, ...] = (2,), *arguments: str, sizes=(64,)) -> tuple[int, list[str]]:
    """The exit status, the same on all four ranks, and the lines that rank 0 printed."""
    results = worlds.run(4, _examined, breakage, ranks, sizes, *arguments)
    assert [printed for _, printed in results[1:]] == [""] * 3
    (status,) = {status for status, _ in results}
    return status, results[0][1].splitlines()


def bad(lines: list[str]) -> list[str]:
    return [line.removeprefix("BAD  ") for line in lines if line.startswith("BAD")]


def test_four_ranks_hold():
    status, lines = examined("nothing", (), f"--model={MODULE}:small", sizes=latency.SIZES)
    assert status == 0
    assert bad(lines) == []
    assert len([line for line in lines if line.startswith("ok   ")]) >= 1 + 4 + 1 + 1
    # Four ranks on fewer cores may wait for each other.
    assert [line for line in lines if re.match("ok   a step of the model issues the same|note ranks spend", line)]
    assert lines[0] == "4 ranks"
    assert lines[-1] == "everything holds"
    text = "\n".join(lines)
    versions = rf"\nranks 0-3  .* {re.escape(sys.version.split()[0])} +{re.escape(torch.__version__)} .* gloo .*\n"
    assert re.search(versions, text)
    for group in (4, 2):
        for channels in (16, 64, 128, 256, 512, 1024, 2048):
            assert re.search(rf"^{group} +{channels}( +\d+ \(\d+ to \d+\)){{2}}$", text, re.MULTILINE)
    assert re.findall(r"^(first|second|head\.1) +(\d+) +(\d+) +(\d+) +\d+$", text, re.MULTILINE) == [
        ("first", "16", "2", str(8 * (33 + 32))),
        ("second", "16", "2", str(8 * (33 + 32))),
        ("head.1", "64", "2", str(8 * (129 + 128))),
    ]
    step = (
        r"a step: \d+\.\d\d ms; its 6 collectives of 3096 bytes: predicted \d+\.\d\d ms, measured \d+\.\d\d ms, on the slowest"
    )
    assert re.search(step, text)
    assert re.search(
        r"group_size=2: predicted \d+\.\d\d ms, saves -?\d+\.\d\d ms a step\ngroup_size=1: predicted 0.00 ms", text
    )


@pytest.mark.parametrize("name", ["torch", "syncbn", "python", "cuda"])
def test_another_version_on_a_rank(name):
    status, lines = examined(name)
    (line,) = bad(lines)
    assert status == 1
    pattern = rf"{name} differs between ranks, \S+ on ranks 0, 1, 3; 9.9 on rank 2: install the same version on every machine"
    assert re.fullmatch(pattern, line)
    assert lines[-1] == "1 finding to see to, marked BAD"


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("y", "y"), ("dx", "dx"), ("dweight", "dweight"), ("dbias", "dbias"), ("running", "running_mean, running_var")],
)
def test_a_layer_that_computes_something_else(name, tensors):
    status, lines = examined(name)
    found = bad(lines)
    assert status == 1
    assert [line.split()[0] for line in found] == ["float32", "float64", "bfloat16", "float16"]
    for line in found:
        assert f"is not batch norm of the whole batch, wrong in {tensors} on rank 2, largest error" in line
        assert "do not train with it here" in line


def test_a_single_dtype_that_is_wrong():
    status, lines = examined("half", (0, 1, 3))
    (line,) = bad(lines)
    assert status == 1
    assert line.startswith("float16 is not batch norm of the whole batch, wrong in y on ranks 0, 1, 3, largest error")


def test_a_backend_that_does_not_sum():
    status, lines = examined("sum", (3,))
    assert status == 1
    assert "all_reduce does not give the sum on rank 3, first in groups of 2 at 64 channels: nothing trained over" in "\n".join(
        lines
    )


MODELS = {
    "one_rank_has_other_channels": "the layers differ between ranks, first where rank 0 has 'head.1' of 64 channels in a group "
    "of 4; rank 2 has 'head.1' of 32 channels in a group of 4: build the same model",
    "one_rank_has_more": "first where rank 0 has no more; rank 3 has 'more' of 7 channels",
    "one_rank_in_another_order": "the collectives of a step differ between ranks, 6 on ranks 0, 2, 3; 6 on rank 1, first where "
    "rank 0 has 'first' forward and rank 1 has 'second' forward: let every rank run the same layers in the same order",
    "one_rank_fails": "no model on rank 1, test_doctor:one_rank_fails failed with OSError: no such file of weights: give",
    "without_batch_norm": "no model on ranks 0-3, test_doctor:without_batch_norm gave a Linear without batch norm layers",
    "only_a_model": "test_doctor:only_a_model returned Small; expected (model, input)",
    "that_exits": "no model on ranks 0-3, test_doctor:that_exits failed with SystemExit: 0: give",
    "that_cannot_be_converted": "test_doctor:that_cannot_be_converted failed with ValueError: given class that_cannot_be_",
    "that_cannot_be_moved": "test_doctor:that_cannot_be_moved failed with TypeError: that_exits() takes 0 positional",
    "lazy_of_another_input": "test_doctor:lazy_of_another_input failed with RuntimeError: Expected",
    "no_such_function": "failed with AttributeError: module 'test_doctor' has no attribute 'no_such_function'",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_examined(name):
    status, lines = examined("nothing", (), f"--model={MODULE}:{name}")
    (line,) = bad(lines)
    assert status == 1
    assert MODELS[name] in line


def test_layers_that_synchronize_with_no_other_rank():
    status, lines = examined("nothing", (), f"--model={MODULE}:each_rank_by_itself")
    assert (status, lines[-1]) == (0, "everything holds")
    assert "ok   a step of the model issues the same collectives on every rank" in lines
    assert not any("times as long" in line for line in lines)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_get_their_sizes_from_the_input():
    status, lines = examined("nothing", (), f"--model={MODULE}:lazy")
    assert (status, lines[-1]) == (0, "everything holds")
    (line,) = [line for line in lines if re.match(r"1 +6 +2 ", line)]
    assert line.split()[:4] == ["1", "6", "2", str(8 * (13 + 12))]
    loaded = model.load(f"{MODULE}:lazy", CPU)
    assert loaded.model.training
    assert loaded.model[1].num_batches_tracked == 0


def test_a_model_that_is_not_there():
    expected = "no_such_module:build failed with ModuleNotFoundError: No module named 'no_such_module'"
    assert model.load("no_such_module:build", CPU) == expected


def test_ranks_that_wait_for_one_of_them_are_told():
    status, lines = examined("nothing", (), f"--model={MODULE}:one_rank_is_slow")
    assert status == 0
    assert any(re.match(r"note ranks spend \d+\.\d times as long in the model's collectives as", line) for line in lines)


def _slow(world):
    real = collectives._all_reduce

    def late(message, call):
        time.sleep(0.02 if world.rank == 1 and call.phase == "backward" else 0)
        return real(message, call)

    with mock.patch.object(collectives, "_all_reduce", late):
        return latency.measure(4, [64], 3, CPU)


def test_what_is_measured_is_the_time_until_the_slowest_rank_has_the_sum():
    taken = latency.slowest(worlds.run(4, _slow))
    assert set(taken) == {Key(2, 64), Key(4, 64)}
    for times in taken.values():
        assert len(times.forward) == len(times.backward) == 3
        assert min(times.backward) > 0.02


TAKEN = {
    Key(4, 16): Taken([9.0, 0.003, 0.001], [0.002] * 3),
    Key(4, 64): Taken([0.01] * 3, [0.02] * 3),
    Key(2, 16): Taken([0.001] * 3, [0.001] * 3),
    Key(2, 64): Taken([0.005] * 3, [0.005] * 3),
}
STEP = [
    Collective("a", "forward", 16, 33, 4),
    Collective("b", "forward", 64, 129, 2),
    Collective("b", "backward", 64, 128, 2),
    Collective("a", "recompute", 16, 33, 4),
    Collective("a", "backward", 16, 32, 4),
]


def test_the_prediction_is_the_sum_of_the_medians():
    assert model.predicted(STEP, TAKEN) == pytest.approx(0.003 + 0.005 + 0.005 + 0.003 + 0.002)
    assert model.predicted(STEP, TAKEN, 4) == pytest.approx(0.003 + 0.01 + 0.02 + 0.003 + 0.002)
    assert model.predicted(STEP, TAKEN, 2) == pytest.approx(0.001 + 0.005 + 0.005 + 0.001 + 0.001)
    assert model.predicted(STEP, TAKEN, 1) == 0
    shown = model.shown([Steps(STEP, 0.019, 0.1)] * 3 + [Steps(STEP, 0.02, 0.05)], TAKEN).splitlines()
    assert [line.split() for line in shown[1:3]] == [["a", "16", "3", "784", "8000"], ["b", "64", "2", "2056", "10000"]]
    assert shown[3:] == [
        "a step: 100.00 ms; its 5 collectives of 2840 bytes: predicted 18.00 ms, measured 20.00 ms, on the slowest rank",
        "group_size=2: predicted 13.00 ms, saves 5.00 ms a step",
        "group_size=1: predicted 0.00 ms, saves 18.00 ms a step",
    ]


FACTS = place.Facts(
    "a", "Linux", "3.11.1", "2.13.0", "0.1", "composed", "12.8", "2.27.3", "570.1", "nccl", "H200", "eth0 10.0.0.1"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nccl": "2.26.2"}, "nccl differs between ranks, 2.27.3 on ranks 0, 2; 2.26.2 on rank 1: install the same version"),
        ({"backend": "gloo"}, "backend differs between ranks, nccl on ranks 0, 2; gloo on rank 1: start every rank alike"),
        (
            {"host": "b", "interface": "lo 127.0.0.1"},
            "the ranks are on 2 hosts, and rank 1 on loopback: set NCCL_SOCKET_IFNAME there to the interface of the network",
        ),
        ({"host": "b", "interface": "? 127.0.1.1"}, "the ranks are on 2 hosts, and rank 1 on loopback"),
    ],
)
def test_what_cannot_be_made_here_is_judged_from_facts(changes, message):
    (found,) = place.judge([FACTS, FACTS._replace(**changes), FACTS])
    assert found.bad
    assert str(found).removeprefix("BAD  ").startswith(message)


def test_what_may_differ():
    other = FACTS._replace(host="b", os="another", python="3.11.9", driver="-", device="A100", interface="eth1 10.0.0.2")
    assert not any(found.bad for found in place.judge([FACTS, other]))
    assert not any(found.bad for found in place.judge([FACTS._replace(interface="lo 127.0.0.1")] * 2))


def test_the_network_interface(monkeypatch):
    monkeypatch.setattr(
        place, "_addresses", lambda: {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.1.2.3", "ib0": "10.9.0.1"}
    )
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(place.socket, "gethostbyname", lambda name: "10.1.2.3")
    assert place.interface("gloo") == "eth0 10.1.2.3"
    assert place.interface("nccl") == "ib0 10.9.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert place.interface("gloo") == "ib0 10.9.0.1 (GLOO_SOCKET_IFNAME)"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which can be asked for the addresses of its interfaces")
def test_the_addresses_of_this_machine():
    assert place._addresses()["lo"] == "127.0.0.1"


def test_a_process_that_is_alone_is_examined_too(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", "--model", f"{MODULE}:small", "--steps=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 rank"
    assert sum("is batch norm of the whole batch" in line for line in lines) == 4
    assert "note a single process, whose layers issue no collective: start it under torchrun to examine them" in lines
    assert "its 6 collectives of 3096 bytes: predicted 0.00 ms" in "\n".join(lines)
    assert not torch.distributed.is_initialized()
    with BROKEN["dx"](), composed():
        assert main(["doctor"]) == 1
    assert len(bad(capsys.readouterr().out.splitlines())) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without_gradient", "ValueError: the model's output has no tensor that"),
        ("that_exits_in_its_forward", "SystemExit: 0; look for the first error"),
    ],
)
def test_a_model_that_fails_in_its_step(name, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    try:
        assert main(["doctor", "--model", f"{MODULE}:{name}"]) == 1
    finally:
        torch.distributed.destroy_process_group()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"syncbn doctor: rank 0: the examination ended with {message}")


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert main(["doctor", "--device=cuda"]) == 1
    assert (
        "given --device cuda for process 2 of this machine, which has 2 GPUs; expected one for each" in capsys.readouterr().err
    )


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "x")
    assert main(["doctor", "--timeout=2"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(f": given {variable}='x' in the environment; expected a whole number, as torchrun gives")


FUNCTIONS = ["--model=build", "--model=:build", "--model=os:"]


def test_a_rank_without_a_job(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["doctor", "--timeout=2"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(": given RANK without WORLD_SIZE in the environment; expected all, as torchrun gives, or no RANK")


USAGE = ["--repeats=1", "--repeats=2000000", "--steps=x", "--timeout=0", "--timeout=-1", "--timeout=nan", "--timeout=1e14"]


@pytest.mark.parametrize("option", [*USAGE, *FUNCTIONS])
def test_usage_errors(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", option])
    assert stop.value.code == 2
    name, value = option.split("=")
    kinds = {"--timeout": "a number above 0, 1e\\+09 at most", "--model": "module:function"}
    expected = kinds.get(name, "a whole number, 2 to 1000000")
    assert re.search(rf"{name}: given '{value}'; expected {expected}", capsys.readouterr().err)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_read_enough(buffered):
    """As head: no error is to be looked for among the ranks."""
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": buffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "syncbn", "doctor", "--repeats=2", "--steps=2"]
    with subprocess.Popen(command, env=os.environ | more, **pipes) as doctor:
        assert doctor.stdout.readline() == "1 rank\n"
        doctor.stdout.close()
        error = doctor.stderr.read()
        assert doctor.wait(60) == 1
    assert error == "syncbn: [Errno 32] Broken pipe: nobody reads what is printed, or a process is gone\n"


def waits_for_ever():
    print("waits", flush=True)
    time.sleep(60)


def test_an_interrupt():
    """A line, and no frames."""
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "syncbn", "doctor", f"--model={MODULE}:waits_for_ever"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with interrupts.heard():
        doctor = subprocess.Popen(command, env=os.environ | more, **pipes)
    with doctor:
        assert "waits\n" in iter(doctor.stdout.readline, "")
        doctor.send_signal(signal.SIGINT)
        assert doctor.wait(60) == 130
        assert doctor.stderr.read() == "syncbn doctor: rank 0: interrupted\n"


@pytest.mark.parametrize("name", ["start", "examine"])
def test_an_interrupt_leaves_no_job(name, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with mock.patch.object(run, name, side_effect=KeyboardInterrupt):
        assert main(["doctor", "--device=cpu"]) == 130
    assert capsys.readouterr() == ("", "syncbn doctor: rank 0: interrupted\n")
    assert not torch.distributed.is_initialized()


NAMES_THREADS = """
import sys
from pathlib import Path
from syncbn.__main__ import main
main(["doctor", "--device=cpu", "--repeats=2", "--steps=2"])
sys.stderr.write(str({thread.joinpath("comm").read_text() for thread in Path("/proc/self/task").iterdir()}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads by name are Linux's")
def test_a_reader_that_has_read_enough_leaves_no_thread_of_gloo():
    """One that lets go of a tensor, for which it needs Python, while Python ends is a process that aborts, now and then."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NAMES_THREADS], **pipes) as doctor:
        assert doctor.stdout.readline() == "1 rank\n"
        doctor.stdout.close()
        said, threads = doctor.stderr.read().splitlines()
        assert doctor.wait(60) == 0
    assert "nobody reads" in said
    assert "python" in threads
    assert "gloo" not in threads


PRINTS_LAST = """
import sys
from syncbn.__main__ import main
from syncbn.doctor import run
run.run = lambda options: sys.stdin.read() and print("everything holds") or 0
sys.exit(main(["doctor"]))
"""


def test_a_reader_that_goes_before_the_end():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command, more = [sys.executable, "-c", PRINTS_LAST], {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, env=os.environ | more, **pipes) as doctor:
        doctor.stdout.close()
        doctor.stdin.write("go on")
        doctor.stdin.close()
        error = doctor.stderr.read()
        assert doctor.wait(60) == 1
    assert error == "syncbn: [Errno 32] Broken pipe: nobody reads what is printed, or a process is gone\n"


def test_help_on_a_terminal_of_few_letters(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "step", "--help"])
    sys.stdout.flush()
    assert b"?" in written.getvalue()


def command(*arguments: str, env: dict[str, str] | None = None, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    here = os.path.dirname(__file__)
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | more,
        cwd=here,
        check=False,
    )


PROGRAM = """
import os, sys, torch
if os.environ["RANK"] == "1":
    torch.__version__ = "9.9"
from syncbn.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    """Two ranks with another version of torch on one of them, started; read by the last test of these two."""
    program = tmp_path_factory.mktemp("doctor") / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(command, *launcher, "doctor", "--repeats=2", "--steps=2", f"--model={MODULE}:small")


@pytest.mark.usefixtures("under_torchrun")
def test_a_rank_that_never_comes_is_an_error_in_time():
    start = time.monotonic()
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = command("-m", "syncbn", "doctor", "--timeout=2", env=env)
    assert done.returncode == 1
    assert time.monotonic() - start < 30
    line = done.stderr.splitlines()[-1]
    assert re.match(r"syncbn doctor: rank 0: this rank could not meet all 2 ranks within 2 s, over interface \S+ ", line)
    assert line.endswith("): start every rank; name the right network by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME")


def test_the_exit_status_under_torchrun(under_torchrun):
    done = under_torchrun.result()
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "2 ranks"
    assert lines[-1] == "1 finding to see to, marked BAD"
    assert re.fullmatch(r"torch differs between ranks, \S+ on rank 0; 9.9 on rank 1: install .*", bad(lines)[0])


def test_ranks_are_named_in_spans():
    assert control.listed([0]) == "rank 0"
    assert control.listed([0, 1, 3]) == "ranks 0, 1, 3"
    assert control.listed([0, 1, 2, 4, 6, 7]) == "ranks 0-2, 4, 6, 7"


def test_the_splits_are_unequal_and_one_has_empty_shares():
    for size in (2, 3, 4, 9):
        shares = [[split[rank % len(split)] for rank in range(size)] for split in exact.SPLITS]
        assert all(len(set(of)) > 1 for of in shares)
        assert 0 in shares[1]


def test_layers_in_other_groups_differ():
    ours, theirs = (Layer("a", 8, 4),), (Layer("a", 8, 2),)
    (found,) = model.judge_layers([ours, theirs])
    assert str(found).startswith(
        "BAD  the layers differ between ranks, first where rank 0 has 'a' of 8 channels in a group of 4; rank 1"
    )


def test_the_worst_of_all_repetitions_counts():
    taken = [Measured({Key(2, 8): Taken([1.0, 5.0], [3.0, 3.0])}, []), Measured({Key(2, 8): Taken([4.0, 2.0], [1.0, 4.0])}, [])]
    assert latency.slowest(taken) == {Key(2, 8): Taken([4.0, 5.0], [3.0, 4.0])}


@pytest.mark.parametrize("there", [True, False])
def test_the_kernels_in_use_are_named(there):
    every = mock.Mock(takes=lambda x: True)
    kind, host = "compiled" if there else "composed", types.SimpleNamespace(__name__="syncbn.kernels.host")
    with mock.patch.object(kernels, "compiled", return_value=every if there else None):
        for library, name in ((None, kind), (object(), f"{kind}, recorded by C++")):
            with mock.patch.object(kernels.extension, "library", library):
                assert place.facts("gloo", CPU).kernels == name
    with mock.patch.object(kernels, "pick", return_value=host), mock.patch.object(kernels.extension, "library", object()):
        assert place.facts("gloo", CPU).kernels == "compiled, launched by C++"
