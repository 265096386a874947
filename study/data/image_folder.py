"""The user's own images: a folder of class folders, as read by torchvision's ImageFolder.

    PATH/CLASS/...                              test and val are carved out at random, seeded
    PATH/train/CLASS/...  PATH/test/CLASS/...   val is carved out of train
    PATH/train/...  PATH/val/...  PATH/test/... nothing is carved out

Every file is decoded once, on all cores; the pixels are stored in the user's cache as a single
memory-mapped file.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL

from study.data import decode
from study.data.dataset import Dataset
from study.data.decode import UnreadableImageError, as_text, is_image_name, read_images, walk
from study.data.duplicates import perceptual_hash
from study.data.split import SMALLEST_SAMPLE, in_proportion, shuffled_by_class
from study.errors import UserError
from study.system.cache import cache_dir, cached, sha256_of, whole_file
from study.system.progress import console, progress

PartName = Literal["train", "val", "test"]
PARTS: tuple[PartName, ...] = ("train", "val", "test")
#: Fraction of all images that becomes `test` if there is no folder of that name.
TEST_FRACTION = 0.2
#: Largest fraction of files that may be unreadable; a single one is always allowed.
UNREADABLE_LIMIT = 0.01
#: At most this many unreadable files are listed on the screen; study.json lists all of them.
NAMED = 10

LAYOUT = (
    "give a folder with a subfolder for each class (PATH/cat/1.jpg), or with train/ and test/ (and"
    " val/) that contain such subfolders, or CIFAR-10 in one of its usual layouts"
)


@dataclass(frozen=True)
class _File:
    """An image file with its part and label."""

    path: Path
    name: str
    """Path inside the user's folder, separated by "/"; undecodable bytes are replaced."""
    part: PartName
    label: int


@dataclass(frozen=True)
class _Decoded:
    """The decoded images of a list of files."""

    pixels: np.ndarray
    rows: np.ndarray
    """int64: indices of the readable files, in order."""
    hashes: np.ndarray
    unreadable: tuple[str, ...]
    sha256: str
    """SHA-256 of the pixels."""


def load_image_folder(
    folder: Path,
    image_size: int,
    images: int | None = None,
    test_fraction: float | None = None,
) -> Dataset:
    """Load the images of a folder of class folders.

    Args:
        folder: The folder; its layout is detected.
        image_size: Side length in pixels to which images are resized.
        images: Size of a stratified, deterministic sample. None: all images.
        test_fraction: Fraction of each class that becomes test if there is no test/; None: a fifth.

    Raises:
        UserError: The folder has no such layout, too many files cannot be read, or an option is
            out of range.
    """
    parts = _parts(folder)
    classes, files, ignored = _find_files(folder, parts)
    if "test" not in parts:
        files = _carve_test(files, classes, test_fraction or TEST_FRACTION)
    elif test_fraction is not None:
        raise UserError(
            f"--test-fraction: {folder} has a test/ folder, which is used as test; omit the option."
        )
    if images is not None:
        files = _stratified_sample(files, images, len(classes))
    files = sorted(files, key=lambda file: PARTS.index(file.part))
    if ignored:
        console.print(f"{folder}: skipped files without an image suffix: {_list_suffixes(ignored)}")
    decoded = _decode(folder, files, image_size)
    _check_unreadable(folder, decoded.unreadable, len(files))
    kept = [files[row] for row in decoded.rows]
    per_part = Counter(file.part for file in kept)
    labels = np.array([file.label for file in kept], np.int64)
    return Dataset(
        name=folder.resolve().name,
        classes=classes,
        pixels=decoded.pixels,
        labels=labels,
        training_count=per_part["train"],
        val_count=per_part["val"],
        source=str(folder),
        source_key="folder",
        sha256=sha256_of(
            json.dumps([classes, labels.tolist(), [per_part[part] for part in PARTS]]).encode()
            + decoded.sha256.encode()
        ),
        files=tuple(file.name for file in kept),
        unreadable=decoded.unreadable,
        hashes=decoded.hashes,
    )


# --- finding files ----------------------------------------------------------------------------


def _parts(folder: Path) -> dict[PartName, Path]:
    """Return the folders of train, val and test; only train if test is to be carved out.

    Raises:
        UserError: There is a train/ but no test/.
    """
    folders = _folders(folder)
    if "train" not in folders or set(folders) - set(PARTS) or not _folders(folder / "train"):
        return {"train": folder}  # its subfolders are classes
    parts = {part: folder / part for part in PARTS if part in folders}
    if "test" not in parts:
        raise UserError(
            f"--data {folder}: no test/ next to {' and '.join(f'{p}/' for p in parts)}; the study"
            " needs images that are not used for any choice: add test/, or rename val/ to test/ if"
            " it is meant for that (a new val is then carved out of train/)."
        )
    return parts


def _find_files(
    folder: Path, parts: Mapping[PartName, Path]
) -> tuple[tuple[str, ...], list[_File], Counter[str]]:
    """Return the classes, the image files, and the number of other files by suffix."""
    ignored: Counter[str] = Counter()
    classes = tuple(_folders(parts["train"]))
    if len(classes) < 2:
        raise UserError(
            f"--data {folder}: {len(classes) or 'no'} class folder{'s' * (len(classes) != 1)} in"
            f" {parts['train']}; {LAYOUT}."
        )
    found = []
    for part, place in parts.items():
        if unknown := sorted(set(_folders(place)) - set(classes)):
            raise UserError(
                f"--data {folder}: class {unknown[0]} is in {part}/ but not in train/; add it to"
                f" train/, or remove it from {part}/."
            )
        for label, name in enumerate(classes):
            for path in walk(place / name):
                if is_image_name(path.name):
                    found.append(_File(path, as_text(path.relative_to(folder)), part, label))
                elif not path.name.startswith("."):
                    ignored[path.suffix.lower() or path.name] += 1
    if not found:
        raise UserError(f"--data {folder}: its class folders contain no images; {LAYOUT}.")
    return tuple(map(as_text, map(Path, classes))), found, ignored


