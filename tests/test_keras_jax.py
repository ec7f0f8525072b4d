"""The tests of the Keras layer once more, on JAX; and what is imported, or said where something is missing."""

from __future__ import annotations

import pytest
from on_jax import on_jax


def test_the_same_holds_on_jax():
    files = ["tests/test_keras_layer.py", "tests/test_keras_models.py"]
    shown = on_jax("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files)
    assert "passed" in shown


def test_on_jax_the_layer_needs_no_torch():
    code = """
import sys
import keras
import numpy as np
from batchnorm.keras import BatchNormalization
x = np.ones((4, 3), "float32")
model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
model.compile("sgd", "mse")
model.fit(x, x, verbose=0)
print(keras.backend.backend(), "torch" in sys.modules)
"""
    assert on_jax("-c", code).split() == ["jax", "False"]


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("keras", "batchnorm.keras needs Keras 3: pip install 'batchnorm[keras]'"),
        ("tensorflow", "Keras cannot start: it lacks 'tensorflow'. Its backend is chosen before it is imported: set"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(missing, words):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import batchnorm.keras
except ImportError as error:
    print(type(error).__name__, error)
"""
    shown = on_jax("-c", code, KERAS_BACKEND="tensorflow")
    assert shown.startswith("MissingPackageError ")
    assert words in shown
