"""Image data sets: every kind of file, damaged ones, and downloads from a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.download import REMOTES, Remote, cache_folder, fetch
from batchnorm.lab.datasets.images import Images
from batchnorm.lab.datasets.reading import read
from batchnorm.lab.datasets.stored import opened, store

RNG = np.random.default_rng(0)
GREY_X, GREY_TEST = (RNG.integers(0, 256, (count, 5, 4), dtype=np.uint8) for count in (6, 4))
RGB_X, RGB_TEST = (RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (10, 3))
GREY_Y, GREY_TEST_Y = np.array([0, 1, 2, 0, 1, 2]), np.array([2, 1, 0, 0])
RGB_Y, RGB_TEST_Y = np.arange(10), np.array([9, 0, 4])


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


IDX_FILES = {
    "train-images-idx3-ubyte": idx(GREY_X),
    "train-labels-idx1-ubyte": idx(GREY_Y),
    "t10k-images-idx3-ubyte": idx(GREY_TEST),
    "t10k-labels-idx1-ubyte": idx(GREY_TEST_Y),
}


def planes(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def cifar_files(suffix: str) -> dict[str, bytes]:
    parts = {f"data_batch_{n + 1}": (RGB_X[2 * n : 2 * n + 2], RGB_Y[2 * n : 2 * n + 2]) for n in range(5)}
    parts["test_batch"] = RGB_TEST, RGB_TEST_Y
    if suffix == ".bin":
        rows = {name: np.column_stack([y.astype(np.uint8), planes(x)]).tobytes() for name, (x, y) in parts.items()}
        return {f"{name}.bin": data for name, data in rows.items()}
    return {
        name: pickle.dumps({b"data": planes(x), b"labels": y.tolist()}, protocol=2) for name, (x, y) in parts.items()
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def by_class(x: np.ndarray, y: np.ndarray, split: str) -> dict[str, bytes]:
    return {f"{split}/class{label}/{row:04d}.png": png(pixels) for row, (pixels, label) in enumerate(zip(x, y))}  # noqa: B905


def grey(found: Images) -> None:
    assert np.array_equal(found.train_x, GREY_X[..., None])
    assert np.array_equal(found.train_y, GREY_Y)
    assert np.array_equal(found.test_x, GREY_TEST[..., None])
    assert np.array_equal(found.test_y, GREY_TEST_Y)
    assert found.classes == 3


def colour(found: Images) -> None:
    assert np.array_equal(found.train_x, RGB_X)
    assert np.array_equal(found.train_y, RGB_Y)
    assert np.array_equal(found.test_x, RGB_TEST)
    assert np.array_equal(found.test_y, RGB_TEST_Y)


def test_idx_files(tmp_path: Path) -> None:
    grey(read(write_files(tmp_path / "plain", IDX_FILES)))
    zipped = {f"{name}.gz": gzip.compress(data) for name, data in IDX_FILES.items()}
    grey(read(write_files(tmp_path / "zipped", zipped)))
    grey(read(write_files(tmp_path / "above" / "MNIST", zipped).parent))


@pytest.mark.parametrize("style", ["{split}_{letter}", "{letter}_{split}"])
def test_npz(tmp_path: Path, style: str) -> None:
    arrays = {("train", "x"): GREY_X, ("train", "y"): GREY_Y, ("test", "x"): GREY_TEST, ("test", "y"): GREY_TEST_Y}
    named = {style.format(split=split, letter=letter): array for (split, letter), array in arrays.items()}
    np.savez_compressed(tmp_path / "mnist.npz", **named)
    grey(read(tmp_path / "mnist.npz"))


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_cifar_as_archive_and_unpacked(tmp_path: Path, suffix: str) -> None:
    files = {**cifar_files(suffix), "readme.html": b"about"}
    colour(read(write_tar(tmp_path / "cifar.tar.gz", files)))
    colour(read(write_files(tmp_path / "unpacked", files)))


def test_images_by_split_and_class_in_a_folder_and_a_zip(tmp_path: Path) -> None:
    order = np.argsort(GREY_Y, kind="stable")
    files = {**by_class(GREY_X, GREY_Y, "train"), **by_class(GREY_TEST, GREY_TEST_Y, "test"), "readme.txt": b"about"}
    folder = read(write_files(tmp_path / "images", files))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"top/{name}", data)
    zipped = read(tmp_path / "images.zip")
    for found in (folder, zipped):
        assert np.array_equal(found.train_y, GREY_Y[order])
        assert np.array_equal(found.train_x, GREY_X[order][..., None])
        assert found.test_x.shape == (4, 5, 4, 1)
    assert folder.sha256 == zipped.sha256


def test_the_same_images_have_the_same_hash_in_every_format(tmp_path: Path) -> None:
    binary = read(write_tar(tmp_path / "binary.tar.gz", cifar_files(".bin")))
    python = read(write_tar(tmp_path / "python.tar.gz", cifar_files("")))
    assert binary.sha256 == python.sha256


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def damaged() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    idx_gz = {f"{name}.gz": gzip.compress(data) for name, data in IDX_FILES.items()}
    yield "nothing", lambda at: at / "absent", "there is no file or folder"
    yield "empty folder", lambda at: write_files(at / "f", {}), "holds nothing; expected"
    yield "unknown file", lambda at: write_files(at, {"x.csv": b"1"}) / "x.csv", "of no known kind"
    cut = {**idx_gz, "train-images-idx3-ubyte.gz": idx_gz["train-images-idx3-ubyte.gz"][:-9]}
    yield "cut gzip", lambda at: write_files(at / "f", cut), "no whole gzip file"
    short = {**IDX_FILES, "train-images-idx3-ubyte": IDX_FILES["train-images-idx3-ubyte"][:-1]}
    yield "cut idx", lambda at: write_files(at / "f", short), r"needs 120 bytes, the file has 119"
    floats = {**IDX_FILES, "train-images-idx3-ubyte": b"\0\0\x0d\3" + bytes(12)}
    yield "float idx", lambda at: write_files(at / "f", floats), "no IDX file of unsigned bytes"
    yield "idx missing", lambda at: write_files(at / "f", dict(list(IDX_FILES.items())[:3])), "has no t10k-labels"
    more = {**IDX_FILES, "train-labels-idx1-ubyte": idx(GREY_Y[:5])}
    yield "labels missing", lambda at: write_files(at / "f", more), "6 train images, but labels of shape"
    no_tar = {"c.tar.gz": b"no archive"}
    yield "no tar", lambda at: write_files(at, no_tar) / "c.tar.gz", "no whole tar archive"
    yield "other tar", lambda at: write_tar(at / "c.tgz", {"a": b"b"}), "not CIFAR-10"
    few = {name: data for name, data in cifar_files("").items() if name != "data_batch_3"}
    yield "batch missing", lambda at: write_tar(at / "c.tgz", few), "without data_batch_3"
    evil = {**cifar_files(""), "data_batch_1": pickle.dumps(Evil())}
    yield "evil pickle", lambda at: write_tar(at / "c.tgz", evil), "asks for builtins.exec"
    broken = {**cifar_files(""), "data_batch_1": cifar_files("")["data_batch_1"][:50]}
    yield "cut pickle", lambda at: write_tar(at / "c.tgz", broken), "no whole batch of CIFAR-10"
    bits = {**cifar_files(".bin"), "data_batch_1.bin": bytes(100)}
    yield "cut binary", lambda at: write_tar(at / "c.tgz", bits), "100 bytes are no whole number of images"
    yield "no zip", lambda at: write_files(at, {"a.zip": b"no"}) / "a.zip", "no whole zip file"
    train = by_class(GREY_X, GREY_Y, "train")
    yield "no test", lambda at: write_files(at / "f", {**train, "test/a/b.txt": b""}), "6 of train and 0 of test"
    odd = {**train, "test/class0/0.png": png(GREY_X[0][:2])}
    yield "other size", lambda at: write_files(at / "f", odd), "train images are .* test images"
    text = {**train, "test/class0/0.png": b"text"}
    yield "no image", lambda at: write_files(at / "f", text), "no whole image"
    new = {**train, "test/unknown/0.png": png(GREY_X[0])}
    yield "class in test only", lambda at: write_files(at / "f", new), "in the test part only"
    yield "no npz", lambda at: write_files(at, {"a.npz": b"PK no"}) / "a.npz", "no whole .npz"


CASES = list(damaged())


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_damaged_data_gives_a_clear_error(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read(make(tmp_path))


def test_npz_without_the_four_arrays_or_with_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_x=GREY_X)
    with pytest.raises(ArgumentError, match="has no train_y or y_train, only train_x"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", train_x=GREY_X / 255, train_y=GREY_Y, test_x=GREY_TEST, test_y=GREY_TEST_Y)
    with pytest.raises(ArgumentError, match="expected uint8 images"):
        read(tmp_path / "b.npz")


def test_stored_images_come_back_and_a_half_written_folder_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_x=GREY_X, train_y=GREY_Y, test_x=GREY_TEST, test_y=GREY_TEST_Y)
    images = read(tmp_path / "a.npz")
    folder = store(images, tmp_path / "cache" / "a")
    assert store(images, folder) == folder
    grey(opened(folder))
    assert opened(folder).sha256 == images.sha256
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    (folder / "card.json").unlink()
    with pytest.raises(ArgumentError, match="holds no stored images"):
        opened(folder)


class Server:
    """Serves bytes on this machine; can break off, ignore ranges, or serve something else."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str | None] = []
        self.cut: int | None = None
        self.knows_ranges = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data, wanted = outer.files.get(self.path.strip("/")), self.headers.get("Range")
                outer.asked.append(wanted)
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted[6:-1]) if wanted and outer.knows_ranges else 0
                if start >= len(data) > 0:
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                end, outer.cut = outer.cut, None
                self.wfile.write(data[start:end])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def home(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def remote_of(server: Server) -> Remote:
    server.files = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in IDX_FILES.items()}
    sums = {name: f"md5:{hashlib.md5(data).hexdigest()}" for name, data in server.files.items()}
    return Remote("small", server.home, sums, 1)


