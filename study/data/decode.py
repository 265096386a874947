"""Decode image files of any format, size and mode that Pillow reads into squares of one size.

The study and `study.predict` share this code, so that a model sees the pixels it was trained on.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from study.system.hardware import cpu_count

#: Part of the cache key: increment it with every change to this code that changes the pixels.
VERSION = 1
#: Formats for which Pillow runs external programs.
REFUSED_FORMATS = ("EPS",)
#: JPEG files may be decoded at a reduced size, at least this many times the wanted size.
SPARE = 2
#: Files decoded ahead of the next one to be returned.
AHEAD = 512


class UnreadableImageError(Exception):
    """A file is not a usable image; the message is a short reason."""


def read_image(path: Path, side: int) -> np.ndarray:
    """Read an image file: turn it upright, crop the central square and resize it.

    The mode is converted by Pillow's `convert("RGB")`, as in torchvision's ImageFolder:
    transparency is dropped. 16-bit greyscale images keep their 8 highest bits. Only the first frame
    of an animation is read.

    Args:
        path: The file.
        side: Side length of the result, in pixels.

    Returns:
        uint8 [side, side, 3], RGB. Resized bilinearly with antialiasing.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            shrink = SPARE * side / min(image.size)
            if shrink < 1:
                image.draft("RGB", (round(image.width * shrink), round(image.height * shrink)))
            upright = _to_rgb(ImageOps.exif_transpose(image))
    # A damaged file can raise almost anything.
    except Exception as error:
        raise UnreadableImageError(_short_reason(error)) from error
    square = min(upright.size)
    left, top = (upright.width - square) // 2, (upright.height - square) // 2
    box = (left, top, left + square, top + square)
    return np.asarray(upright.resize((side, side), Image.Resampling.BILINEAR, box=box))


def read_images(
    paths: Iterable[Path], side: int, threads: int | None = None
) -> Iterator[tuple[Path, np.ndarray | UnreadableImageError]]:
    """Read many files in parallel and yield them in order; see `read_image`.

    Args:
        paths: The files.
        side: Side length of the results, in pixels.
        threads: Number of threads; None: one per core.
    """

    def read(path: Path) -> tuple[Path, np.ndarray | UnreadableImageError]:
        try:
            return path, read_image(path, side)
        except UnreadableImageError as error:
            return path, error

    ahead = deque[Future[tuple[Path, np.ndarray | UnreadableImageError]]]()
    # Pillow releases the GIL while it decodes and resizes.
    with _large_images_allowed(), ThreadPoolExecutor(threads or cpu_count()) as pool:
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file suffixes that Pillow can read, in lower case: ".jpg", ".png", ..."""
    known = Image.registered_extensions()
    readable = set(_formats())
    return frozenset(suffix for suffix, name in known.items() if name in readable)


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()  # noqa: PTH122


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted; follow links, but enter link cycles only once."""
    if not folder.is_dir():
        return
    seen = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(f"{place}/{name}") not in seen
        )
        for name in sorted(names):
            yield Path(place) / name


def as_text(path: Path) -> str:
    """Return a path as text; bytes that cannot be decoded are replaced."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in REFUSED_FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"its pixel values (mode {image.mode}) have no known range")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Suppress Pillow's warning above 89 megapixels; twice that is still an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _short_reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
