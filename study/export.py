"""The last phase: choose the best model on val alone, write it, and measure it from the images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from analysis.rundir import ConfirmRow
from search_spaces import Value
from study import bundle
from study.backbone import Preprocess
from study.bundle import Bundle
from study.champions import Champion
from study.config import Study
from study.confirm import best_of
from study.dataset import Dataset, Split
from study.errors import UserError
from study.prepare import Standardisation, no_standardisation
from study.tensors import part_of
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
    """What the confirmation run measured, in bf16 where the device has it; None without
    confirmation."""


@dataclass(frozen=True)
class Chosen:
    """The run whose model is exported."""

    run_id: str
    hyperparameters: dict[str, Value]
    score: float
    trained: dict[str, Tensor]
    """Its weights: the head's, or the whole network's."""
    row: ConfirmRow | None


def export(
    study: Study,
    champions: tuple[Champion, ...],
    dataset: Dataset,
    split: Split,
    weights: Weights,
    preprocess: Preprocess,
    standardisation: Standardisation | None,
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
        backbone=_backbone(chosen.trained) or weights.state,
        standardisation=standardisation or no_standardisation(),
        head=part_of(chosen.trained, "head.") or chosen.trained,
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
            "accuracy_when_confirmed": recorded,
        }
    }
    bundle.save(path, content, {**described, **measured})
    return Exported(
        chosen.run_id, chosen.hyperparameters, chosen.score, test_loss, test_accuracy, recorded
    )


def choose(study: Study, champions: tuple[Champion, ...]) -> Chosen:
    """The confirmation run with the best score on val; without any, the best champion."""
    rundir, metric = study.rundir, study.config.metric
    if rows := rundir.read_confirm():
        row = best_of(rows, metric)
        return Chosen(
            row.run_id, dict(row.hyperparameters), row.score, _weights(study, row.run_id), row
        )
    best: Champion | None = None
    for champion in champions:
        if champion.run_id and (best is None or is_better(champion.score, best.score, metric)):
            best = champion
    assert best is not None, "a study without confirmation runs has trials"
    run_id = str(best.run_id)
    return Chosen(run_id, dict(best.hyperparameters), best.score, _weights(study, run_id), None)


def _weights(study: Study, run_id: str) -> dict[str, Tensor]:
    file = study.rundir.weights(run_id)
    study.rundir.fetch(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}, the weights of the best run, cannot be read ({error}); bring the file back."
        ) from error


def _backbone(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a network under torchvision's names; nothing where a head alone trained."""
    backbone = part_of(trained, "backbone.")
    return {k: value for k, value in backbone.items() if not k.endswith("num_batches_tracked")}
