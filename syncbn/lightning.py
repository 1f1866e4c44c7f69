"""Lightning: the layer swap as a plugin or a callback, and a callback that reports.

Requirements
    - what is converted for a fit is what is reverted after it, also after an exception: the user's own layers stay as they are;
    - `lightning.pytorch` and `pytorch_lightning` hold different classes of the same names: every class here serves both;
    - no collective but those of the layers.
"""

import contextlib
import importlib
from typing import Any

from torch import nn

from .collectives import GroupLike
from .convert import convert, revert
from .module import _Synchronized
from .monitor import monitor


def _namespaces() -> list[Any]:
    """The installed ones of `lightning.pytorch` and `pytorch_lightning`."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(name))
    if not found:
        raise ImportError("syncbn.lightning needs lightning or pytorch-lightning; expected one of them to be installed")
    return found


_NAMESPACES = _namespaces()


def _strategies(*names: str) -> tuple[type, ...]:
    return tuple(getattr(namespace.strategies, name) for namespace in _NAMESPACES for name in names)


# The strategies that call a LayerSync; the others take one and ignore it.
_CALL_LAYER_SYNC = _strategies("DDPStrategy", "FSDPStrategy")
# Any: their bases are known at run time only.
_LayerSync: Any = type("_LayerSync", tuple(n.plugins.layer_sync.TorchSyncBatchNorm for n in _NAMESPACES), {})
_Callback: Any = type("_Callback", tuple(namespace.Callback for namespace in _NAMESPACES), {})


class _Swap:
    """The layers that one conversion made, so that no others are reverted."""

    def __init__(self, process_group: GroupLike, group_size: int | None) -> None:
        self.process_group, self.group_size = process_group, group_size
        self.layers: list[nn.Module] = []

    def apply(self, model: nn.Module) -> None:
        before = {layer: type(layer) for layer in model.modules()}
        convert(model, self.process_group, group_size=self.group_size, skip=lambda _, layer: isinstance(layer, _Synchronized))
        self.layers += [layer for layer, cls in before.items() if type(layer) is not cls]

    def revert(self) -> None:
        while self.layers:
            revert(self.layers.pop())


class SyncBatchNormPlugin(_LayerSync):
    """Synchronized batch norm for a fit under DDP or FSDP: `Trainer(plugins=[SyncBatchNormPlugin()])`.

    `sync_batchnorm=True` may be given with it, and changes nothing. The strategy converts the model before it wraps it and
    reverts it in its teardown, after an exception too. Layers that were ours before keep their groups, and stay. validate, test
    and predict run the layers that the model has. Strategies other than DDPStrategy and FSDPStrategy ignore any LayerSync
    without a word: take `SyncBatchNormCallback` there. Fabric has no plugin of this kind:
    `fabric.setup(syncbn.convert(model), optimizer)`.
    """

    def __init__(self, process_group: GroupLike = None, group_size: int | None = None) -> None:
        """
        Args:
            process_group: None (every rank), a ProcessGroup or a 1-D DeviceMesh. Lightning makes the default process group in
                fit: a group that exists when the Trainer is made is one of your own launcher's.
            group_size: instead, contiguous groups of this many ranks.

        Raises:
            ValueError, TypeError: in fit, those of `syncbn.convert`.
        """
        super().__init__()
        self._swap = _Swap(process_group, group_size)

    def apply(self, model: Any) -> Any:
        """Convert the model in place."""
        self._swap.apply(model)
        return model

    def revert(self, model: Any) -> Any:
        """Give the layers that `apply` converted their classes of before."""
        self._swap.revert()
        return model


class SyncBatchNormCallback(_Callback):
    """The same layer swap for every strategy: `Trainer(callbacks=[SyncBatchNormCallback()])`.

    Converts when fit starts, before any other callback does something there, such as LearningRateFinder its search: setup and
    configure_model have made their layers then, and the strategy has wrapped the model, which a change of class leaves alone.
    Reverts at the end of fit and after an exception. Strategies that shard or compile layers by themselves when they set up may
    want `syncbn.convert` in configure_model instead.
    """

    def __init__(self, process_group: GroupLike = None, group_size: int | None = None) -> None:
        """
        Args:
            process_group, group_size: as for `SyncBatchNormPlugin`.

        Raises:
            ValueError: in fit, the Trainer has a layer plugin too; those of `syncbn.convert`.
        """
        super().__init__()
        self._swap = _Swap(process_group, group_size)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that no plugin converts too, and be the first to be told that fit starts."""
        if stage != "fit":
            return
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]
        plugin = getattr(trainer._accelerator_connector, "_layer_sync", None)
        if plugin is None:
            return
        ours, called = isinstance(plugin, SyncBatchNormPlugin), isinstance(trainer.strategy, _CALL_LAYER_SYNC)
        name = "SyncBatchNormPlugin" if ours else f"sync_batchnorm=True ({type(plugin).__name__})"
        if ours and called:
            drop = f"drop the callback: {type(trainer.strategy).__name__} calls the plugin"
        elif ours:
            drop = f"drop the plugin: {type(trainer.strategy).__name__} never calls it"
        else:
            drop = "drop sync_batchnorm=True"
        raise ValueError(f"given SyncBatchNormCallback and {name}, which both convert the model; expected one: {drop}")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert the model in place."""
        self._swap.apply(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Revert it; Lightning calls no teardown after an exception."""
        self._swap.revert()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Revert it."""
        self._swap.revert()


class SyncBatchNormMonitor(_Callback):
    """Logs what synchronizing does, by `syncbn.monitor`, every few batches: `Trainer(callbacks=[SyncBatchNormMonitor()])`.

    To each logger of the Trainer, at its step: `syncbn/share_of_step`, and for each layer by its path, as in
    `syncbn/net.1/mean_shift`, the figures of `syncbn.monitor`, on rank 0. No further collective, and the same results; a batch
    that is not logged costs nothing.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """
        Args:
            every_n_steps: training batches of which the first is watched and logged.

        Raises:
            ValueError: every_n_steps is below 1; in fit, the model has no layer of ours.
        """
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"given every_n_steps={every_n_steps}; expected 1 or more")
        self.every_n_steps = every_n_steps
        self._batches = self._step = 0
        self._watching = contextlib.ExitStack()
        self._monitor: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count batches anew."""
        self._batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch every n-th batch."""
        self._close()  # a batch that was skipped has no end
        if self._batches % self.every_n_steps == 0:
            self._monitor = self._watching.enter_context(monitor(pl_module))
            self._step = step_of(trainer)
        self._batches += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was watched."""
        if self._monitor is None:
            return
        metrics = self._monitor.read().flat()
        self._close()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no longer."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watch no longer."""
        self._close()

    def _close(self) -> None:
        self._monitor = None
        self._watching.close()


def step_of(trainer: Any) -> int:
    """The step of what a module logs in the batch that begins: of several optimizers' steps it counts one."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
