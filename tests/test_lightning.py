"""Lightning, both namespaces: fit over two processes against one on the whole batches, and the model afterwards."""

import copy
import csv
import functools
import importlib
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from tolerance import FAR, assert_same_state
from torch import nn
from torch.utils.data import DataLoader

import syncbn

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]
for name in NAMESPACES:
    pytest.importorskip(name)

from syncbn.lightning import SyncBatchNormCallback, SyncBatchNormMonitor, SyncBatchNormPlugin  # noqa: E402

pytestmark = pytest.mark.timeout(240)
WAYS = ["plugin", "plugin and flag", "callback", "callback, layers from configure_model"]
EPOCHS = 2  # in a fit, which is then resumed for as many more
ALONE = worlds.World(0, 1, None, "")
SHARES = [(5, 3), (2, 6), (4, 0)]  # samples of each rank in the steps of an epoch


def network(own):
    """With a layer that is the user's own, of class `own`, and one that is frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(1), nn.Linear(64, 5), own(5)
    )
    net[3].running_var.fill_(0.5)
    net[3].eval()
    return net.double()


def data(step, sizes):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 2, 6, 6, generator=generator).double() * 2 + torch.arange(sum(sizes)).view(-1, 1, 1, 1) / 4
    return x, torch.randint(5, (sum(sizes),), generator=generator)


def batches(rank):
    steps = [(*(t.split(sizes)[rank] for t in data(step, sizes)), sum(sizes)) for step, sizes in enumerate(SHARES)]
    return DataLoader(steps, batch_size=None)


def module(namespace, world, own=syncbn.SyncBatchNorm, configure=False, fail_at=None):
    """A LightningModule of a namespace."""

    class Module(importlib.import_module(namespace).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None if configure else network(own)
            self.losses, self.seen, self.classes, self.steps = [], [], None, 0

        def configure_model(self):
            if self.net is None:
                self.net = network(own)

        def training_step(self, batch, index):
            if self.steps == fail_at:
                raise ZeroDivisionError
            self.steps += 1
            self.classes = [type(layer).__name__ for layer in self.net]
            x, target, samples = batch
            loss = F.cross_entropy(self.net(x), target, reduction="sum") * world.size / samples
            self.losses.append(loss.item() / world.size)
            return loss

        def on_validation_model_eval(self):
            self.eval()

        def validation_step(self, batch, index):
            with CollectivesSeen() as seen:
                self.net(batch[0])
            self.seen.append(len(seen.seen))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Module()


QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}


def trainer(namespace, world, directory, epochs, plugins=(), callbacks=(), flag=False, checkpoints=False, logger=False):
    """A Trainer in a process that is one of a launcher's, as under torchrun."""
    places = {"RANK": world.rank, "LOCAL_RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_WORLD_SIZE": world.size}
    os.environ |= {name: str(value) for name, value in places.items()} | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    lightning = importlib.import_module(namespace)
    if checkpoints:
        callbacks = [*callbacks, lightning.callbacks.ModelCheckpoint(directory, filename="last", save_top_k=1)]
    places = {"default_root_dir": directory, "logger": logger, "enable_checkpointing": checkpoints, "sync_batchnorm": flag}
    given = {"plugins": list(plugins), "callbacks": list(callbacks), "max_epochs": epochs, "num_sanity_val_steps": 1}
    return lightning.Trainer(accelerator="cpu", devices=world.size, strategy="ddp", **given, **places, **QUIET)


def fit(world, namespace, way, directory):
    """Fit, then resume from the checkpoint with a fresh model."""
    results = []
    for part in range(2):
        plugins = [SyncBatchNormPlugin()] if "plugin" in way else []
        callbacks = [SyncBatchNormCallback()] if "callback" in way else []
        model = module(namespace, world, configure="configure" in way)
        trained = trainer(
            namespace, world, directory, EPOCHS * (part + 1), plugins, callbacks, flag="flag" in way, checkpoints=part == 0
        )
        trained.fit(model, batches(world.rank), batches(world.rank), ckpt_path=f"{directory}/last.ckpt" if part else None)
        results.append(
            {
                "losses": model.losses,
                "state": {key: value.clone() for key, value in model.net.state_dict().items()},
                "during": model.classes,
                "after": [type(layer).__name__ for layer in model.net],
                "training": [layer.training for layer in model.net],
                "left": [key for layer in model.net for key in vars(layer) if "syncbn" in key],
                "in validation": sum(model.seen),
                "validated": len(model.seen),
            }
        )
    return results


