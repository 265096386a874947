"""The exported model as a PyTorch module, from images to logits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from search_spaces import Value
from study.features.extract import folded, images_at_once
from study.features.onednn_engine import in_onednn
from study.features.standardise import Standardisation
from study.models.backbone import Architecture, build_backbone
from study.models.head import Dropout, restore_head
from study.models.preprocess import Preprocess
from study.system.progress import progress


@dataclass(frozen=True)
class ModelParts:
    """What it takes to rebuild a model."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    side: int
    """Of the images that the study had, in pixels; files are read at that size."""
    architecture: Architecture
    hyperparameters: Mapping[str, Value]
    """Of the runs that trained the heads; the heads are built from them."""
    backbone: Mapping[str, Tensor]
    """torchvision's names, without `fc.*`."""
    standardisation: Standardisation
    heads: tuple[Mapping[str, Tensor], ...]
    """One, or several for an ensemble; as `head.build_head` names them."""


class Model(nn.Module):
    """Preprocessing, backbone, standardisation and heads in one, in fp32 and evaluation mode.

    Attributes:
        classes: Their names, in the order of the logits.
        preprocess: What is done to images before the backbone.
        side: To what squares image files are made that the model is to be used on, in pixels.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        self.classes = parts.classes
        self.preprocess = parts.preprocess
        self.side = parts.side
        backbone = folded(build_backbone(parts.backbone, parts.architecture))
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.register_buffer("feature_mean", parts.standardisation.mean)
        self.register_buffer("feature_std", parts.standardisation.std)
        self.heads = nn.ModuleList(
            restore_head(head, parts.hyperparameters) for head in parts.heads
        )
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits: uint8 [batch, height, width, 3], RGB -> fp32 [batch, classes]."""
        return self.classify(self.features(self.preprocess(pixels)))

    def features(self, images: Tensor) -> Tensor:
        """Standardised features: preprocessed images [batch, 3, S, S] -> [batch, features]."""
        return self.standardise(self.backbone(images.to(memory_format=torch.channels_last)))

    def standardise(self, features: Tensor) -> Tensor:
        """Features as the heads were trained on them: [batch, features] -> the same."""
        return (features - self.feature_mean) / self.feature_std

    def classify(self, features: Tensor) -> Tensor:
        """Logits of features; of an ensemble the logarithm of its heads' mean probabilities."""
        if len(self.heads) == 1:
            logits: Tensor = self.heads[0](features)
            return logits
        each = torch.stack([head(features).log_softmax(dim=1) for head in self.heads])
        return each.logsumexp(dim=0) - math.log(len(self.heads))

    @property
    def images_at_once(self) -> int:
        """How many images to give it at a time on a CPU."""
        return images_at_once("cpu", self.preprocess.image_size)

    @property
    def has_dropout(self) -> bool:
        """Whether dropout would change anything."""
        return any(module.p > 0 for module in self.modules() if isinstance(module, Dropout))

    def sample(self, pixels: Tensor, samples: int, seed: int) -> Tensor:
        """Probabilities with dropout kept on, as often as asked (Gal and Ghahramani 2016).

        The backbone, which has no dropout, runs once.

        Args:
            pixels: uint8 [batch, height, width, 3], RGB.
            samples: How often.
            seed: Of the masks.

        Returns:
            fp32 [samples, batch, classes].
        """
        features = self.features(self.preprocess(pixels))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.heads.train()
                drawn = [self.classify(features).softmax(dim=1) for _ in range(samples)]
            finally:
                self.heads.eval()
        return torch.stack(drawn)


def predict_logits(
    model: Model, pixels: np.ndarray, rows: np.ndarray | None = None, what: str = "Predicting"
) -> Tensor:
    """Logits of many images, batch by batch, with a progress bar: fp32 [n, classes].

    They are the model's own up to rounding: its backbone runs in oneDNN's operators, which are
    faster.

    Args:
        model: The model, on the CPU.
        pixels: uint8 [n, height, width, 3], RGB.
        rows: Which of them, in this order; None: all.
        what: The step in words.
    """
    rows = np.arange(len(pixels)) if rows is None else rows
    batch_size, preprocess = model.images_at_once, model.preprocess
    backbone = in_onednn(model.backbone, preprocess.image_size, batch_size)
    done = []
    with torch.inference_mode(), progress(what, len(rows), "images") as advance:
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(pixels[rows[start : start + batch_size]])
            images = preprocess(batch).to(memory_format=torch.channels_last)
            done.append(model.classify(model.standardise(backbone(images))))
            advance(len(batch))
    return torch.cat(done)
