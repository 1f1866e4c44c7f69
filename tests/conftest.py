"""Shared by all tests: one thread, and memory that shows when it is read before it is written."""

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: a kernel that reads what it did not write cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
