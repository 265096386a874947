"""Preprocessing of images for the backbone."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """The backbone's preprocessing: resize, then (value * scale - mean) / std."""

    name: str
    """"imagenet", "caffe" or "raw"."""
    channels: Literal["RGB", "BGR"]
    """The channel order that the backbone expects; images are RGB."""
    scale: float
    """Factor for pixel values, which are 0 to 255."""
    mean: tuple[float, float, float]
    """Per channel, in the order of `channels`."""
    std: tuple[float, float, float]
    """Per channel, in the order of `channels`."""
    image_size: int
    """Side of the square that images are resized to, in pixels; at least 32."""

    def __post_init__(self) -> None:
        # JSON turns tuples into lists.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Preprocess images.

        Args:
            pixels: uint8 [B, H, W, 3], RGB. Non-square images are stretched.

        Returns:
            fp32 [B, 3, image_size, image_size], on the same device.
        """
        size = (self.image_size, self.image_size)
        images = pixels.permute(0, 3, 1, 2).float()
        if self.channels == "BGR":
            images = images.flip(1)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        mean, std = (_by_channel(values, pixels.device) for values in (self.mean, self.std))
        return (images * self.scale - mean) / std


@lru_cache(maxsize=32)
def _by_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return one value per channel, [3, 1, 1]; cached, as a CUDA graph cannot copy from the CPU."""
    # Evaluation may call this first, but training cannot use an inference tensor.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(3, 1, 1)


#: By name, at ImageNet's image size. torchvision's weights were trained with "imagenet", Keras'
#: with "caffe"; "raw" is what the article fed to Keras' weights.
PREPROCESSES = {
    preprocess.name: preprocess
    for preprocess in (
        Preprocess("imagenet", "RGB", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
        Preprocess("caffe", "BGR", 1.0, (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), 224),
        Preprocess("raw", "RGB", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 224),
    )
}
