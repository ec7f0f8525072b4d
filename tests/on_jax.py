"""Python started with Keras on JAX: a process has one backend of Keras."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def on_jax(*arguments: str, **environment: str) -> str:
    """What `python ARGUMENTS` prints, with the tests' folder on its path; AssertionError with its words if it fails."""
    own = {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is what takes the time
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**outer, **own, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
