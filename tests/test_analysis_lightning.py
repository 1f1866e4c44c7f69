"""Analysis callbacks: what they log is what the measures give, on two ranks as on one, and the training stays to the bit."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import nn
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch")
other = pytest.importorskip("pytorch_lightning")

import syncbn  # noqa: E402
from syncbn.analysis import gradient_correlation, gradient_growth, gradient_landscape  # noqa: E402
from syncbn.analysis import lightning as analysis  # noqa: E402
from syncbn.lightning import SyncBatchNormPlugin  # noqa: E402

STEPS = 5
pytestmark = pytest.mark.timeout(240)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 3)).double()


def batches(rank, size):
    generator = torch.Generator().manual_seed(1)
    whole = [(torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.arange(8) % 3) for _ in range(STEPS)]
    return [tuple(part.chunk(size)[rank] for part in batch) for batch in whole]


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def module(inplace):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x.sub_(1.5).mul_(2.0) if inplace else x)

        def training_step(self, batch, index):
            return cross_entropy(self, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    return Module()


def fit(rank, size, callbacks, directory, inplace=False):
    """(what was logged by step, the state afterwards)."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in places.items()} | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    logged = {}

    class Log(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.setdefault(step, {}).update(metrics)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=size, strategy="ddp", max_epochs=1, logger=Log(), callbacks=callbacks,
        enable_checkpointing=False, default_root_dir=directory, plugins=[SyncBatchNormPlugin()], **quiet,
    )  # fmt: skip
    made = module(inplace)
    trainer.fit(made, DataLoader(batches(rank, size), batch_size=None))
    return logged, {name: value.clone() for name, value in made.net.state_dict().items()}


def _fits(world, directory, inplace):
    told = []
    callbacks = [
        analysis.GradientGrowthMonitor(cross_entropy, told.append),
        analysis.GradientCorrelationMonitor(cross_entropy, 2),
        analysis.GradientLandscapeMonitor(cross_entropy, 4),
    ]
    watched = fit(world.rank, world.size, callbacks, directory, inplace)
    plain = fit(world.rank, world.size, [], directory, inplace)
    return watched, plain, told


def expected():
    """What the measures give before each step of the same training in one process."""
    model, found = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for batch in batches(0, 1):
        growth = gradient_growth(model, cross_entropy, batch)
        shift = gradient_correlation(model, cross_entropy, batch, optimizer)
        found.append((growth, shift, gradient_landscape(model, cross_entropy, batch, 0.3)))
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    return found


def test_callbacks_log_the_measures_and_change_nothing(tmp_path):
    results = worlds.run_fresh(2, _fits, str(tmp_path), False, timeout=120)
    for (_, state), (_, plain), _ in results:
        assert all(torch.equal(state[name], plain[name]) for name in plain)
    (logged, _), _, told = results[0]
    assert len(told) == 1
    assert "unsynchronized, 4 values per channel" in told[0]
    assert results[1][2] == []
    for step, (growth, shift, landscape) in enumerate(expected()):
        metrics = logged.get(step, {})
        assert ("analysis/first_over_last" in metrics) == (step == 0)
        assert ("analysis/cosine" in metrics) == (step in (0, 2, 4))
        assert ("analysis/loss_range" in metrics) == (step in (0, 4))
        if step == 0:
            assert metrics["analysis/first_over_last"] == pytest.approx(growth.first_over_last, rel=1e-10)
        if step % 2 == 0:
            assert metrics["analysis/cosine"] == pytest.approx(shift.cosine, rel=1e-9)
            assert metrics["analysis/net.4/relative"] == pytest.approx(shift.layers[1].relative, rel=1e-8)
        if step % 4 == 0:
            assert metrics["analysis/effective_beta"] == pytest.approx(landscape.effective_beta, rel=1e-8)
            assert metrics["analysis/loss_range"] == pytest.approx(landscape.loss_range, rel=1e-8)


def test_callbacks_leave_a_batch_that_forward_writes_to(tmp_path):
    for (_, state), (_, plain), _ in worlds.run_fresh(2, _fits, str(tmp_path), True, timeout=120):
        assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_both_namespaces_take_the_callbacks():
    for kind in (analysis.GradientGrowthMonitor, analysis.GradientCorrelationMonitor, analysis.GradientLandscapeMonitor):
        assert issubclass(kind, pl.Callback)
        assert issubclass(kind, other.Callback)


def test_rows_are_of_the_step_of_the_modules_own():
    """Of two optimizers each step counts in global_step."""
    logger, model = mock.Mock(), network()
    loop = mock.Mock(**{"epoch_loop._batches_that_stepped": 3})
    trainer = mock.Mock(
        loggers=[logger], fit_loop=loop, global_step=6, optimizers=[torch.optim.SGD(model.parameters(), lr=0.1)]
    )
    monitor = analysis.GradientCorrelationMonitor(cross_entropy)
    monitor.on_train_start(trainer, model)
    monitor.on_train_batch_start(trainer, model, batches(0, 1)[0], 0)
    assert logger.log_metrics.call_args.kwargs["step"] == 3


def test_a_learning_rate_or_a_gradient_of_zero_is_no_landscape():
    """As the first step of a warm-up has it."""
    model = network()
    for lr, loss in ((0.0, cross_entropy), (0.1, lambda module, batch: 0 * cross_entropy(module, batch))):
        trainer = type("Trainer", (), {"optimizers": [torch.optim.SGD(model.parameters(), lr=lr)]})()
        assert analysis.GradientLandscapeMonitor(loss).measure(trainer, model, batches(0, 1)[0]) == {}


def test_bad_arguments():
    for kind in (analysis.GradientCorrelationMonitor, analysis.GradientLandscapeMonitor):
        with pytest.raises(ValueError, match="given every_n_steps=0"):
            kind(cross_entropy, 0)
    trainer = type("Trainer", (), {"optimizers": [None, None]})()
    with pytest.raises(ValueError, match="with 2 optimizers; expected one"):
        analysis.GradientCorrelationMonitor(cross_entropy).measure(trainer, syncbn, None)
