"""accelerate: `syncbn.convert(model)` before `prepare`, in processes that `accelerate launch` starts, against one process."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gpus import needs_gpu

pytest.importorskip("accelerate")

import accelerate_program as program
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from oracle import flat
from tolerance import assert_same_state
from torch import nn

import syncbn

WORLD = 2


# With --multi_gpu these are two processes; --cpu alone is one.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found, by case."""
    return launch(tmp_path_factory.mktemp("accelerate"), ON_CPU)


def launch(directory, environment, *cases):
    options = ["--multi_gpu", "--num_processes", str(WORLD), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, program.__file__, str(directory), *cases],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1", "HF_HOME": str(directory)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def one_process():
    """The network trained on the whole batches of `plain`, and its losses."""
    model = program.network()
    optimizer = program.optimizer_of(model)
    xs, targets = program.data(WORLD * program.BATCH * program.STEPS)
    losses = []
    for x, target in zip(xs.split(WORLD * program.BATCH), targets.split(WORLD * program.BATCH), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_training_saved_and_loaded_equals_one_process_on_the_whole_batch(found):
    model, losses = one_process()
    for result in (rank["plain"] for rank in found):
        assert result["processes"] == WORLD, "really two"
        assert (result["wrapper"], result["converted"]) == ("DistributedDataParallel", "SyncBatchNorm2d")
        assert result["classes"] == [type(layer).__name__ for layer in model]
        assert result["losses"] == pytest.approx(losses, rel=1e-12)
        assert_same_state(result["state"], model.state_dict())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_trainer_takes_a_converted_model(found):
    model, _ = one_process()
    for result in (rank["trainer"] for rank in found):
        assert result["processes"] == WORLD
        assert_same_state(result["state"], model.state_dict())


def test_accumulate_with_statistics_of_all_micro_batches(found):
    model = program.network()
    optimizer = program.optimizer_of(model)
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    running = {name: (torch.zeros(n.num_features).double(), torch.ones(n.num_features).double()) for name, n in norms.items()}
    seen = {name: [] for name in norms}
    for name, layer in norms.items():
        layer.register_forward_hook(lambda _, args, y, name=name: seen[name].append(flat(args[0].detach())))
    samples = sum(map(sum, program.MICRO))
    for step in range(program.STEPS):
        optimizer.zero_grad()
        for part, sizes in enumerate(program.MICRO):
            x, target = program.data(sum(sizes), 10 * step + part)
            (F.cross_entropy(model(x), target, reduction="sum") / samples).backward()
        optimizer.step()
        for name in norms:
            values = torch.cat(seen[name])
            mean, var = running[name]
            running[name] = mean.lerp(values.mean(0), 0.1), var.lerp(values.var(0), 0.1)
            seen[name].clear()
    expected = model.state_dict()
    for name, (mean, var) in running.items():
        counted = torch.tensor(program.STEPS)
        expected |= {f"{name}.running_mean": mean, f"{name}.running_var": var, f"{name}.num_batches_tracked": counted}
    for result in (rank["accumulated"] for rank in found):
        assert result["synchronized"] == [False, False, True] * program.STEPS, "two of three under no_sync"
        assert result["refused"].startswith(
            "given a loader that accelerate prepared, whose end ends an accumulation of 3 steps"
        )
        assert_same_state(result["state"], expected)


def test_even_steps_over_a_prepared_loader(found):
    """Two samples are left for the last step: the other rank has none, or all are filled up from the beginning again."""
    batch, full = program.BATCH, [program.BATCH] * (program.STEPS - 1)
    x, target = program.data(program.RAGGED)
    again = torch.arange(program.RAGGED + 2 * batch - 2) % program.RAGGED
    for even, order in ((False, again[: program.RAGGED]), (True, again)):
        model = program.network()
        optimizer = program.optimizer_of(model)
        for part in order.split(2 * batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), target[part]).backward()
            optimizer.step()
        for rank, result in enumerate(ranks["evened"][f"even_batches={even}"] for ranks in found):
            assert result["samples"] == [*full, batch if even else 2 - 2 * rank]
            assert_same_state(result["state"], model.state_dict())
    for rank, result in enumerate(ranks["evened"] for ranks in found):
        assert result["accumulated"] == [*range(rank, 10, 2)]


def assert_trained_unevenly(results):
    """Rank 0 has data to the end, so its optimizer is that of one process, and Join sends its model to the others."""
    model = program.network()
    optimizer = program.optimizer_of(model)
    for step in range(max(map(len, program.UNEVEN))):
        x, target = program.data(sum(sizes[step] for sizes in program.UNEVEN if step < len(sizes)), step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    for result in results:
        assert_same_state(result["state"], model.state_dict())


def test_join_uneven_inputs_on_a_cpu_says_that_it_does_nothing(found):
    for result in (rank["uneven"] for rank in found):
        assert any("Joining uneven inputs is only supported for" in text for text in result["warnings"]), result


def test_join_uneven_inputs_takes_our_join(found):
    assert_trained_unevenly([rank["uneven"] for rank in found])


@needs_gpu
def test_join_uneven_inputs_on_gpus(tmp_path):
    assert_trained_unevenly([rank["uneven"] for rank in launch(tmp_path, {}, "uneven")])


def test_offload_hooks_come_after_convert():
    model = program.network().float()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"replaced by an accelerate hook \(offload\).*convert before.*\(layer '1'\)"):
        syncbn.convert(model)
    assert type(model[1]) is nn.BatchNorm2d
    remove_hook_from_module(model, recurse=True)
    syncbn.convert(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert type(model[1]) is syncbn.SyncBatchNorm2d
    assert model[1]._old_forward.__func__ is syncbn.SyncBatchNorm2d.forward
    x = program.data(4)[0].float()
    torch.testing.assert_close(model(x), program.network().float()(x))
    with pytest.raises(ValueError, match=r"remove_hook_from_module\(model, recurse=True\) first"):
        syncbn.revert(model)