def _fits(world, directory):
    return {
        (namespace, way): fit(world, namespace, way, f"{directory}/{namespace}-{way}".replace(" ", "-").replace(",", ""))
        for namespace in NAMESPACES
        for way in (WAYS if namespace == NAMESPACES[0] else WAYS[1:3])
    } | {case.__name__: case(world, directory) for case in (_failing, _both, _monitored, _fabric, _twice)}


@functools.cache
def results(directory):
    return worlds.run_fresh(2, _fits, directory, timeout=200, group_timeout=60)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results(str(tmp_path_factory.mktemp("lightning")))


@functools.cache
def one_process():
    """Losses and state after each of the two fits."""
    net = network(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    parts = []
    for _ in range(2):
        losses = []
        for _ in range(EPOCHS):
            for step, sizes in enumerate(SHARES):
                x, target = data(step, sizes)
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), target)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        parts.append((losses, {key: value.clone() for key, value in net.state_dict().items()}))
    return parts


CASES = [(NAMESPACES[0], way) for way in WAYS] + [(NAMESPACES[1], way) for way in WAYS[1:3]]


@pytest.mark.parametrize(("namespace", "way"), CASES)
def test_fit_and_resume_equal_one_process(found, namespace, way):
    for part, (losses, state) in enumerate(one_process()):
        both = [rank[namespace, way][part] for rank in found]
        assert [sum(pair) for pair in zip(*(result["losses"] for result in both), strict=True)] == pytest.approx(
            losses, rel=1e-11
        )
        for result in both:
            assert_same_state(result["state"], state, FAR)


@pytest.mark.parametrize(("namespace", "way"), CASES)
def test_the_model_is_as_before_the_fit(found, namespace, way):
    net = network(syncbn.SyncBatchNorm)
    for result in (result for rank in found for result in rank[namespace, way]):
        assert [name for name in result["during"] if "BatchNorm" in name] == [
            "SyncBatchNorm2d",
            "SyncBatchNorm2d",
            "SyncBatchNorm",
        ]
        assert result["after"] == [type(layer).__name__ for layer in net]
        assert result["training"] == [layer.training for layer in net]
        assert result["left"] == []


@pytest.mark.parametrize(("namespace", "way"), CASES)
def test_validation_inside_fit_communicates_nothing(found, namespace, way):
    for result in (result for rank in found for result in rank[namespace, way]):
        assert result["validated"] == len(SHARES) * EPOCHS + 1, "and the sanity check's"
        assert result["in validation"] == 0


def _failing(world, directory):
    """What an exception in the second step leaves behind."""
    left = {}
    for way in ("plugin", "callback"):
        model = module(NAMESPACES[0], world, fail_at=1)
        monitor = SyncBatchNormMonitor(every_n_steps=1)
        given = {"plugins": [SyncBatchNormPlugin()]} if way == "plugin" else {"callbacks": [SyncBatchNormCallback(), monitor]}
        try:
            trainer(NAMESPACES[0], world, directory, 1, **given).fit(model, batches(world.rank))
        except ZeroDivisionError:
            left[way] = [type(layer).__name__ for layer in model.net], [layer.training for layer in model.net]
        left[f"{way} observers"] = len(syncbn.observing.observers())
    return left


def test_an_exception_in_training_leaves_the_model_as_it_was(found):
    net = network(syncbn.SyncBatchNorm)
    expected = [type(layer).__name__ for layer in net], [layer.training for layer in net]
    for result in (rank["_failing"] for rank in found):
        assert result == {"plugin": expected, "callback": expected, "plugin observers": 0, "callback observers": 0}


