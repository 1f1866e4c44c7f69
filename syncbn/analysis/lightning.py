"""Lightning: the measures in the course of a training run, logged.

Requirements: the run is the same with them, to the bit; every rank measures, rank 0 logs.
"""

import math
from collections.abc import Callable
from typing import Any

from ..lightning import _Callback, step_of
from .growth import advice, gradient_growth
from .landscape import FlatError, gradient_landscape
from .objective import Loss
from .shift import gradient_correlation


class _Measure(_Callback):
    """Calls `measure(module, batch, optimizer)` before some training batches, on all ranks, and logs what it gives."""

    def __init__(self, every_n_steps: int | None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"given every_n_steps={every_n_steps}; expected 1 or more")
        self.every_n_steps = every_n_steps
        self._batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count batches anew."""
        self._batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure at the first batch and every n-th after it."""
        due = self._batches == 0 if self.every_n_steps is None else self._batches % self.every_n_steps == 0
        self._batches += 1
        if not due:
            return
        metrics = self.measure(trainer, pl_module, batch)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=step_of(trainer))

    def measure(self, trainer: Any, pl_module: Any, batch: Any) -> dict[str, float]:
        """The metrics by name."""
        raise NotImplementedError


class GradientGrowthMonitor(_Measure):
    """Logs gradient growth at the first batch of a fit, and tells the advice on rank 0: see `gradient_growth`.

    `analysis/lambda_sq`, `analysis/lambda_norm` and `analysis/first_over_last`.
    """

    def __init__(self, loss: Loss, tell: Callable[[str], None] = print) -> None:
        """
        Args:
            loss: called with the LightningModule and a batch, gives the mean loss of this rank; it must not log.
            tell: what to do with the advice.
        """
        super().__init__(None)
        self.loss, self.tell = loss, tell

    def measure(self, trainer: Any, pl_module: Any, batch: Any) -> dict[str, float]:
        growth = gradient_growth(pl_module, self.loss, batch)
        if trainer.is_global_zero:
            self.tell(advice(growth))
        return {f"analysis/{name}": getattr(growth, name) for name in ("lambda_sq", "lambda_norm", "first_over_last")}


class GradientCorrelationMonitor(_Measure):
    """Logs internal covariate shift in the step that the optimizer takes next: see `gradient_correlation`.

    `analysis/cosine` and `analysis/relative`, means over the layers but the first, and by path those of each layer, as in
    `analysis/net.3/cosine`. k + 1 further passes for k layers.
    """

    def __init__(self, loss: Loss, every_n_steps: int = 500) -> None:
        """
        Args:
            loss: called with the LightningModule and a batch, gives the mean loss of this rank; it must not log.
            every_n_steps: training batches of which the first is measured.

        Raises:
            ValueError: every_n_steps is below 1; in fit, there is more than one optimizer.
        """
        super().__init__(every_n_steps)
        self.loss = loss

    def measure(self, trainer: Any, pl_module: Any, batch: Any) -> dict[str, float]:
        shift = gradient_correlation(pl_module, self.loss, batch, _optimizer(trainer))
        metrics = {"analysis/cosine": shift.cosine, "analysis/relative": shift.relative}
        for layer in shift.layers[1:]:
            metrics |= {f"analysis/{layer.name}/cosine": layer.cosine, f"analysis/{layer.name}/relative": layer.relative}
        return metrics


class GradientLandscapeMonitor(_Measure):
    """Logs the loss along the gradient, at ½ to 4 times the optimizer's learning rate: see `gradient_landscape`.

    `analysis/loss_range`, `analysis/predictiveness` and `analysis/effective_beta`. Five further passes. Nothing is logged where
    the learning rate is 0, as a warm-up may begin, or the gradient is.
    """

    def __init__(self, loss: Loss, every_n_steps: int = 500) -> None:
        """
        Args:
            loss, every_n_steps: as for `GradientCorrelationMonitor`.

        Raises:
            ValueError: as `GradientCorrelationMonitor`.
        """
        super().__init__(every_n_steps)
        self.loss = loss

    def measure(self, trainer: Any, pl_module: Any, batch: Any) -> dict[str, float]:
        lr = float(_optimizer(trainer).param_groups[0]["lr"])
        if lr == 0:
            return {}
        try:
            seen = gradient_landscape(pl_module, self.loss, batch, lr)
        except FlatError:
            return {}
        return {f"analysis/{name}": getattr(seen, name) for name in ("loss_range", "predictiveness", "effective_beta")}


def _optimizer(trainer: Any) -> Any:
    if len(trainer.optimizers) != 1:
        raise ValueError(f"given a Trainer with {len(trainer.optimizers)} optimizers; expected one")
    return trainer.optimizers[0]
