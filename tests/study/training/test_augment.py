"""Augmentation against a plain reference, image by image."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from study.config import Augment
from study.data.dataset import Dataset
from study.training.augment import LARGEST_SHIFT, draw_views, take_views


def reference(image: Tensor, down: int, right: int, mirrored: int) -> Tensor:
    """Pad by reflection, crop, mirror: [height, width, 3] -> the same."""
    height, width, _ = image.shape
    most = int(LARGEST_SHIFT * max(height, width))
    padded = F.pad(image.permute(2, 0, 1).float(), (most,) * 4, mode="reflect")
    top, left = most + down, most + right
    crop = padded[:, top : top + height, left : left + width]
    return (crop.flip(2) if mirrored else crop).permute(1, 2, 0).to(image.dtype)


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_views_match_the_reference(
    augment: Augment, size: tuple[int, int], small_dataset: Dataset
) -> None:
    images = torch.from_numpy(small_dataset.pixels)[:, : size[0], : size[1]]
    rows = torch.randperm(len(images))[:100]
    views = draw_views(augment, 100, *size, torch.Generator().manual_seed(3))
    taken = take_views(images, rows, views)
    assert taken.dtype == torch.uint8
    for number, row in enumerate(rows):
        expected = reference(images[row], *views[number].tolist())
        assert torch.equal(taken[number], expected)


def test_distribution_of_views() -> None:
    def drawn(augment: Augment, seed: int = 1) -> Tensor:
        return draw_views(augment, 4000, 32, 32, torch.Generator().manual_seed(seed))

    assert not drawn("none").any()
    assert not drawn("flip")[:, :2].any()
    assert drawn("flip")[:, 2].double().mean() == pytest.approx(0.5, abs=0.04)
    assert set(drawn("crop-flip")[:, 0].tolist()) == set(range(-4, 5))
    assert set(drawn("crop-flip")[:, 1].tolist()) == set(range(-4, 5))
    assert torch.equal(drawn("crop-flip"), drawn("crop-flip"))
    assert not torch.equal(drawn("crop-flip"), drawn("crop-flip", seed=2))
