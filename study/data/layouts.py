"""Recognise the content of a `--data` path by its file names alone."""

from pathlib import Path

#: CIFAR-10's official batches, in order.
BATCH_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

#: File names of CIFAR-10's three layouts.
BINARY_FILES = tuple(f"{batch}.bin" for batch in BATCH_NAMES)
PICKLE_FILES = BATCH_NAMES
PNG_FILES = tuple(f"{batch}.png" for batch in BATCH_NAMES)
LABEL_FILES = ("train_lables.json", "test_lables.json")  # spelt like this in the package


def is_image_folder(spec: str) -> bool:
    """Return whether `--data` is a folder of the user's own images, rather than CIFAR-10."""
    try:
        return spec != "cifar10" and Path(spec).is_dir() and not _holds_cifar10(Path(spec))
    except (OSError, ValueError):  # not a valid path
        return False


def _holds_cifar10(folder: Path) -> bool:
    """Return whether a folder or its subfolders contain a file named like one of CIFAR-10's."""
    wanted = {*BINARY_FILES, *PICKLE_FILES, *PNG_FILES, *LABEL_FILES}
    return any(file.name in wanted for file in (*folder.glob("*"), *folder.glob("*/*")))
