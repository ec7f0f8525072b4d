"""How far training-mode outputs and variances are from float64, on inputs that cancel: ours, torch, Keras and Flax.

Prints a Markdown table for docs/exactness.md; a library that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import numpy as np
import torch

import batchnorm

os.environ.setdefault("KERAS_BACKEND", "torch")
Output = tuple[np.ndarray, np.ndarray]
"""Normalised values, and the biased batch variance as the library's running statistics show it."""

EPS = 1e-5
INPUTS = {
    "mean 0, std 1": (0.0, 1.0),
    "mean 100, std 1": (1e2, 1.0),
    "mean 1e4, std 1": (1e4, 1.0),
    "mean 1e4, std 0.1": (1e4, 0.1),
    "mean 1e6, std 10": (1e6, 10.0),
    "mean -3e3, std 1e3": (-3e3, 1e3),
}
SHAPE = (64, 32, 28, 28)


def main() -> None:
    """Measures every library on every input."""
    libraries: dict[str, Callable[[np.ndarray], Output]] = {
        "batchnorm": lambda x: _torch(batchnorm.BatchNorm2d, x),
        "batchnorm, channels-last": lambda x: _torch(batchnorm.BatchNorm2d, x, torch.channels_last),
        "torch": lambda x: _torch(torch.nn.BatchNorm2d, x),
        "torch, channels-last": lambda x: _torch(torch.nn.BatchNorm2d, x, torch.channels_last),
    }
    if importlib.util.find_spec("keras"):
        libraries["Keras (torch backend)"] = _keras
    if importlib.util.find_spec("flax"):
        libraries["Flax NNX"] = _flax
    print(f"Input {SHAPE}, float32, eps {EPS:g}. Output: largest error over the largest value. Variance: largest")
    print("relative error of the batch variance that enters the running statistics.\n")
    print("| input |" + "".join(f" {name}: output | variance |" for name in libraries))
    print("| --- |" + " --- | --- |" * len(libraries))
    for name, (mean, std) in INPUTS.items():
        x = np.random.default_rng(0).normal(mean, std, SHAPE).astype(np.float32)
        wide = x.astype(np.float64)
        axes = (0, 2, 3)
        var = wide.var(axes)
        y = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + EPS)
        cells = []
        for library in libraries.values():
            found, found_var = library(x)
            error = np.abs(found - y).max() / np.abs(y).max()
            cells.append(f" {_figure(error)} | {_figure(np.abs(found_var / var - 1).max())} |")
        print(f"| {name} |" + "".join(cells))


def _figure(value: float) -> str:
    return f"{value:.1e}" if np.isfinite(value) else "NaN"


def _torch(layer: type[torch.nn.BatchNorm2d], x: np.ndarray, layout: torch.memory_format | None = None) -> Output:
    bn = layer(SHAPE[1], eps=EPS, momentum=1.0)
    given = torch.from_numpy(x)
    y = bn(given if layout is None else given.to(memory_format=layout)).detach().numpy()
    count = x.size // SHAPE[1]
    return y, bn.running_var.numpy().astype(np.float64) * (count - 1) / count


def _keras(x: np.ndarray) -> Output:
    import keras

    bn = keras.layers.BatchNormalization(axis=1, epsilon=EPS, momentum=0.0)
    y = keras.ops.convert_to_numpy(bn(x, training=True))
    return y, keras.ops.convert_to_numpy(bn.moving_variance).astype(np.float64)


def _flax(x: np.ndarray) -> Output:
    from flax import nnx

    bn = nnx.BatchNorm(SHAPE[1], axis=1, epsilon=EPS, momentum=0.0, use_running_average=False, rngs=nnx.Rngs(0))
    y = np.asarray(bn(x))
    return y, np.asarray(bn.var[...] if hasattr(bn.var, "__getitem__") else bn.var.value).astype(np.float64)


if __name__ == "__main__":
    main()
