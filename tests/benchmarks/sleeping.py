"""A trial that sleeps and reports made-up scores, in a module that does not import torch."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune


@dataclass(frozen=True)
class SleepSettings:
    """Stand-in for `study.runs.worker.RunSettings`."""

    epochs: int
    seconds: float
    """Length of an epoch."""
    gpu_share: float = 0.0


def score_of(values: Mapping[str, Any], seed: int, epoch: int) -> float:
    """Return a noisy score between 0 and 1 that depends on the hyperparameters."""
    rate: float = math.log10(values["learning_rate"] / 4e-4)
    luck = math.sin(seed) / 50
    reached = 1 - math.exp(-epoch)
    dropout: float = values["dropout"]
    return max(0.0, 0.9 - 0.1 * rate**2 - 0.2 * (dropout - 0.3) ** 2 + luck) * reached


def sleep_and_report(
    config: dict[str, Any], settings: SleepSettings, shared: object = None
) -> None:
    """Sleep for each epoch and report like a trial of the project; `shared` is unused."""
    del shared
    begun = time.time()
    for epoch in range(1, settings.epochs + 1):
        start = time.time()
        time.sleep(settings.seconds)
        score = score_of(config["hyperparameters"], config["seed"], epoch)
        tune.report(
            {
                "epoch": epoch,
                "train_loss": 1 - score,
                "train_accuracy": score,
                "val_loss": 1 - score,
                "val_accuracy": score,
                "score": score,
                "begun": begun,
                "start": start,
                "end": time.time(),
            }
        )
