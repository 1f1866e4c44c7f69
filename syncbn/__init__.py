"""Exact synchronized batch normalization for PyTorch, on CPU and GPU."""

from ._version import __version__
from .accumulation import accumulate_statistics
from .checkpoint import checkpoint_context
from .checks import checked
from .collectives import CollectiveError
from .convert import convert, revert
from .fold import fold
from .function import sync_batch_norm
from .join import SyncBatchNormJoin
from .module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, SyncBatchNormReLU
from .monitor import monitor
from .population import pool_running_stats, update_bn_stats
from .steps import even_steps

__all__ = [
    "CollectiveError",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncBatchNormJoin",
    "SyncBatchNormReLU",
    "__version__",
    "accumulate_statistics",
    "checked",
    "checkpoint_context",
    "convert",
    "even_steps",
    "fold",
    "monitor",
    "pool_running_stats",
    "revert",
    "sync_batch_norm",
    "update_bn_stats",
]
