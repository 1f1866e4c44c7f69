"""Exact synchronized batch normalization for PyTorch, on CPU and GPU."""

from ._version import __version__
from .collectives import CollectiveError
from .convert import convert, revert
from .function import sync_batch_norm
from .module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = [
    "CollectiveError",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "__version__",
    "convert",
    "revert",
    "sync_batch_norm",
]
