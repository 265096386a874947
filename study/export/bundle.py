"""The bundle: the exported model as files, with nothing else needed.

    from study.export.bundle import load
    model = load("runs/NAME/best_model")
    logits = model(torch.from_numpy(pixels))   # uint8 [n, height, width, 3], RGB

For image files see study/predict.py. model.onnx and model.pt2 beside it (study/export/formats.py)
are the same model for programs that have nothing of this project.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from analysis.rundir import write_whole
from search_spaces import dropout_rates, hidden_widths
from study.errors import UserError
from study.export.model import Model, ModelParts, predict_logits
from study.features.standardise import Standardisation
from study.models.backbone import Architecture
from study.models.head import FEATURES
from study.models.preprocess import Preprocess
from study.models.state_dict import part_of, save_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


def predict_pixels(path: str | Path, pixels: np.ndarray) -> np.ndarray:
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
    logits = predict_logits(load(path), pixels)
    return logits.softmax(dim=1).numpy()


def save(path: Path, parts: ModelParts) -> None:
    """Write the weights.

    Args:
        path: The folder best_model/; made where it is not there.
        parts: What to write.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"backbone.{name}": value for name, value in parts.backbone.items()},
        "feature_mean": parts.standardisation.mean,
        "feature_std": parts.standardisation.std,
    }
    for prefix, head in zip(_head_prefixes(len(parts.heads)), parts.heads, strict=True):
        tensors |= {f"{prefix}{name}": value for name, value in head.items()}
    # Hugging Face's tools want to be told whose tensors these are.
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_whole(path / WEIGHTS, contiguous, {"format": "pt"})


def save_config(path: Path, parts: ModelParts, record: Mapping[str, Any]) -> None:
    """Write config.json: what the weights are, in the words of timm and Hugging Face.

    Args:
        path: The folder best_model/.
        parts: What stands there.
        record: What else is worth knowing about the model.
    """
    size = parts.preprocess.image_size
    config = {
        "format": FORMAT,
        "architecture": "resnet50",
        "num_classes": len(parts.classes),
        "num_features": FEATURES,
        "label_names": list(parts.classes),
        "id2label": {str(number): name for number, name in enumerate(parts.classes)},
        "label2id": {name: number for number, name in enumerate(parts.classes)},
        "input": "uint8 [batch, height, width, 3], RGB",
        "output": "logits [batch, classes]",
        "image_files": {
            "mode": "RGB",
            "crop": "the central square",
            "size": parts.side,
            "interpolation": "bilinear, antialiased",
        },
        "preprocess": asdict(parts.preprocess),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            **_mean_and_std(parts.preprocess),
            "channels": parts.preprocess.channels,
            "num_classes": len(parts.classes),
            "pool_size": [math.ceil(size / 32)] * 2,
            "first_conv": "backbone.conv1",
            "classifier": "head",
        },
        "backbone": asdict(parts.architecture),
        "head": {
            "hidden_widths": list(hidden_widths(parts.hyperparameters)),
            "dropout": list(dropout_rates(parts.hyperparameters)),
            "ensemble": len(parts.heads),
        },
        "hyperparameters": dict(parts.hyperparameters),
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
        parts = ModelParts(
            classes=tuple(config["label_names"]),
            preprocess=Preprocess(**config["preprocess"]),
            side=config["image_files"]["size"],
            architecture=Architecture(**config["backbone"]),
            hyperparameters=config["hyperparameters"],
            backbone=part_of(tensors, "backbone."),
            standardisation=Standardisation(tensors["feature_mean"], tensors["feature_std"]),
            heads=tuple(part_of(tensors, prefix) for prefix in prefixes),
        )
        return Model(parts)
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
