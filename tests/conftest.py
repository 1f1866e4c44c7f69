"""Shared by all tests: one thread, and memory that shows when it is read before it is written."""

import sys

import hypothesis
import pytest
import torch

# One campaign for CI, the same each time; `-m campaign` runs the long one, another each time.
hypothesis.settings.register_profile("short", derandomize=True, deadline=None, max_examples=100, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=20_000, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    hypothesis.settings.load_profile("long" if config.getoption("markexpr") == "campaign" else "short")


def pytest_collection_finish() -> None:
    if "worlds" in sys.modules:
        sys.modules["worlds"].prepare()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: a kernel that reads what it did not write cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
