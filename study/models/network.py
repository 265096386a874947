"""The network that trains as a whole: preprocessing, backbone and head in one module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from search_spaces import Value, value_of
from study.models.backbone import Architecture, build_backbone
from study.models.head import FEATURES, build_head
from study.models.preprocess import Preprocess

#: What `frozen_layers` stands for: the beginnings of the names of the backbone's modules.
STEM = ("conv1", "bn1")
FROZEN_LAYERS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "stem": STEM,
    "stage-3": (*STEM, "layer1", "layer2", "layer3"),
}


class Network(nn.Module):
    """From images to logits; every layer trains that is not frozen.

    Attributes:
        backbone: torchvision's ResNet50 without its classifier.
        head: As `build_head` makes it.
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
        """Join the parts; they are taken over, not copied.

        Args:
            preprocess: How images are made ready for the backbone.
            backbone: From `build_backbone`.
            head: From its features to logits.
            frozen_layers: Which of its layers stay as they are; a key of FROZEN_LAYERS.
            batch_norm: "batch": in training, the BatchNorms of the layers that train normalise by
                the batch and update their running statistics, as Keras and PyTorch do by default;
                "pretrained": all of them normalise by the pretrained statistics, in training too.
                In evaluation mode the running statistics are used, whichever they are.
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
        """Logits: uint8 [batch, height, width, 3], RGB -> [batch, classes]."""
        images = self.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def train(self, mode: bool = True) -> "Network":
        """Set the mode; BatchNorms whose statistics are fixed stay in evaluation mode."""
        super().train(mode)
        for module in self._fixed_norms:
            module.eval()
        return self


@dataclass(frozen=True)
class Pretrained:
    """The backbone that every run starts from when all layers train."""

    state: Mapping[str, Tensor]
    """fp32, torchvision's names without `fc.*`."""
    architecture: Architecture
    preprocess: Preprocess

    def to(self, device: torch.device) -> "Pretrained":
        """The same on another device."""
        state = {name: value.to(device) for name, value in self.state.items()}
        return replace(self, state=state)

    def build(self, hyperparameters: Mapping[str, Value], classes: int, seed: int) -> Network:
        """A network of its own, on the device of `state`: training it leaves `state` as it is.

        Args:
            hyperparameters: Of the run.
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
