"""Everything a study needs before training: images, split, weights and features."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from analysis.report.health import IMBALANCE
from analysis.rundir.metric import Metric
from study.data.dataset import Dataset
from study.data.load import load_dataset
from study.data.split import Split, make_split
from study.features.extract import Compute, FeaturesName, load_features
from study.features.standardise import Standardisation
from study.models.network import Pretrained
from study.models.preprocess import PREPROCESSES, Preprocess
from study.models.weights import Weights, load_weights
from study.study import Study
from study.training.prepare import Prepared, prepare_features, prepare_images


@dataclass(frozen=True)
class Inputs:
    """Inputs of a study and its exported model."""

    dataset: Dataset
    split: Split
    weights: Weights
    preprocess: Preprocess
    features: FeaturesName | None
    """None if all layers train."""
    standardisation: Standardisation | None
    """Applied between backbone and head; None if they train together."""


def load_inputs(
    study: Study,
    pinned: Mapping[str, str],
    compute: Compute | None,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[Inputs, Prepared]:
    """Load data, weights and, if the backbone is frozen, features; prepare what runs train on.

    The training data is returned separately because it is large and goes to Ray.

    Args:
        study: The study.
        pinned: Sources of data and weights that an earlier start used.
        compute: How features are computed; None: in this process.
        phase: Context manager entered for each phase, by name.
    """
    config = study.config
    with phase("data"):
        dataset = load_dataset(
            config.data,
            config.images,
            pinned.get("data"),
            image_size=study.image_size,
            test_fraction=config.test_fraction,
        )
        split = make_split(dataset, config.val_fraction)
        weights = load_weights(study.weights, pinned.get("weights"))
        preprocess = choose_preprocess(weights, config.preprocess, study.image_size)
        if study.finetunes:
            pretrained = Pretrained(weights.state, weights.architecture, preprocess)
            prepared = prepare_images(dataset, split, pretrained, study.augment)
            return Inputs(dataset, split, weights, preprocess, None, None), prepared
    with phase("features"):
        features = load_features(dataset, weights, preprocess, compute=compute)
        prepared, standardisation = prepare_features(dataset, split, features)
    return Inputs(dataset, split, weights, preprocess, features.name, standardisation), prepared


def choose_preprocess(weights: Weights, option: str | None, image_size: int) -> Preprocess:
    """Return the weights' own preprocessing or the article's, at the study's image size.

    Args:
        weights: Provide the "own" preprocessing.
        option: Value of `--preprocess`, "own" or "raw".
        image_size: Side in pixels.
    """
    own = weights.preprocess if option == "own" else PREPROCESSES["raw"]
    return replace(own, image_size=image_size)


def image_warnings(data: Mapping[str, Any], metric: Metric) -> list[str]:
    """Return warnings about class imbalance and duplicate images.

    Args:
        data: The images as described in study.json.
        metric: The study's metric.
    """
    warnings = []
    in_train = dict(zip(data["classes"], data["images_per_class"]["train"], strict=True))
    rarest, commonest = (f(in_train, key=lambda name: in_train[name]) for f in (min, max))
    ratio = in_train[commonest] / in_train[rarest]
    if ratio >= IMBALANCE and metric != "val_balanced_accuracy":
        warnings.append(
            f"Classes are imbalanced: {in_train[commonest]} training images of {commonest},"
            f" {in_train[rarest]} of {rarest}. Frequent classes dominate accuracy;"
            " --metric val_balanced_accuracy weights all classes equally."
        )
    if duplicates := data.get("duplicates"):
        first = duplicates[0]
        warnings.append(
            f"{len(duplicates)} image{'s' * (len(duplicates) > 1)} of val or test"
            f" look{'s' * (len(duplicates) == 1)} like one of another split, such as"
            f" {first['file']} and {first['like']}: a model may have memorised them. The report"
            " lists them."
        )
    return warnings
