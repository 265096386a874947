"""The exported model as a PyTorch module, from images to logits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from search_spaces import Value
from study.features.extract import batch_size_for, fold_batch_norms
from study.features.onednn_engine import in_onednn
from study.features.standardise import Standardisation
from study.models.backbone import Architecture, build_backbone
from study.models.head import Dropout, restore_head
from study.models.preprocess import Preprocess
from study.system.progress import progress


@dataclass(frozen=True)
class ModelParts:
    """Everything needed to rebuild a model."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    side: int
    """Side of the study's images in pixels; image files are read at this size."""
    architecture: Architecture
    hyperparameters: Mapping[str, Value]
    """Those of the runs that trained the heads; the heads are built from them."""
    backbone: Mapping[str, Tensor]
    """Weights under torchvision's names, without `fc.*`."""
    standardisation: Standardisation
    heads: tuple[Mapping[str, Tensor], ...]
    """Weights of one head, or several for an ensemble, under the names of `head.build_head`."""


class Model(nn.Module):
    """Preprocessing, backbone, standardisation and heads in one, in fp32 and evaluation mode.

    Attributes:
        classes: Class names, in the order of the logits.
        preprocess: Preprocessing of images for the backbone.
        side: Side in pixels of the square that image files are cropped and resized to.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, parts: ModelParts) -> None:
        super().__init__()
        self.classes = parts.classes
        self.preprocess = parts.preprocess
        self.side = parts.side
        backbone = fold_batch_norms(build_backbone(parts.backbone, parts.architecture))
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.register_buffer("feature_mean", parts.standardisation.mean)
        self.register_buffer("feature_std", parts.standardisation.std)
        self.heads = nn.ModuleList(
            restore_head(head, parts.hyperparameters) for head in parts.heads
        )
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits, fp32 [batch, classes], of RGB images, uint8 [batch, height, width, 3]."""
        return self.classify(self.features(self.preprocess(pixels)))

    def features(self, images: Tensor) -> Tensor:
        """Return standardised features [batch, features] of preprocessed [batch, 3, S, S]."""
        return self.standardise(self.backbone(images.to(memory_format=torch.channels_last)))

    def standardise(self, features: Tensor) -> Tensor:
        """Standardise features [batch, features] as for the training of the heads."""
        return (features - self.feature_mean) / self.feature_std

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of features; for an ensemble, the log of the heads' mean probabilities."""
        if len(self.heads) == 1:
            logits: Tensor = self.heads[0](features)
            return logits
        each = torch.stack([head(features).log_softmax(dim=1) for head in self.heads])
        return each.logsumexp(dim=0) - math.log(len(self.heads))

    @property
    def batch_size(self) -> int:
        """Batch size for inference, sized for a CPU's memory and used on every device."""
        return batch_size_for("cpu", self.preprocess.image_size)

    @property
    def has_dropout(self) -> bool:
        """True if any dropout layer has a rate above 0."""
        return any(module.p > 0 for module in self.modules() if isinstance(module, Dropout))

    def sample(self, pixels: Tensor, samples: int, seed: int) -> Tensor:
        """Return probabilities of repeated passes with dropout on (Gal and Ghahramani 2016).

        The backbone, which has no dropout, runs once.

        Args:
            pixels: uint8 [batch, height, width, 3], RGB.
            samples: Number of passes.
            seed: Seed of the dropout masks.

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
    """Return logits of many images, fp32 [n, classes], in batches with a progress bar.

    They equal the model's own up to rounding: the backbone runs in oneDNN's operators, which are
    faster.

    Args:
        model: The model, on the CPU.
        pixels: uint8 [n, height, width, 3], RGB.
        rows: Indices of the images to predict, in this order; None: all.
        what: Label of the progress bar.
    """
    rows = np.arange(len(pixels)) if rows is None else rows
    batch_size, preprocess = model.batch_size, model.preprocess
    backbone = in_onednn(model.backbone, preprocess.image_size, batch_size)
    done = []
    with torch.inference_mode(), progress(what, len(rows), "images") as advance:
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(pixels[rows[start : start + batch_size]])
            images = preprocess(batch).to(memory_format=torch.channels_last)
            done.append(model.classify(model.standardise(backbone(images))))
            advance(len(batch))
    return torch.cat(done)
