from __future__ import annotations

import gc
import os

import pytest

# Collecting 6,000 tests makes millions of objects that stay: looking through them again and again takes 6 s.
gc.disable()

# Keras chooses its backend when it is imported; test_keras_jax.py runs the same tests on JAX.
os.environ.setdefault("KERAS_BACKEND", "torch")
# Triton decides when it is imported whether its kernels are compiled, which needs a GPU, or interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")


# Tests share the cores already: threads of scikit-learn, and of processes that tests start, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    """Random numbers that do not depend on which tests ran before.

    One thread: the workers of pytest-xdist share the cores, and threads of each would wait for those of the others.
    """
    if os.environ["KERAS_BACKEND"] == "jax":  # which needs no torch, and starts faster without
        return
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def quiet_interpreter():
    """Triton's interpreter computes with NumPy, whose warnings a GPU does not know."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield
