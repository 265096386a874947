"""What a path given as `--data` may hold, told by the names of its files; nothing is read."""

from pathlib import Path

#: CIFAR-10's official batches, in order.
BATCH_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

#: The three layouts in which CIFAR-10 is found, each by its file names.
BINARY_FILES = tuple(f"{batch}.bin" for batch in BATCH_NAMES)
PICKLE_FILES = BATCH_NAMES
PNG_FILES = tuple(f"{batch}.png" for batch in BATCH_NAMES)
LABEL_FILES = ("train_lables.json", "test_lables.json")  # so spelt in the package


def is_image_folder(spec: str) -> bool:
    """Whether `--data` names a folder of images of the user's own, rather than CIFAR-10."""
    try:
        return spec != "cifar10" and Path(spec).is_dir() and not _holds_cifar10(Path(spec))
    except (OSError, ValueError):  # what cannot be a path is none
        return False


def _holds_cifar10(folder: Path) -> bool:
    """Whether a folder, or a folder in it, has a file named as one of CIFAR-10's."""
    wanted = {*BINARY_FILES, *PICKLE_FILES, *PNG_FILES, *LABEL_FILES}
    return any(file.name in wanted for file in (*folder.glob("*"), *folder.glob("*/*")))