def _both(world, directory):
    errors = []
    both = {"plugins": [SyncBatchNormPlugin()], "callbacks": [SyncBatchNormCallback()]}
    for given in (both, {"flag": True, "callbacks": [SyncBatchNormCallback()]}):
        model = module(NAMESPACES[0], world)
        try:
            trainer(NAMESPACES[0], world, directory, 1, **given).fit(model, batches(world.rank))
        except ValueError as error:
            errors.append((str(error), type(model.net[1]).__name__))
    return errors


def test_plugin_and_callback_together_is_an_error_that_says_which_to_drop(found):
    for errors in (rank["_both"] for rank in found):
        assert [name for _, name in errors] == ["BatchNorm2d"] * 2
        assert errors[0][0].endswith("expected one: drop the callback: DDPStrategy calls the plugin")
        assert "and sync_batchnorm=True (TorchSyncBatchNorm), which both" in errors[1][0]
        assert errors[1][0].endswith("drop sync_batchnorm=True")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_where_the_strategy_never_calls_a_plugin_it_is_the_one_to_drop():
    lightning = importlib.import_module(NAMESPACES[0])
    given = {"plugins": [SyncBatchNormPlugin()], "callbacks": [SyncBatchNormCallback()], "logger": False}
    alone = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, enable_checkpointing=False, **given, **QUIET)
    with pytest.raises(ValueError, match="drop the plugin: SingleDeviceStrategy never calls it"):
        alone.fit(module(NAMESPACES[0], ALONE), batches(0), batches(0))


