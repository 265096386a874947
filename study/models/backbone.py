"""The backbone: ResNet50 without its classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import ResNet


@dataclass(frozen=True)
class Architecture:
    """How the ResNet50 variants with published weights differ."""

    stride_on_1x1: bool
    """True if the first block of stages 2 to 4 downsamples on its first 1x1 convolution (He et al.
    2015, Keras), False if on its 3x3 convolution (torchvision, "v1.5")."""
    bn_eps: float
    """BatchNorm's epsilon, added to the variance."""
    bn_momentum: float = 0.1
    """How far a training step moves BatchNorm's running statistics towards those of the batch."""


#: torchvision's ResNet50, and Keras' (keras.applications.ResNet50, whose momentum of 0.99 is 0.01
#: in PyTorch's convention).
TORCHVISION = Architecture(stride_on_1x1=False, bn_eps=1e-5)
KERAS = Architecture(stride_on_1x1=True, bn_eps=1e-3, bn_momentum=0.01)


def build_backbone(state: Mapping[str, Tensor], architecture: Architecture) -> nn.Module:
    """Build a ResNet50 without classifier, in evaluation mode.

    Each call returns an independent backbone: training it changes neither `state` nor other
    backbones. No random numbers are drawn.

    Args:
        state: The weights under torchvision's names, without `fc.*`.
        architecture: The variant the weights were trained in.

    Returns:
        A module from fp32 [B, 3, S, S], S at least 32, to fp32 [B, 2048].
    """
    backbone: nn.Module = empty_resnet50(architecture)
    backbone.fc = nn.Identity()
    # Without the copies, training the backbone would change the caller's tensors.
    backbone.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return backbone.eval()


def backbone_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a ResNet50 without classifier, by torchvision's names.

    `num_batches_tracked` is omitted. Every start checks the weights against these shapes; building
    the network to get them would take seconds.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, channels: int, inputs: int, side: int) -> None:
        shapes[f"{conv}.weight"] = (channels, inputs, side, side)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (channels,)

    add("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for number in range(blocks):
            block = f"layer{stage}.{number}"
            add(f"{block}.conv1", f"{block}.bn1", width, inputs, 1)
            add(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            add(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1)
            if number == 0:
                add(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    return shapes


def empty_resnet50(architecture: Architecture) -> "ResNet":
    """Build a ResNet50 on the meta device: shapes without values."""
    # Imported here: torchvision takes seconds to import.
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = architecture.bn_eps, architecture.bn_momentum
    if architecture.stride_on_1x1:
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model