def _folders(folder: Path) -> list[str]:
    """Return the names of visible subfolders, in the order of ImageFolder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"--data: {folder} cannot be read ({error.strerror or error}); make it readable."
        ) from None


def _list_suffixes(ignored: Counter[str]) -> str:
    return ", ".join(f"{number} × {suffix}" for suffix, number in ignored.most_common(5))


# --- choosing images --------------------------------------------------------------------------


def _carve_test(files: Sequence[_File], classes: Sequence[str], fraction: float) -> list[_File]:
    """Return the files with a fraction of each class reassigned to test."""
    labels = np.array([file.label for file in files])
    by_class = shuffled_by_class(labels, len(classes), seed=0)
    test = {int(row) for rows in by_class for row in rows[: round(fraction * len(rows))]}
    return [
        _File(file.path, file.name, "test", file.label) if row in test else file
        for row, file in enumerate(files)
    ]


def _stratified_sample(files: Sequence[_File], images: int, classes: int) -> list[_File]:
    """Return a stratified sample, with splits and classes in proportion."""
    if not SMALLEST_SAMPLE <= images <= len(files):
        raise UserError(
            f"--images {images:,} is out of range: give {SMALLEST_SAMPLE} to {len(files):,}."
            if len(files) >= SMALLEST_SAMPLE
            else f"--images {images:,}: there are only {len(files):,} images; omit the option."
        )
    groups = np.array([PARTS.index(file.part) * classes + file.label for file in files])
    by_group = shuffled_by_class(groups, len(PARTS) * classes, seed=0)
    counts = in_proportion([len(rows) for rows in by_group], images)
    chosen = np.concatenate([rows[:n] for rows, n in zip(by_group, counts, strict=True)])
    return [files[row] for row in np.sort(chosen)]


# --- decoding ---------------------------------------------------------------------------------


def _decode(folder: Path, files: Sequence[_File], image_size: int) -> _Decoded:
    """Return the pixels of the files, from the cache or else decoded and stored there."""
    stats = [(file.name, *_size_and_time(file.path)) for file in files]
    versions = [decode.VERSION, PIL.__version__, image_size]
    key = sha256_of(json.dumps([versions, str(folder.resolve()), stats]).encode())
    entry = cache_dir() / "images" / key

    def load() -> _Decoded | None:
        return _read_cache(entry, image_size)

    def make() -> _Decoded:
        with whole_file(entry / "pixels.bin") as partial:
            index = _decode_into(partial, files, image_size)
        index["sha256"] = sha256_of(entry / "pixels.bin")
        with whole_file(entry / "index.json") as partial:
            partial.write_text(json.dumps(index))
        made = _read_cache(entry, image_size)
        if made is None:
            raise UserError(f"{entry} cannot be read back after writing it; check the disk.")
        return made

    entry.parent.mkdir(parents=True, exist_ok=True)
    return cached(entry, load, make)


def _decode_into(pixels: Path, files: Sequence[_File], image_size: int) -> dict[str, Any]:
    """Write the images to a file one after the other; return the content of index.json."""
    rows: list[int] = []
    hashes: list[int] = []
    unreadable: list[str] = []
    with pixels.open("wb") as out, progress("Decoding images", len(files), "images") as advance:
        paths = (file.path for file in files)
        for row, (_, image) in enumerate(read_images(paths, image_size)):
            advance(1)
            if isinstance(image, UnreadableImageError):
                unreadable.append(f"{files[row].name}: {image}")
                continue
            rows.append(row)
            hashes.append(perceptual_hash(image))
            out.write(image.tobytes())
    return {"rows": rows, "hashes": hashes, "unreadable": unreadable}


def _read_cache(entry: Path, image_size: int) -> _Decoded | None:
    """Return the cached images; None if they are missing or damaged."""
    file = entry / "pixels.bin"
    try:
        index = json.loads((entry / "index.json").read_text())
        if sha256_of(file) != index["sha256"]:
            return None
        shape = (len(index["rows"]), image_size, image_size, 3)
        # Memory-mapped copy-on-write: writes do not reach the file. Empty files cannot be mapped.
        pixels = np.memmap(file, np.uint8, mode="c", shape=shape) if shape[0] else np.empty(shape)
        return _Decoded(
            np.asarray(pixels, np.uint8),
            np.array(index["rows"], np.int64),
            np.array(index["hashes"], np.uint64),
            tuple(map(str, index["unreadable"])),
            index["sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time, to detect changed files."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _check_unreadable(folder: Path, unreadable: Sequence[str], files: int) -> None:
    """Print the files that cannot be read.

    Raises:
        UserError: There are too many of them.
    """
    if not unreadable:
        return
    listed = "; ".join(unreadable[:NAMED])
    more = f"; and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
    if len(unreadable) > max(1, UNREADABLE_LIMIT * files):
        raise UserError(
            f"--data {folder}: {len(unreadable)} of {files} files cannot be read, more than"
            f" {UNREADABLE_LIMIT:.0%}: {listed}{more}; fix or remove them."
        )
    console.print(f"{folder}: skipped unreadable files: {listed}{more}", soft_wrap=True)
