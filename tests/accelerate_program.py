"""What test_accelerate.py starts by `accelerate launch`: trains in each way, and writes what every rank found.

accelerate launch ... accelerate_program.py DIRECTORY [CASE ...]
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import nccl_ranks
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn

BATCH, STEPS, CLASSES = 6, 4, 3  # samples of a rank in a step
# Samples of each rank in each micro-batch of a step.
MICRO = [(3, 1), (0, 4), (2, 2)]
# Samples of each rank's batches, of which one has fewer.
UNEVEN = [[3, 2, 4, 3], [5, 1]]
RAGGED = 2 * BATCH * (STEPS - 1) + 2  # samples, the last of which are a batch of their own


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(64, CLASSES),
        nn.BatchNorm1d(CLASSES),
    ).double()


def data(samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, generator=generator).double() * 2 + torch.arange(samples).view(-1, 1, 1, 1) / 10
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def plain(directory: Path) -> dict:
    """A training as a user has it, saved after half of its steps, loaded into fresh objects, and ended there."""
    accelerator = Accelerator()
    found = {"processes": accelerator.num_processes, "losses": []}

    def prepared():
        model = syncbn.convert(network())
        loader = DataLoader(TensorDataset(*data(2 * BATCH * STEPS)), batch_size=BATCH)
        return accelerator.prepare(model, optimizer_of(model), loader)

    model, optimizer, loader = prepared()
    for step, (x, target) in enumerate(loader):
        if step == STEPS // 2:
            accelerator.save_state(str(directory / "state"))
            accelerator._models.clear()
            accelerator._optimizers.clear()
            model, optimizer, _ = prepared()
            accelerator.load_state(str(directory / "state"))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        accelerator.backward(loss)
        optimizer.step()
        found["losses"].append(accelerator.gather(loss.detach()).mean().item())
    unwrapped = accelerator.unwrap_model(model)
    found["wrapper"], found["converted"] = type(model).__name__, type(unwrapped[1]).__name__
    syncbn.revert(unwrapped)
    return found | {"classes": [type(layer).__name__ for layer in unwrapped], "state": unwrapped.state_dict()}


def accumulated(directory: Path) -> dict:
    """Micro-batches of unequal shares under `accumulate`; the running statistics move once a step."""
    accelerator = Accelerator(gradient_accumulation_steps=len(MICRO))
    rank, world = accelerator.process_index, accelerator.num_processes
    model = syncbn.convert(network())
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    samples, synchronized = sum(map(sum, MICRO)), []
    for step in range(STEPS):
        with syncbn.accumulate_statistics(model):
            for part, sizes in enumerate(MICRO):
                x, target = (t.split(sizes)[rank] for t in data(sum(sizes), 10 * step + part))
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), target, reduction="sum") * world / samples
                    accelerator.backward(loss * len(MICRO))  # which divides by the number of micro-batches
                    optimizer.step()
                    optimizer.zero_grad()
                synchronized.append(accelerator.sync_gradients)
    refused = ""
    try:
        syncbn.even_steps(accelerator.prepare(torch.utils.data.DataLoader([torch.ones(2)] * 5)))
    except ValueError as error:
        refused = str(error)
    return {"state": accelerator.unwrap_model(model).state_dict(), "synchronized": synchronized, "refused": refused}


def uneven(directory: Path) -> dict:
    """join_uneven_inputs over ranks with different numbers of batches.

    accelerate has it for GPUs; on a CPU it warns and does nothing, and is told here that there are devices.
    """
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    model = syncbn.convert(network())
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    joined = syncbn.SyncBatchNormJoin(model)
    warned: list[warnings.WarningMessage] = []
    if accelerator.device.type == "cpu":
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with accelerator.join_uneven_inputs([joined, model]):
                pass
    with (
        mock.patch.object(Accelerator, "multi_device", True),
        accelerator.join_uneven_inputs([joined, model], even_batches=False),
    ):
        for step, size in enumerate(UNEVEN[rank]):
            sizes = [sizes[step] if step < len(sizes) else 0 for sizes in UNEVEN]
            x, target = (t.split(sizes)[rank].to(accelerator.device) for t in data(sum(sizes), step))
            assert len(x) == size
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), target, reduction="sum") * world / sum(sizes))
            optimizer.step()
    state = {name: value.cpu() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    return {"warnings": [str(warning.message) for warning in warned], "state": state}


def evened(directory: Path) -> dict:
    """even_steps over a loader that accelerate prepared: where batches differ in number, and where nothing is to be done."""
    found: dict[str, object] = {}
    for even in (False, True):
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=even))
        model = syncbn.convert(network())
        loader = DataLoader(TensorDataset(*data(RAGGED)), batch_size=BATCH)
        model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        samples = []
        for (x, target), weight in syncbn.even_steps(loader):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), target, reduction="sum") * weight)
            optimizer.step()
            samples.append(len(x))
        found[f"even_batches={even}"] = {"state": accelerator.unwrap_model(model).state_dict(), "samples": samples}
    plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    loader = Accelerator(gradient_accumulation_plugin=plugin).prepare(DataLoader(torch.arange(10.0), batch_size=1))
    return found | {"accumulated": [batch.item() for batch, _ in syncbn.even_steps(loader)]}


class WithLoss(nn.Module):
    """A model as transformers' Trainer wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer(directory: Path) -> dict:
    """transformers' Trainer, given a converted model; the batches of `plain`."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    options = TrainingArguments(
        str(directory / "trainer"), use_cpu=True, per_device_train_batch_size=BATCH, num_train_epochs=1, max_grad_norm=0,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    model = WithLoss(syncbn.convert(network()))
    optimizer = optimizer_of(model)
    examples = [{"x": x, "labels": target} for x, target in zip(*data(2 * BATCH * STEPS), strict=True)]
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    InOrder(model, options, train_dataset=examples, optimizers=(optimizer, constant)).train()
    return {"state": model.net.state_dict(), "processes": options.world_size}


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    if torch.cuda.is_available():  # where there are fewer GPUs than ranks, some share one
        rank, size, gpus = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
        os.environ.update(nccl_ranks.settings(rank, size, gpus, torch.cuda.nccl.version()), LOCAL_RANK=str(rank % gpus))
    cases = [plain, accumulated, uneven, evened, *([trainer] if importlib.util.find_spec("transformers") else [])]
    if sys.argv[2:]:
        cases = [case for case in cases if case.__name__ in sys.argv[2:]]
    found = {case.__name__: case(directory) for case in cases}
    torch.save(found, directory / f"rank{Accelerator().process_index}.pt")
    Accelerator().end_training()


if __name__ == "__main__":
    main()
