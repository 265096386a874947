"""README.md of the exported model: a model card in Hugging Face's format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from scipy import stats
from torch import Tensor

from analysis.rundir import write_atomically
from analysis.rundir.predictions import Predictions
from analysis.stats.calibration import bin_predictions
from search_spaces import PARAMETERS
from study.export.select import Selection
from study.export.verify import Agreement
from study.inputs import Inputs
from study.study import Study
from study.training.evaluate import balanced_accuracy, loss_and_accuracy

CARD = "README.md"
TEMPLATE = "model_card.md.j2"
#: With more classes than this, the card lists only the hardest ones.
CLASSES_SHOWN = 30

#: Licence by the name of the weights: Hugging Face's identifier, and a sentence for the card.
LICENCES: Mapping[str, tuple[str, str]] = {
    "imagenet-v1": (
        "bsd-3-clause",
        "The backbone's weights are torchvision's (BSD 3-Clause), trained on ImageNet.",
    ),
    "imagenet-v2": (
        "bsd-3-clause",
        "The backbone's weights are torchvision's (BSD 3-Clause), trained on ImageNet.",
    ),
    "keras": (
        "mit",
        "The backbone's weights are those of keras.applications, ported there from Kaiming He's"
        " (MIT), trained on ImageNet.",
    ),
    "path": ("unknown", "The backbone's weights came from a file of unknown licence."),
}

#: The same weights on Hugging Face, by the name of the weights.
BASE_MODELS = {"imagenet-v1": "timm/resnet50.tv_in1k", "imagenet-v2": "timm/resnet50.tv2_in1k"}


@dataclass(frozen=True)
class ExportMetrics:
    """Metrics of an exported model on the test images, in fp32."""

    images: int
    loss: float
    """Mean cross-entropy in nats per image."""
    accuracy: float
    """Fraction."""
    accuracy_interval: tuple[float, float]
    """95 % confidence interval for other images like these (Wilson)."""
    balanced_accuracy: float
    """Mean of the class accuracies, a fraction."""
    calibration_error: float
    """Expected calibration error in percentage points (Guo et al. 2017, 15 bins)."""
    mean_confidence: float
    """Mean probability of the predicted class, a fraction."""
    class_accuracy: tuple[float | None, ...]
    """Accuracy of each class, a fraction; None without test images."""


def compute_export_metrics(logits: Tensor, labels: Tensor) -> ExportMetrics:
    """Return the metrics of logits [n, classes] given labels [n]."""
    loss, accuracy = loss_and_accuracy(logits, labels)
    right = round(accuracy * len(labels))
    interval = stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
    predictions = Predictions(logits.numpy(), labels.numpy())
    hits = predictions.guesses == predictions.labels
    by_class = [hits[predictions.labels == number] for number in range(logits.shape[1])]
    return ExportMetrics(
        images=len(labels),
        loss=loss,
        accuracy=accuracy,
        accuracy_interval=(float(interval.low), float(interval.high)),
        balanced_accuracy=balanced_accuracy(logits, labels),
        calibration_error=bin_predictions(predictions).ece,
        mean_confidence=float(predictions.probabilities.max(axis=1).mean()),
        class_accuracy=tuple(float(of.mean()) if len(of) else None for of in by_class),
    )


def write_card(
    folder: Path,
    study: Study,
    selection: Selection,
    inputs: Inputs,
    measured: ExportMetrics,
    agreements: Mapping[str, Agreement],
    verdict: Sequence[str],
) -> None:
    """Write the card.

    Args:
        folder: The bundle's folder.
        study: The study that trained the model.
        selection: The exported runs.
        inputs: The study's inputs.
        measured: Metrics on the test images.
        agreements: Agreement of the other formats with the model, by file name.
        verdict: The study's verdict, one sentence per item.
    """
    names, dataset, split = inputs.dataset.classes, inputs.dataset, inputs.split
    in_train = np.bincount(dataset.labels[split.train], minlength=len(names))
    classes = [
        (name, accuracy, int(count))
        for name, accuracy, count in zip(names, measured.class_accuracy, in_train, strict=True)
    ]
    hardest = sorted(classes, key=lambda row: 1.0 if row[1] is None else row[1])
    content = load_template().render(
        metadata=yaml.safe_dump(
            _metadata(str(study.config.name), inputs, measured), sort_keys=False, allow_unicode=True
        ),
        study=study,
        selection=selection,
        dataset=dataset,
        data_name=_data_name(inputs),
        sizes={"train": len(split.train), "val": len(split.val), "test": len(split.test)},
        weights=inputs.weights,
        preprocess=inputs.preprocess,
        measured=measured,
        agreements=agreements,
        verdict=verdict,
        hyperparameters=_described(selection.hyperparameters),
        classes=classes if len(classes) <= CLASSES_SHOWN else hardest[:CLASSES_SHOWN],
        all_classes=len(classes) <= CLASSES_SHOWN,
        licence=LICENCES[inputs.weights.name][1],
        square=dataset.side,
    )
    write_atomically(folder / CARD, content)


def load_template() -> Template:
    """Return the card's template, a file of this package."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 - Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"percent": _percent, "cell": _cell}
    return templates.get_template(TEMPLATE)


def _metadata(name: str, inputs: Inputs, measured: ExportMetrics) -> dict[str, Any]:
    """Return the card's YAML header, in Hugging Face's fields."""
    weights, dataset = inputs.weights, inputs.dataset
    data: dict[str, Any] = {"name": dataset.name, "type": dataset.name, "split": "test"}
    found = {
        "accuracy": (measured.accuracy, "Test accuracy"),
        "balanced_accuracy": (measured.balanced_accuracy, "Balanced test accuracy"),
        "loss": (measured.loss, "Test loss (nats per image)"),
        "ece": (measured.calibration_error / 100, "Expected calibration error"),
    }
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": data,
        "metrics": [
            {"type": kind, "value": round(value, 6), "name": title}
            for kind, (value, title) in found.items()
        ],
    }
    metadata: dict[str, Any] = {
        "license": LICENCES[weights.name][0],
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet50", "transfer-learning", "onnx", "dropout-study"],
        "metrics": ["accuracy"],
        "model-index": [{"name": name, "results": [result]}],
    }
    if dataset.name == "cifar10" and not dataset.files:
        metadata["datasets"] = ["uoft-cs/cifar10"]
    if weights.name in BASE_MODELS:
        metadata["base_model"] = BASE_MODELS[weights.name]
    return metadata


def _data_name(inputs: Inputs) -> str:
    """Return the name of the data; the path of a folder stays private."""
    dataset = inputs.dataset
    return f"a folder of images ({dataset.name})" if dataset.files else dataset.source


def _described(hyperparameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    in_order = sorted(hyperparameters, key=list(PARAMETERS).index)
    return [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name in in_order
        for value in [hyperparameters[name]]
    ]


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f} %"


def _cell(text: object) -> str:
    """Escape text for a Markdown table."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
