"""`--data`: CIFAR-10, or images of the user's own."""

from pathlib import Path

from study.data.cifar10 import load_cifar10
from study.data.dataset import Dataset
from study.data.image_folder import load_image_folder
from study.data.layouts import is_image_folder


def load_dataset(
    spec: str,
    images: int | None = None,
    pinned: str | None = None,
    *,
    image_size: int = 224,
    test_fraction: float | None = None,
) -> Dataset:
    """Load the images of a study.

    Args:
        spec: "cifar10", the path of a folder or archive that holds CIFAR-10, or of a folder of
            class folders.
        images: Load only so many images, a stratified part. None: all of them.
        pinned: The `source_key` of the study that goes on.
        image_size: Side in pixels of the backbone's input; own images are kept at that size.
        test_fraction: What part of own images becomes test where they have no folder of it; None:
            a fifth.

    Raises:
        UserError: If the data cannot be had or are of no use, or an option is out of range.
    """
    if is_image_folder(spec):
        return load_image_folder(Path(spec), image_size, images, test_fraction)
    return load_cifar10(spec, images, pinned)
