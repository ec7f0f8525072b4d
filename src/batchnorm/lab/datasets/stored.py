"""Images unpacked once into plain .npy files, which every worker maps into memory instead of decoding again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.images import Images

_ARRAYS = ("train_x", "train_y", "test_x", "test_y")
_CARD = "card.json"


def store(images: Images, folder: Path) -> Path:
    """Writes the arrays into `folder`, whole or not at all; an existing folder is taken as it is.

    Returns:
        The folder.
    """
    if (folder / _CARD).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in _ARRAYS:
            np.save(made / f"{name}.npy", getattr(images, name))
        card = {"source": images.source, "sha256": images.sha256}
        (made / _CARD).write_text(json.dumps(card), encoding="utf-8")
        try:
            os.replace(made, folder)
        except OSError:  # another process was first; its arrays are the same
            if not (folder / _CARD).exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def opened(folder: Path) -> Images:
    """The images that `store` wrote; pixels are mapped, not read.

    Raises:
        ArgumentError: the folder does not hold them.
    """
    if not (folder / _CARD).exists():
        raise ArgumentError(f"{folder} holds no stored images (no {_CARD}); remove it and start again")
    card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
    x, y, test_x, test_y = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
    return Images(x, y, test_x, test_y, card["source"])
