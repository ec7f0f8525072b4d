from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _seeded():
    """Random numbers that do not depend on which tests ran before.

    One thread: the workers of pytest-xdist share the cores, and threads of each would wait for those of the others.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
