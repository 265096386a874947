"""Random flips and shifts of training images, one batch at a time, on the training device.

An epoch's augmentation is drawn before the epoch, on the CPU, from its own random stream: it is the
same on every device, and the same for both runs of a matched pair.
"""

import torch
from torch import Tensor

from study.config import Augment

#: Largest shift as a fraction of the image's side, as is usual for CIFAR-10: 4 of 32 pixels.
LARGEST_SHIFT = 1 / 8


def draw_views(
    augment: Augment, rows: int, height: int, width: int, random: torch.Generator
) -> Tensor:
    """Draw the augmentation of each image for one epoch.

    Args:
        augment: "flip" mirrors half of the images; "crop-flip" also shifts each by up to an eighth
            of its side in both directions, which is a random crop from the padded image; "none"
            leaves images unchanged.
        rows: Number of images.
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.
        random: A CPU generator.

    Returns:
        int64 [rows, 3] on the CPU: the view's offset down and its offset to the right, in pixels,
        both possibly negative, and 1 if it is mirrored, else 0.
    """
    views = torch.zeros(rows, 3, dtype=torch.int64)
    if augment == "crop-flip":
        for axis, side in enumerate((height, width)):
            most = int(LARGEST_SHIFT * side)
            views[:, axis] = torch.randint(-most, most + 1, (rows,), generator=random)
    if augment != "none":
        views[:, 2] = torch.randint(0, 2, (rows,), generator=random)
    return views


def take_views(images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
    """Look up augmented images of a dataset, in one indexing operation.

    Images are padded by reflection at the edge (the edge itself is not repeated).

    Args:
        images: [n, height, width, channels], any dtype.
        rows: int64 [batch], which images; on the device of `images`.
        views: int64 [batch, 3], from `draw_views`; on the same device.

    Returns:
        [batch, height, width, channels].
    """
    _, height, width, _ = images.shape
    down, right, mirrored = views[:, 0:1], views[:, 1:2], views[:, 2:3]
    x = torch.arange(width, device=images.device)
    x = torch.where(mirrored == 1, width - 1 - x, x)
    y = torch.arange(height, device=images.device)
    ys, xs = _reflect(y + down, height), _reflect(x + right, width)
    return images[rows[:, None, None], ys[:, :, None], xs[:, None, :]]


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Reflect positions outside 0 to size - 1 at the ends."""
    return size - 1 - (size - 1 - positions.abs()).abs()
