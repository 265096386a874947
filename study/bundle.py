"""The exported best model: from images to class probabilities, with nothing else needed.

from study.bundle import predict
probabilities = predict("runs/NAME/best_model", pixels)   # uint8 [n, height, width, 3], RGB
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from analysis.rundir import write_whole
from search_spaces import Value
from study.backbone import Architecture, Preprocess, build_backbone
from study.errors import UserError
from study.features import folded
from study.head import restore_head
from study.prepare import Standardisation
from study.progress import progress
from study.tensors import part_of, save_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1
BATCH = 128


@dataclass(frozen=True)
class Bundle:
    """What it takes to rebuild a model."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    architecture: Architecture
    hyperparameters: Mapping[str, Value]
    """Of the run that trained the head; the head is built from them."""
    backbone: Mapping[str, Tensor]
    """torchvision's names, without `fc.*`."""
    standardisation: Standardisation
    head: Mapping[str, Tensor]
    """As `head.build_head` names them."""


class Model(nn.Module):
    """Preprocessing, backbone, standardisation and head in one, in fp32 and evaluation mode."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.classes = bundle.classes
        self.preprocess = bundle.preprocess
        backbone = folded(build_backbone(bundle.backbone, bundle.architecture))
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.register_buffer("feature_mean", bundle.standardisation.mean)
        self.register_buffer("feature_std", bundle.standardisation.std)
        self.head = restore_head(bundle.head, bundle.hyperparameters)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits: uint8 [batch, height, width, 3], RGB -> fp32 [batch, classes]."""
        images = self.preprocess(pixels).to(memory_format=torch.channels_last)
        features = (self.backbone(images) - self.feature_mean) / self.feature_std
        logits: Tensor = self.head(features)
        return logits


def predict(path: str | Path, pixels: np.ndarray) -> np.ndarray:
    """Load a bundle and predict.

    Args:
        path: The folder best_model/.
        pixels: Images, uint8 [n, height, width, 3], RGB, of any size.

    Returns:
        Probabilities, fp32 [n, classes]; the columns are `load(path).classes`.

    Raises:
        UserError: The folder holds no bundle.
    """
    logits = compute_logits(load(path), pixels)
    return logits.softmax(dim=1).numpy()


def compute_logits(model: Model, pixels: np.ndarray) -> Tensor:
    """Logits of many images, batch by batch, with a progress bar: fp32 [n, classes]."""
    done = []
    with torch.inference_mode(), progress("Predicting", len(pixels), "images") as advance:
        for start in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH])
            done.append(model(batch))
            advance(len(batch))
    return torch.cat(done)


def save(path: Path, bundle: Bundle, record: Mapping[str, Any]) -> None:
    """Write a bundle.

    Args:
        path: The folder best_model/; made where it is not there.
        bundle: What to write.
        record: What else is worth knowing about the model; stands in config.json too.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"backbone.{name}": value for name, value in bundle.backbone.items()},
        **{f"head.{name}": value for name, value in bundle.head.items()},
        "feature_mean": bundle.standardisation.mean,
        "feature_std": bundle.standardisation.std,
    }
    save_whole(path / WEIGHTS, {name: value.contiguous() for name, value in tensors.items()})
    config = {
        "format": FORMAT,
        "model": "ResNet50 backbone, standardised features, head of Linear, ReLU and Dropout",
        "input": "uint8 [batch, height, width, 3], RGB",
        "output": "logits [batch, classes]",
        "classes": list(bundle.classes),
        "preprocess": asdict(bundle.preprocess),
        "architecture": asdict(bundle.architecture),
        "hyperparameters": dict(bundle.hyperparameters),
        **record,
    }
    # Written last: a folder with a config holds a whole bundle.
    write_whole(path / CONFIG, json.dumps(config, indent=2) + "\n")


def load(path: str | Path) -> Model:
    """The model of a bundle, on the CPU.

    Raises:
        UserError: The folder holds no bundle, or one that cannot be read.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} here; give the best_model/ folder of a study.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        bundle = Bundle(
            classes=tuple(config["classes"]),
            preprocess=Preprocess(**config["preprocess"]),
            architecture=Architecture(**config["architecture"]),
            hyperparameters=config["hyperparameters"],
            backbone=part_of(tensors, "backbone."),
            standardisation=Standardisation(tensors["feature_mean"], tensors["feature_std"]),
            head=part_of(tensors, "head."),
        )
        return Model(bundle)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: this bundle cannot be read ({error}); export anew.") from error
