"""The network to fine-tune: preprocessing, backbone and head in one module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from search_spaces import Value, value_of
from study.models.backbone import Architecture, build_backbone
from study.models.head import FEATURES, build_head
from study.models.preprocess import Preprocess

STEM = ("conv1", "bn1")
#: The backbone's top-level modules that each value of `frozen_layers` freezes.
FROZEN_LAYERS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "stem": STEM,
    "stage-3": (*STEM, "layer1", "layer2", "layer3"),
}


class Network(nn.Module):
    """From images to logits; every layer that is not frozen trains.

    Attributes:
        backbone: torchvision's ResNet50 without its classifier.
        head: From `build_head`.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        backbone: nn.Module,
        head: nn.Module,
        *,
        frozen_layers: str,
        batch_norm: str,
    ) -> None:
        """Join the parts without copying them.

        Args:
            preprocess: The backbone's preprocessing.
            backbone: From `build_backbone`.
            head: From the backbone's features to logits.
            frozen_layers: Which layers of the backbone stay fixed; a key of FROZEN_LAYERS.
            batch_norm: "batch": in training, BatchNorms of layers that train normalise by the batch
                and update their running statistics, as Keras and PyTorch do by default;
                "pretrained": all BatchNorms use the pretrained statistics, in training too.
                Evaluation mode uses the running statistics in either case.
        """
        super().__init__()
        self.preprocess = preprocess
        self.backbone = backbone
        self.head = head
        frozen = FROZEN_LAYERS[frozen_layers]
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.split(".")[0] not in frozen)
        self._fixed_norms = [
            module
            for name, module in backbone.named_modules()
            if isinstance(module, nn.BatchNorm2d)
            and (batch_norm == "pretrained" or name.split(".")[0] in frozen)
        ]

    def forward(self, pixels: Tensor) -> Tensor:
        """Map images, uint8 [batch, height, width, 3], RGB, to logits [batch, classes]."""
        images = self.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def train(self, mode: bool = True) -> "Network":
        """Set the mode; BatchNorms with fixed statistics stay in evaluation mode."""
        super().train(mode)
        for module in self._fixed_norms:
            module.eval()
        return self


@dataclass(frozen=True)
class Pretrained:
    """The pretrained backbone that every fine-tuning run starts from."""

    state: Mapping[str, Tensor]
    """fp32, under torchvision's names, without `fc.*`."""
    architecture: Architecture
    preprocess: Preprocess

    def to(self, device: torch.device) -> "Pretrained":
        """Return the same with its tensors on a device."""
        state = {name: value.to(device) for name, value in self.state.items()}
        return replace(self, state=state)

    def build(self, hyperparameters: Mapping[str, Value], classes: int, seed: int) -> Network:
        """Build an independent network on the device of `state`; training it keeps `state` intact.

        Args:
            hyperparameters: The run's hyperparameters.
            classes: Number of classes.
            seed: The head's initial weights come from its stream "weights".
        """
        device = next(iter(self.state.values())).device
        backbone = build_backbone(self.state, self.architecture)
        head = build_head(hyperparameters, FEATURES, classes, seed)
        network = Network(
            self.preprocess,
            backbone,
            head,
            frozen_layers=str(value_of(hyperparameters, "frozen_layers")),
            batch_norm=str(value_of(hyperparameters, "batch_norm")),
        )
        layout = torch.channels_last
        return network.to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]
