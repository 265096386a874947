"""`--data`: CIFAR-10, or the user's own images."""

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
        images: Size of a stratified sample. None: all images.
        pinned: `source_key` of the study being resumed.
        image_size: Side length in pixels of the backbone's input; the user's own images are resized
            to it.
        test_fraction: Fraction of the user's own images that becomes test if there is no test/;
            None: a fifth.

    Raises:
        UserError: The data cannot be loaded or are unusable, or an option is out of range.
    """
    if is_image_folder(spec):
        return load_image_folder(Path(spec), image_size, images, test_fraction)
    return load_cifar10(spec, images, pinned)