@pytest.mark.filterwarnings("ignore")  # Lightning's of workers, torch's of what Lightning calls
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_callback_converts_before_others_train(namespace, tmp_path):
    """LearningRateFinder searches when fit starts, before any other callback is told so."""
    lightning = importlib.import_module(namespace)
    classes = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.lr = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 0.1

        def setup(self, stage):
            self.net.append(nn.BatchNorm1d(3))
            self.average = copy.deepcopy(self.net)

        def training_step(self, batch, index):
            classes.append([type(layer).__name__ for layer in self.net])
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = lightning.callbacks.LearningRateFinder(num_training_steps=3)
    given = {"callbacks": [finder, SyncBatchNormCallback()], "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    model, found = Module(), DataLoader(torch.randn(10, 4), batch_size=5)
    lightning.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **given, **QUIET).fit(model, found)
    assert len(classes) > 2
    assert all(names[1:] == ["SyncBatchNorm1d"] * 2 for names in classes)
    for net in (model.net, model.average):
        assert [type(layer).__name__ for layer in net] == ["Linear", "BatchNorm1d", "BatchNorm1d"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Lightning's FSDPStrategy takes no CPU")
@pytest.mark.filterwarnings("ignore")  # Lightning's of workers, torch's of a single process, of itself and what it deprecates
def test_fsdp_strategy_calls_the_plugin(tmp_path):
    lightning = importlib.import_module(NAMESPACES[0])
    model = module(NAMESPACES[0], ALONE)
    model.net.float()
    given = {"plugins": [SyncBatchNormPlugin()], "strategy": lightning.strategies.FSDPStrategy(), "default_root_dir": tmp_path}
    gpu = lightning.Trainer(
        accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, **given, **QUIET
    )
    data = DataLoader([(x.float(), target, n) for x, target, n in batches(0)], batch_size=None)
    gpu.fit(model, data, data)
    assert model.classes[1] == "SyncBatchNorm2d"
    assert [type(layer).__name__ for layer in model.net] == [type(layer).__name__ for layer in network(syncbn.SyncBatchNorm)]


def test_the_monitor_logs_nothing_of_a_batch_that_was_skipped():
    """It begins and has no end; nor does the next one, which is not watched, log what was left of it."""
    net, logger = syncbn.convert(network(syncbn.SyncBatchNorm)), mock.Mock()
    loop = mock.Mock(**{"epoch_loop._batches_that_stepped": 1})
    trainer, monitor = mock.Mock(loggers=[logger], fit_loop=loop), SyncBatchNormMonitor(every_n_steps=2)
    monitor.on_train_start(trainer, net)
    monitor.on_train_batch_start(trainer, net, None, 0)
    assert len(syncbn.observing.observers()) == 1
    monitor.on_train_batch_start(trainer, net, None, 1)
    assert syncbn.observing.observers() == ()
    monitor.on_train_batch_end(trainer, net, None, None, 1)
    assert logger.log_metrics.call_count == 0


def _monitored(world, directory):
    """The states of a fit with the monitor and one without; what was logged."""
    states = []
    for callbacks in ([SyncBatchNormMonitor(every_n_steps=2)], []):
        model = module(NAMESPACES[0], world)
        logger = importlib.import_module(NAMESPACES[0]).loggers.CSVLogger(directory, name="log", version=len(callbacks))
        trained = trainer(NAMESPACES[0], world, directory, EPOCHS, [SyncBatchNormPlugin()], callbacks, logger=logger)
        trained.fit(model, batches(world.rank))
        states.append(model.net.state_dict())
    with (Path(directory) / "log" / "version_1" / "metrics.csv").open() as file:
        return states, list(csv.DictReader(file)) if world.rank == 0 else None


def test_the_monitor_logs_every_other_step_and_changes_no_bit(found):
    for (watched, plain), _ in (rank["_monitored"] for rank in found):
        assert all(torch.equal(watched[name], plain[name]) for name in plain)
    rows = found[0]["_monitored"][1]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    figures = {"mean_shift", "std_shift", "mean_over_std", "variance_error", "smoothness_slack"}
    wanted = {"syncbn/share_of_step"} | {f"syncbn/net.{layer}/{figure}" for layer in (1, 6) for figure in figures}
    for row in rows:
        assert set(row) - {"step", "epoch"} == wanted, "the frozen layer has none"
        assert 0 < float(row["syncbn/share_of_step"]) < 1
    x, _ = data(0, SHARES[0])
    local, whole = (network(nn.BatchNorm1d)[0](part).transpose(0, 1).flatten(1) for part in (x[:5], x))
    invstd = (whole.var(1, correction=0) + 1e-5).rsqrt()
    shift = ((local.mean(1) - whole.mean(1)) * invstd).square().mean().sqrt().item()
    assert float(rows[0]["syncbn/net.1/mean_shift"]) == pytest.approx(shift, rel=1e-6)


def _fabric(world, directory):
    """Fabric: convert, then setup."""
    fabric = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=world.size, strategy="ddp")
    fabric.launch()
    net = network(syncbn.SyncBatchNorm)
    model, optimizer = fabric.setup(syncbn.convert(net), torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    for _ in range(EPOCHS):
        for x, target, samples in batches(world.rank):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), target, reduction="sum") * world.size / samples)
            optimizer.step()
    return type(model.module).__name__, fabric.world_size, net.state_dict()


def test_fabric_equals_one_process(found):
    for wrapped, size, state in (rank["_fabric"] for rank in found):
        assert (wrapped, size) == ("Sequential", 2)
        assert_same_state(state, one_process()[0][1], FAR)


def _twice(world, directory):
    """Layers that the user converted keep their group in a fit by groups of one, and stay; a second fit is as the first."""
    model = module(NAMESPACES[0], world)
    syncbn.convert(model.net[1], world.group)
    plugin = SyncBatchNormPlugin(group_size=1)
    for epochs in (1, 1):
        trainer(NAMESPACES[0], world, directory, epochs, [plugin]).fit(model, batches(world.rank))
    return [type(layer).__name__ for layer in model.net], model.net[1]._syncbn.group.process_group is world.group


def test_layers_converted_before_keep_their_group_and_stay(found):
    for classes, kept in (rank["_twice"] for rank in found):
        assert classes[1] == "SyncBatchNorm2d"
        assert classes[3] == "BatchNorm2d"
        assert kept
