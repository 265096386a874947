"""All that a study is made of before anything trains: images, split, weights, features."""

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
    """What a study is about, and what its best model is made of."""

    dataset: Dataset
    split: Split
    weights: Weights
    preprocess: Preprocess
    features: FeaturesName | None
    """None where all layers train."""
    standardisation: Standardisation | None
    """What stands between backbone and head; None where they train together."""


def load_inputs(
    study: Study,
    pinned: Mapping[str, str],
    compute: Compute | None,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[Inputs, Prepared]:
    """Data, weights and, where the backbone is frozen, features; and what runs train on.

    The two are apart, since the second is large, and is handed on to Ray.

    Args:
        study: Says which.
        pinned: Where an earlier start had its data and weights from.
        compute: How features are computed; None: in this process.
        phase: Surrounds the phases of that name.
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
    """The weights' own preprocessing or the article's, at the study's image size.

    Args:
        weights: Say what is their own.
        option: "own" or "raw", as `--preprocess` gives it.
        image_size: Side in pixels.
    """
    own = weights.preprocess if option == "own" else PREPROCESSES["raw"]
    return replace(own, image_size=image_size)


def warn_about_images(data: Mapping[str, Any], metric: Metric) -> list[str]:
    """Return what to know of the images before anything is trained.

    Args:
        data: As study.json describes them.
        metric: The study's.
    """
    warnings = []
    in_train = dict(zip(data["classes"], data["images_per_class"]["train"], strict=True))
    rarest, commonest = (f(in_train, key=lambda name: in_train[name]) for f in (min, max))
    ratio = in_train[commonest] / in_train[rarest]
    if ratio >= IMBALANCE and metric != "val_balanced_accuracy":
        warnings.append(
            f"Classes are uneven: {in_train[commonest]} training images of {commonest},"
            f" {in_train[rarest]} of {rarest}. Accuracy is mostly about the frequent ones;"
            " --metric val_balanced_accuracy counts all classes alike."
        )
    if alike := data.get("duplicates"):
        first = alike[0]
        warnings.append(
            f"{len(alike)} image{'s' * (len(alike) > 1)} of val or test"
            f" look{'s' * (len(alike) == 1)} like one of another part, such as {first['file']} and"
            f" {first['like']}: a model may know them by heart. The report lists them."
        )
    return warnings
