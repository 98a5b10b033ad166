"""What runs on a GPU alone."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of it where torch finds no GPU."""
    torch.set_num_threads(8)  # what a GPU is compared with
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA GPU"))
