"""Exact synchronized batch normalization for PyTorch, on CPU and GPU."""

from ._version import __version__
from .checkpoint import checkpoint_context
from .collectives import CollectiveError
from .convert import convert, revert
from .fold import fold
from .function import sync_batch_norm
from .module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = [
    "CollectiveError",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "__version__",
    "checkpoint_context",
    "convert",
    "fold",
    "revert",
    "sync_batch_norm",
]