def test_a_data_set_is_downloaded_once(tmp_path: Path, server: Server) -> None:
    remote = remote_of(server)
    grey(read(fetch(remote, tmp_path / "small")))
    assert len(server.asked) == 4
    fetch(remote, tmp_path / "small")
    assert len(server.asked) == 4
    assert not list((tmp_path / "small").glob("*.part"))


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_download_goes_on_where_it_ended(tmp_path: Path, server: Server, knows_ranges: bool) -> None:
    data = RNG.bytes(200_000)
    server.files = {"blob": data}
    remote = Remote("blob", server.home, {"blob": f"md5:{hashlib.md5(data).hexdigest()}"}, 1)
    server.cut, server.knows_ranges = 150_000, knows_ranges
    with pytest.raises(ArgumentError, match=r"blob \(1 MB\) is not on this machine.*Run again.*--data PATH"):
        fetch(remote, tmp_path / "blob")
    (part,) = (tmp_path / "blob").iterdir()
    assert part.name == "blob.part"
    have = part.stat().st_size
    assert have > 100_000
    assert (fetch(remote, tmp_path / "blob") / "blob").read_bytes() == data
    assert server.asked == [None, f"bytes={have}-"]


def test_a_whole_part_is_not_asked_for_again(tmp_path: Path, server: Server) -> None:
    remote = remote_of(server)
    name = next(iter(remote.files))
    write_files(tmp_path / "small", {f"{name}.part": server.files[name]})
    grey(read(fetch(remote, tmp_path / "small")))


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(tmp_path: Path, server: Server) -> None:
    remote = remote_of(server)
    server.files["train-images-idx3-ubyte.gz"] = b"something else"
    with pytest.raises(ArgumentError, match=r"small has a wrong checksum and was removed.*--data PATH"):
        fetch(remote, tmp_path / "small")
    assert list((tmp_path / "small").iterdir()) == []


def test_a_missing_file_names_size_source_and_option(tmp_path: Path, server: Server) -> None:
    remote = remote_of(server)
    server.files.clear()
    with pytest.raises(ArgumentError, match=rf"1 MB.*{server.home}.*404.*--data PATH"):
        fetch(remote, tmp_path / "small")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BATCHNORM_CACHE")
    assert "batchnorm" in str(cache_folder())


def test_the_remotes_are_whole() -> None:
    assert set(REMOTES) == {"mnist", "fashion_mnist", "cifar10"}
    for remote in REMOTES.values():
        assert remote.home.startswith("http")
        assert all(len(checksum.removeprefix("md5:")) == 32 for checksum in remote.files.values())
