"""What runs in Ray's worker processes: one search trial, or one confirmation run."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from safetensors.torch import save_file

from search_spaces import Value
from study.arrays import PartArrays, TrainingArrays
from study.config import Metric
from study.head import restore_head
from study.training import (
    EpochMetrics,
    Part,
    Snapshot,
    TrainingData,
    loss_and_accuracy,
    predict,
    train,
)

#: The file in a trial's checkpoint: the weights of its best epoch.
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a study have in common."""

    epochs: int
    metric: Metric
    threads: int
    """CPU threads of one run."""


@dataclass(frozen=True)
class Measured:
    """Loss (nats) and accuracy (fraction) of a head on each part, in evaluation mode."""

    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Confirmation:
    """What a confirmation run brings home."""

    epochs: tuple[EpochMetrics, ...]
    best: Snapshot
    selected: Measured
    """At the best epoch, on the whole of train, val and test."""
    last: Measured
    """The same at the last epoch."""
    val_logits: np.ndarray
    """float16 [n, classes], at the best epoch."""
    test_logits: np.ndarray
    val_labels: np.ndarray
    test_labels: np.ndarray
    seconds: float
    worker: str


def run_trial(
    config: dict[str, Any],
    shared: "list[ray.ObjectRef[TrainingArrays]]",
    settings: RunSettings,
) -> None:
    """Train one search trial, reporting to Ray Tune after each epoch.

    The weights of the best epoch travel with the last epoch's report: only a trial that reaches
    it can become a champion.

    Args:
        config: What `ArmSearch.suggest` made, and the trial's seed.
        shared: The data's one reference in Ray's object store.
        settings: Of the study.
    """
    device = _set_up(settings)

    def report(metrics: EpochMetrics, best: Snapshot) -> None:
        if metrics.epoch < settings.epochs:
            tune.report(asdict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            save_file(best.weights, Path(folder) / HEAD_FILE)
            tune.report(asdict(metrics), checkpoint=tune.Checkpoint.from_directory(folder))

    train(
        config["hyperparameters"],
        ray.get(shared[0]).to(device),
        seed=config["seed"],
        epochs=settings.epochs,
        metric=settings.metric,
        report=report,
    )


def run_confirmation(
    hyperparameters: Mapping[str, Value],
    seed: int,
    training: TrainingArrays,
    test: PartArrays,
    settings: RunSettings,
) -> Confirmation:
    """Train one confirmation run in full, then measure it on every part, test among them."""
    start = time.monotonic()
    device = _set_up(settings)
    data, test_part = training.to(device), test.to(device)
    run = train(hyperparameters, data, seed=seed, epochs=settings.epochs, metric=settings.metric)
    selected, val_logits, test_logits = _measure(run.best, hyperparameters, data, test_part)
    last, _, _ = _measure(run.last, hyperparameters, data, test_part)
    return Confirmation(
        epochs=run.epochs,
        best=run.best,
        selected=selected,
        last=last,
        val_logits=val_logits,
        test_logits=test_logits,
        val_labels=training.val.labels,
        test_labels=test.labels,
        seconds=time.monotonic() - start,
        worker=worker_name(ray.util.get_node_ip_address(), os.getpid()),
    )


def worker_name(node: str, pid: int) -> str:
    """A worker process as epochs.jsonl names it."""
    return f"{node}:{pid}"


def _measure(
    snapshot: Snapshot, hyperparameters: Mapping[str, Value], data: TrainingData, test: Part
) -> tuple[Measured, np.ndarray, np.ndarray]:
    head = restore_head(snapshot.weights, hyperparameters).to(test.inputs.device)
    logits = [predict(head, part.inputs) for part in (data.train, data.val, test)]
    (train_loss, train_accuracy), (val_loss, val_accuracy), (test_loss, test_accuracy) = (
        loss_and_accuracy(values, part.labels)
        for values, part in zip(logits, (data.train, data.val, test), strict=True)
    )
    measured = Measured(
        train_loss, train_accuracy, val_loss, val_accuracy, test_loss, test_accuracy
    )
    val_logits, test_logits = (values.half().cpu().numpy() for values in logits[1:])
    return measured, val_logits, test_logits


def _set_up(settings: RunSettings) -> torch.device:
    torch.set_num_threads(settings.threads)
    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")
