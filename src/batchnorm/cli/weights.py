"""state_dicts in files: .safetensors, and .pt or .pth read with weights_only=True; written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from batchnorm.errors import ArgumentError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SUFFIXES = (".safetensors", ".pt", ".pth")


class Saved(NamedTuple):
    """What a file holds."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None
    """Of a .safetensors file."""


def check_suffix(path: Path) -> None:
    """Raises ArgumentError unless the file's name says which format it has."""
    if path.suffix not in _SUFFIXES:
        raise ArgumentError(f"expected a file named {', '.join(f'*{suffix}' for suffix in _SUFFIXES)}; got {path}")


def read(path: Path) -> Saved:
    """The state_dict in `path`.

    Raises:
        ArgumentError: the name is of no known format, the file cannot be read as one, or it holds no state_dict.
    """
    check_suffix(path)
    if not path.is_file():
        raise ArgumentError(f"{path} is no file")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                return Saved({key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata())  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ArgumentError(f"{path} is no safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the reader meets broken files with whatever it stumbles over
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArgumentError(
            f"{path} cannot be read with weights_only=True (save model.state_dict()): {first}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ArgumentError(f"{path} holds no state_dict, name -> tensor: save model.state_dict()")
    return Saved(dict(found), None)


def load_into(model: torch.nn.Module, saved: Saved, path: Path) -> None:
    """Loads `saved`, which came from `path`.

    Raises:
        ArgumentError: names or shapes do not go together. Tied weights may be there under one of their names.
    """
    try:
        missing, unexpected = model.load_state_dict(saved.tensors, strict=False)
    except RuntimeError as error:
        raise ArgumentError(f"{path} does not go with the model: {error}") from error
    own = model.state_dict()
    there = {value.data_ptr() for name, value in own.items() if name in saved.tensors and value.numel()}
    missing = [name for name in missing if not (own[name].numel() and own[name].data_ptr() in there)]
    if missing or unexpected:
        raise ArgumentError(
            f"{path} does not go with the model. Missing: {', '.join(missing[:5]) or 'none'}; "
            f"unexpected: {', '.join(unexpected[:5]) or 'none'} ({len(missing)} and {len(unexpected)} in all)"
        )


def with_statistics(saved: Saved, model: torch.nn.Module, layers: Sequence[str]) -> Saved:
    """`saved` with the statistics of the model's `layers`; every other tensor is the same."""
    own = model.state_dict()
    keys = [".".join(filter(None, (layer, name))) for layer in layers for name in _STATISTICS]
    new = {key: own[key].detach().cpu().clone() for key in keys if key in own and key in saved.tensors}
    return saved._replace(tensors={**saved.tensors, **new})


def write(path: Path, saved: Saved) -> None:
    """Writes the file whole or not at all."""
    check_suffix(path)
    with written_whole(path) as name:
        if path.suffix == ".safetensors":
            # The format knows no views and no shared storage.
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in saved.tensors.items()}
            safetensors.torch.save_file(whole, name, metadata=saved.metadata or {"format": "pt"})
        else:
            torch.save(saved.tensors, name)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which is moved there at the end: there is never half a file.

    On an error it is removed, and what stood at `path` stays.
    """
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are for the owner only
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
