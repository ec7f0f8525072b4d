from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

PUBLIC = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "DecorrelatedBatchNorm",
    "DomainBatchNorm",
    "FeatureNormalization",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "Moments",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "dual_batch_norm",
    "export_onnx",
    "fold",
    "fold_onnx",
    "freeze",
    "fuse_activations",
    "merge_statistics",
    "parameter_groups",
    "port",
    "recalibrate",
    "save_memory",
    "saved_bytes",
    "transaction",
    "unfreeze",
    "use_domain",
]


def _run(code):
    """Standard output of a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def _loaded_after(code, names="torch numpy scipy sklearn matplotlib joblib typer rich jinja2"):
    return _run(f"import sys\n{code}\nprint(*[n for n in {names.split()} if n in sys.modules])").split()


def test_importing_imports_no_framework():
    assert _loaded_after("import batchnorm; batchnorm.__version__; dir(batchnorm)") == []


def test_statistics_of_numpy_arrays_need_no_torch():
    code = "import numpy as np, batchnorm as b; m = b.Moments.of(np.ones((3, 2)), 0); m.merge(m).unbiased_var"
    assert _loaded_after(code) == ["numpy"]
    assert _loaded_after("import batchnorm.stats.population, batchnorm.stats.running, batchnorm.errors") == ["numpy"]


def test_layers_import_nothing_of_the_study():
    """And `import batchnorm.layers.batch_norm` leaves batchnorm.batch_norm the function that it is."""
    code = "from batchnorm import *; import batchnorm.layers.batch_norm; assert callable(batchnorm.batch_norm)"
    assert set(_loaded_after(code)) <= {"torch", "numpy"}


def test_public_names():
    assert sorted(batchnorm.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(batchnorm))
    for name in PUBLIC:
        found = getattr(batchnorm, name)
        assert found.__name__ == name
        assert found.__doc__
    star = {}
    exec("from batchnorm import *", star)
    assert set(PUBLIC) <= set(star)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'BatchNorm4d'"):
        _ = batchnorm.BatchNorm4d
    assert not hasattr(batchnorm, "sync")


def test_version_and_metadata():
    metadata = importlib.metadata.metadata("batchnorm")
    assert batchnorm.__version__ == metadata["Version"]
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{batchnorm.__version__}"' in text
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_types_ship_with_it():
    assert importlib.resources.files("batchnorm").joinpath("py.typed").is_file()


def test_layers_name_their_public_class():
    assert batchnorm.BatchNorm2d.__mro__[1] is batchnorm.BatchNorm
