"""Image files: from any format, size and mode that Pillow reads to squares of one size.

The same function serves the study and `study.predict`, so that a model is used on what it was
trained on.
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

#: Part of the cache's key: raise it with every change to this code that changes the pixels.
VERSION = 1
#: Pillow reads them with the help of other programs.
REFUSED_FORMATS = ("EPS",)
#: JPEG files may be read at a part of their size; so many times the wanted one is left.
SPARE = 2
#: Files decoded ahead of the one that is wanted next.
AHEAD = 512


class UnreadableImageError(Exception):
    """Why a file is no image that can be used, in a few words."""


def read_image(path: Path, side: int) -> np.ndarray:
    """Read an image file: upright, its central square, resized.

    The mode is changed as by Pillow's `convert("RGB")`, which torchvision's ImageFolder uses:
    transparency is dropped. Grey images of 16 bits keep their 8 highest. Of an animation the first
    picture is taken.

    Args:
        path: The file.
        side: Of the result, in pixels.

    Returns:
        uint8 [side, side, 3], RGB. Resized bilinearly with antialiasing.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            shrink = SPARE * side / min(image.size)
            if shrink < 1:
                image.draft("RGB", (round(image.width * shrink), round(image.height * shrink)))
            upright = _to_rgb(ImageOps.exif_transpose(image))
    # A damaged file can raise nearly anything.
    except Exception as error:
        raise UnreadableImageError(_why(error)) from error
    square = min(upright.size)
    left, top = (upright.width - square) // 2, (upright.height - square) // 2
    box = (left, top, left + square, top + square)
    return np.asarray(upright.resize((side, side), Image.Resampling.BILINEAR, box=box))


def read_images(
    paths: Iterable[Path], side: int, threads: int | None = None
) -> Iterator[tuple[Path, np.ndarray | UnreadableImageError]]:
    """Read many files in their order; see `read_image`.

    Args:
        paths: The files.
        side: Of the results, in pixels.
        threads: That read at once; None: as many as there are cores.
    """

    def read(path: Path) -> tuple[Path, np.ndarray | UnreadableImageError]:
        try:
            return path, read_image(path, side)
        except UnreadableImageError as error:
            return path, error

    ahead = deque[Future[tuple[Path, np.ndarray | UnreadableImageError]]]()
    # Pillow lets other threads run while it decodes and resizes.
    with _large_images_allowed(), ThreadPoolExecutor(threads or cpu_count()) as pool:
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@cache
def image_suffixes() -> frozenset[str]:
    """How the names of files end that Pillow can read, in lower case: ".jpg", ".png", ..."""
    known = Image.registered_extensions()
    readable = set(_formats())
    return frozenset(suffix for suffix, name in known.items() if name in readable)


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name; hidden ones are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()  # noqa: PTH122


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; links are followed, circles of them once."""
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
    """A path as text, whatever bytes its name has."""
    return os.fsencode(path.as_posix()).decode(errors="replace")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in REFUSED_FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"its values (mode {image.mode}) have no known range")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Without Pillow's warning of images of 89 megapixels; it refuses those of twice as many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
