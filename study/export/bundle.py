"""The bundle: the exported model as self-contained files.

    from study.export.bundle import load
    model = load("runs/NAME/best_model")
    logits = model(torch.from_numpy(pixels))   # uint8 [n, height, width, 3], RGB

For image files see study/predict.py. model.onnx and model.pt2 in the same folder
(study/export/formats.py) are the same model for use without this project.
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

from analysis.rundir import write_atomically
from search_spaces import dropout_rates, hidden_widths
from study.errors import UserError
from study.export.model import Model, ModelParts, predict_logits
from study.features.standardise import Standardisation
from study.models.backbone import Architecture
from study.models.head import FEATURES
from study.models.preprocess import Preprocess
from study.models.state_dict import save_safetensors, strip_prefix

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


def predict_pixels(path: str | Path, pixels: np.ndarray) -> np.ndarray:
    """Load a bundle and predict images.

    Args:
        path: The best_model/ folder.
        pixels: RGB images of any size, uint8 [n, height, width, 3]; non-square images are
            stretched.

    Returns:
        Probabilities, fp32 [n, classes]; the columns are `load(path).classes`.

    Raises:
        UserError: The folder holds no bundle, or an unreadable one.
    """
    logits = predict_logits(load(path), pixels)
    return logits.softmax(dim=1).numpy()


def save(path: Path, parts: ModelParts) -> None:
    """Write the weights.

    Args:
        path: The best_model/ folder; created if missing.
        parts: The parts of the model.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"backbone.{name}": value for name, value in parts.backbone.items()},
        "feature_mean": parts.standardisation.mean,
        "feature_std": parts.standardisation.std,
    }
    for prefix, head in zip(_head_prefixes(len(parts.heads)), parts.heads, strict=True):
        tensors |= {f"{prefix}{name}": value for name, value in head.items()}
    # Hugging Face tools read the framework from this metadata.
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_safetensors(path / WEIGHTS, contiguous, {"format": "pt"})


def save_config(path: Path, parts: ModelParts, record: Mapping[str, Any]) -> None:
    """Write config.json, which describes the weights in terms of timm and Hugging Face.

    Args:
        path: The best_model/ folder.
        parts: The parts of the model.
        record: Further fields, such as the runs it comes from and its test metrics.
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
    write_atomically(path / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load(path: str | Path) -> Model:
    """Load the model of a bundle, on the CPU.

    Raises:
        UserError: The folder holds no bundle, or an unreadable one.
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
            backbone=strip_prefix(tensors, "backbone."),
            standardisation=Standardisation(tensors["feature_mean"], tensors["feature_std"]),
            heads=tuple(strip_prefix(tensors, prefix) for prefix in prefixes),
        )
        return Model(parts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        UserError: The folder holds no bundle, or an unreadable one.
    """
    try:
        found = (folder / CONFIG).is_file()
    except (OSError, ValueError):  # not a valid path, for example too long
        found = False
    if not found:
        raise UserError(f"{folder}: no {CONFIG} here; give the best_model/ folder of a study.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError(f"{CONFIG} is not in format {FORMAT}")
        return config
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder}: this bundle cannot be read ({error}); export it again"
        " (python -m study.export RUN)."
    )


def _head_prefixes(heads: int) -> Sequence[str]:
    """Return the prefix of each head's tensor names."""
    return ["head."] if heads == 1 else [f"heads.{number}." for number in range(heads)]


def _mean_and_std(preprocess: Preprocess) -> dict[str, list[float]]:
    """Return mean and standard deviation as in timm: of values from 0 to 1, in RGB order."""
    whole = 255 * preprocess.scale
    mean, std = ([value / whole for value in v] for v in (preprocess.mean, preprocess.std))
    if preprocess.channels == "BGR":
        mean, std = mean[::-1], std[::-1]
    return {"mean": mean, "std": std}
