"""The exported model: from images to class probabilities, with nothing else needed.

    from study.bundle import load
    model = load("runs/NAME/best_model")
    logits = model(torch.from_numpy(pixels))   # uint8 [n, height, width, 3], RGB

For image files see study/predict.py. model.onnx and model.pt2 beside it (study/portable.py) are the
same model for programs that have nothing of this project.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from analysis.rundir import write_whole
from search_spaces import Value, dropout_rates, hidden_widths
from study.errors import UserError
from study.features.extract import folded, images_at_once
from study.features.onednn_engine import in_onednn
from study.features.standardise import Standardisation
from study.models.backbone import Architecture, build_backbone
from study.models.head import FEATURES, Dropout, restore_head
from study.models.preprocess import Preprocess
from study.models.state_dict import part_of, save_whole
from study.system.progress import progress

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


@dataclass(frozen=True)
class Bundle:
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

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.classes = bundle.classes
        self.preprocess = bundle.preprocess
        self.side = bundle.side
        backbone = folded(build_backbone(bundle.backbone, bundle.architecture))
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.register_buffer("feature_mean", bundle.standardisation.mean)
        self.register_buffer("feature_std", bundle.standardisation.std)
        self.heads = nn.ModuleList(
            restore_head(head, bundle.hyperparameters) for head in bundle.heads
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


def predict(path: str | Path, pixels: np.ndarray) -> np.ndarray:
    """Load a bundle and predict.

    Args:
        path: The folder best_model/.
        pixels: Images, uint8 [n, height, width, 3], RGB, of any size; what is not square is
            stretched.

    Returns:
        Probabilities, fp32 [n, classes]; the columns are `load(path).classes`.

    Raises:
        UserError: The folder holds no bundle.
    """
    logits = compute_logits(load(path), pixels)
    return logits.softmax(dim=1).numpy()


def compute_logits(
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


def save(path: Path, bundle: Bundle) -> None:
    """Write the weights.

    Args:
        path: The folder best_model/; made where it is not there.
        bundle: What to write.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"backbone.{name}": value for name, value in bundle.backbone.items()},
        "feature_mean": bundle.standardisation.mean,
        "feature_std": bundle.standardisation.std,
    }
    for prefix, head in zip(_head_prefixes(len(bundle.heads)), bundle.heads, strict=True):
        tensors |= {f"{prefix}{name}": value for name, value in head.items()}
    # Hugging Face's tools want to be told whose tensors these are.
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_whole(path / WEIGHTS, contiguous, {"format": "pt"})


def save_config(path: Path, bundle: Bundle, record: Mapping[str, Any]) -> None:
    """Write config.json: what the weights are, in the words of timm and Hugging Face.

    Args:
        path: The folder best_model/.
        bundle: What stands there.
        record: What else is worth knowing about the model.
    """
    size = bundle.preprocess.image_size
    config = {
        "format": FORMAT,
        "architecture": "resnet50",
        "num_classes": len(bundle.classes),
        "num_features": FEATURES,
        "label_names": list(bundle.classes),
        "id2label": {str(number): name for number, name in enumerate(bundle.classes)},
        "label2id": {name: number for number, name in enumerate(bundle.classes)},
        "input": "uint8 [batch, height, width, 3], RGB",
        "output": "logits [batch, classes]",
        "image_files": {
            "mode": "RGB",
            "crop": "the central square",
            "size": bundle.side,
            "interpolation": "bilinear, antialiased",
        },
        "preprocess": asdict(bundle.preprocess),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            **_mean_and_std(bundle.preprocess),
            "channels": bundle.preprocess.channels,
            "num_classes": len(bundle.classes),
            "pool_size": [math.ceil(size / 32)] * 2,
            "first_conv": "backbone.conv1",
            "classifier": "head",
        },
        "backbone": asdict(bundle.architecture),
        "head": {
            "hidden_widths": list(hidden_widths(bundle.hyperparameters)),
            "dropout": list(dropout_rates(bundle.hyperparameters)),
            "ensemble": len(bundle.heads),
        },
        "hyperparameters": dict(bundle.hyperparameters),
        **record,
    }
    write_whole(path / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load(path: str | Path) -> Model:
    """The model of a bundle, on the CPU.

    Raises:
        UserError: The folder holds no bundle, or one that cannot be read.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        prefixes = _head_prefixes(config["head"]["ensemble"])
        bundle = Bundle(
            classes=tuple(config["label_names"]),
            preprocess=Preprocess(**config["preprocess"]),
            side=config["image_files"]["size"],
            architecture=Architecture(**config["backbone"]),
            hyperparameters=config["hyperparameters"],
            backbone=part_of(tensors, "backbone."),
            standardisation=Standardisation(tensors["feature_mean"], tensors["feature_std"]),
            heads=tuple(part_of(tensors, prefix) for prefix in prefixes),
        )
        return Model(bundle)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: this bundle cannot be read ({error}); export anew.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: The folder holds no bundle, or one that cannot be read.
    """
    try:
        found = (folder / CONFIG).is_file()
    except (OSError, ValueError):  # what cannot be a path is none
        found = False
    if not found:
        raise UserError(f"{folder}: no {CONFIG} here; give the best_model/ folder of a study.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError(f"{CONFIG} has another format than {FORMAT}")
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: this bundle cannot be read ({error}); export anew.") from error


def _head_prefixes(heads: int) -> Sequence[str]:
    """What the names of the heads' tensors begin with."""
    return ["head."] if heads == 1 else [f"heads.{number}." for number in range(heads)]


def _mean_and_std(preprocess: Preprocess) -> dict[str, list[float]]:
    """Of values from 0 to 1 in the order R, G, B, as timm has them."""
    whole = 255 * preprocess.scale
    mean, std = ([value / whole for value in v] for v in (preprocess.mean, preprocess.std))
    if preprocess.channels == "BGR":
        mean, std = mean[::-1], std[::-1]
    return {"mean": mean, "std": std}
