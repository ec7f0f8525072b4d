"""images_for(): the stored images that a tier trains on, from where the user says or from their home."""

from __future__ import annotations

from pathlib import Path

from batchnorm.lab.config import Tier
from batchnorm.lab.datasets.download import REMOTES, cache_folder, fetch
from batchnorm.lab.datasets.reading import read
from batchnorm.lab.datasets.stored import store

DEFAULTS: dict[Tier, str] = {"standard": "mnist", "full": "cifar10"}
"""The data set of each tier that trains on images."""


def images_for(tier: Tier, data: Path | None, *, shows_progress: bool = False) -> Path | None:
    """The folder of the images that a tier trains on, stored as every worker can map them.

    Args:
        tier: which tier.
        data: a file or folder as `reading.read` takes it; None downloads the tier's own data set, once.
        shows_progress: a bar on stderr while it downloads.

    Returns:
        The folder; None for a tier without images.

    Raises:
        ArgumentError: the images cannot be read, or cannot be downloaded.
    """
    if tier not in DEFAULTS:
        return None
    return stored_images(data if data is not None else fetch(REMOTES[DEFAULTS[tier]], shows_progress=shows_progress))


def stored_images(data: Path) -> Path:
    """The folder of the images in `data`, stored as every worker can map them.

    Raises:
        ArgumentError: the images cannot be read.
    """
    images = read(data)
    return store(images, cache_folder() / "stored" / images.sha256[:16])
