"""Settings of all tests."""

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, not wrong: how long one example takes says nothing.
settings.register_profile("shardline", deadline=None, print_blob=True)
settings.load_profile("shardline")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
