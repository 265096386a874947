"""The last phase: choose the best model on val alone, write it, and measure it from the images."""

from dataclasses import dataclass

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from analysis.rundir import ConfirmRow
from search_spaces import Value
from study import bundle
from study.backbone import Preprocess
from study.bundle import Bundle
from study.champions import Champion
from study.config import Study
from study.data import Dataset, Split
from study.prepare import Standardisation
from study.search import find_head
from study.training import is_better, loss_and_accuracy
from study.weights import Weights


@dataclass(frozen=True)
class Exported:
    """What was exported, and how good it is."""

    run_id: str
    hyperparameters: dict[str, Value]
    score: float
    test_loss: float
    """From the test images, in fp32 throughout."""
    test_accuracy: float
    recorded_test_accuracy: float | None
    """What the confirmation run measured on the cached features; None without confirmation."""


@dataclass(frozen=True)
class Chosen:
    """The run whose head is exported."""

    run_id: str
    hyperparameters: dict[str, Value]
    score: float
    head: dict[str, Tensor]
    row: ConfirmRow | None


def export(
    study: Study,
    champions: tuple[Champion, ...],
    dataset: Dataset,
    split: Split,
    weights: Weights,
    preprocess: Preprocess,
    standardisation: Standardisation,
) -> Exported:
    """Write best_model/ and evaluate it as it will be used: loaded from its files, from images.

    Returns:
        What was exported; the same stands in best_model/config.json.
    """
    chosen = choose(study, champions)
    described = {
        "run_id": chosen.run_id,
        "chosen_by": f"{study.config.metric} on val",
        study.config.metric: chosen.score,
        "data": {"source": dataset.source, "sha256": dataset.sha256},
        "weights": {"source": weights.source, "sha256": weights.sha256},
    }
    content = Bundle(
        classes=dataset.classes,
        preprocess=preprocess,
        architecture=weights.architecture,
        hyperparameters=chosen.hyperparameters,
        backbone=weights.state,
        standardisation=standardisation,
        head=chosen.head,
    )
    path = study.rundir.best_model
    bundle.save(path, content, described)
    logits = bundle.compute_logits(bundle.load(path), dataset.pixels[split.test])
    labels = torch.from_numpy(np.asarray(dataset.labels[split.test]))
    test_loss, test_accuracy = loss_and_accuracy(logits, labels)
    recorded = chosen.row.test_accuracy if chosen.row else None
    measured = {
        "test": {
            "images": len(labels),
            "loss": test_loss,
            "accuracy": test_accuracy,
            "how": "from the images, in fp32",
            "accuracy_on_cached_features": recorded,
        }
    }
    bundle.save(path, content, {**described, **measured})
    return Exported(
        chosen.run_id, chosen.hyperparameters, chosen.score, test_loss, test_accuracy, recorded
    )


def choose(study: Study, champions: tuple[Champion, ...]) -> Chosen:
    """The confirmation run with the best score on val; without any, the best champion."""
    weights = study.rundir.best_head
    if weights.exists():
        with safe_open(weights, "pt") as file:
            run_id = file.metadata()["run_id"]
        row = next(row for row in study.rundir.read_confirm() if row.run_id == run_id)
        return Chosen(run_id, dict(row.hyperparameters), row.score, load_file(weights), row)
    trials = [champion for champion in champions if champion.run_id is not None]
    best = trials[0]
    for champion in trials[1:]:
        if is_better(champion.score, best.score, study.config.metric):
            best = champion
    head = load_file(find_head(study, str(best.run_id)))
    return Chosen(str(best.run_id), dict(best.hyperparameters), best.score, head, None)
