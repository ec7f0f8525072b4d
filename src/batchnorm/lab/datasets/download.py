"""fetch(): MNIST, Fashion-MNIST and CIFAR-10 from their homes: once, checked, and resumed after a break."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError

CACHE_VARIABLE = "BATCHNORM_CACHE"
_CHUNK = 1 << 16
_TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a download counts as broken off."""


@dataclass(frozen=True)
class Remote:
    """Where a data set lives.

    Attributes:
        name: the data set.
        home: address that the names of the files are put behind.
        files: name of a file -> its checksum, as pooch takes it ("md5:...", or SHA-256).
        megabytes: of all files.
    """

    name: str
    home: str
    files: dict[str, str]
    megabytes: int


_IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")  # fmt: skip # noqa: E501

REMOTES: dict[str, Remote] = {
    remote.name: remote
    for remote in (
        Remote(
            "mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            dict(
                zip(
                    _IDX,
                    (
                        "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
                        "md5:d53e105ee54ea40749a09fcbcd1e9432",
                        "md5:9fb629c4189551a2d022fa330f9573f3",
                        "md5:ec29112dd5afa0611ce80d1b7f02629c",
                    ),
                    strict=True,
                )
            ),
            12,
        ),
        Remote(
            "fashion_mnist",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            dict(
                zip(
                    _IDX,
                    (
                        "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                        "md5:25c81989df183df01b3e8a0aad5dffbe",
                        "md5:bef4ecab320f06d8554ea6380940ec79",
                        "md5:bb300cfdad3c16e7a12a480ee83cd310",
                    ),
                    strict=True,
                )
            ),
            31,
        ),
        Remote(
            "cifar10",
            "https://www.cs.toronto.edu/~kriz/",
            {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"},
            170,
        ),
    )
}


def cache_folder() -> Path:
    """Where downloads are kept: $BATCHNORM_CACHE, or the system's cache folder for this program."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    import pooch

    return Path(pooch.os_cache("batchnorm"))


def fetch(remote: Remote, folder: Path | None = None, *, shows_progress: bool = False) -> Path:
    """The data set's files on this machine; what is missing is downloaded.

    A file appears under its name when it is whole and its checksum is right. Until then it is NAME.part, from where
    the next call goes on.

    Args:
        remote: which data set; see `REMOTES`.
        folder: where to keep the files; by default a folder of its name in `cache_folder()`.
        shows_progress: a bar on stderr for each file.

    Returns:
        What `reading.read` takes: the folder.

    Raises:
        ArgumentError: a file could not be downloaded, or its checksum is wrong. It says how large the data set is,
            where it comes from, and what else can be done.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")  # it would announce each file on stderr; the bar does
    target = folder if folder is not None else cache_folder() / remote.name
    try:
        for name, checksum in remote.files.items():
            pooch.retrieve(
                remote.home + name,
                checksum,
                fname=name,
                path=target,
                downloader=_Resumed(target / f"{name}.part", shows_progress),
            )
    except requests.RequestException as error:
        raise ArgumentError(
            f"{remote.name} ({remote.megabytes} MB) is not on this machine yet, and could not be downloaded from "
            f"{remote.home} ({type(error).__name__}: {error}). Run again to go on with the download, or give the "
            "data yourself: --data PATH"
        ) from error
    except ValueError as error:  # pooch's word for a wrong checksum; it has removed the file
        raise ArgumentError(
            f"what came from {remote.home} as {remote.name} has a wrong checksum and was removed ({error}). Try again "
            "later, or give the data yourself: --data PATH"
        ) from error
    return target


class _Resumed:
    """What pooch downloads with: goes on behind the bytes of an earlier try."""

    def __init__(self, part: Path, shows_progress: bool) -> None:
        self.part, self.shows_progress = part, shows_progress

    def __call__(self, url: str, output_file: str, _: Any) -> None:
        import requests

        self.part.parent.mkdir(parents=True, exist_ok=True)
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            is_whole = have > 0 and answer.status_code == requests.codes.requested_range_not_satisfiable
            if not is_whole:
                answer.raise_for_status()
                goes_on = answer.status_code == requests.codes.partial_content
                self._write(answer, "ab" if goes_on else "wb", have if goes_on else 0)
        os.replace(self.part, output_file)

    def _write(self, answer: Any, mode: str, have: int) -> None:
        import requests
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        length = int(answer.headers.get("Content-Length", 0))
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        written = 0
        with self.part.open(mode) as file, Progress(*columns, transient=True, disable=not self.shows_progress) as bar:
            task = bar.add_task(self.part.stem, total=have + length or None, completed=have)
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                written += len(chunk)
                bar.update(task, advance=len(chunk))
        if length and written < length and not answer.headers.get("Content-Encoding"):
            raise requests.ConnectionError(f"the connection ended after {written} of {length} bytes")
