"""The rows of a run directory: every column of its tables, with its unit and meaning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from search_spaces import Value


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one training run, a line of epochs.jsonl.

    Attributes:
        phase: Phase of the study that the run belongs to.
        run_id: Name of the run, unique in the study.
        attempt: From 1; a run that was interrupted and resumed has several.
        arm: Arm of a trial; setting of a confirmation run.
        seed: Seed of the run, from which all its random streams derive.
        epoch: From 1.
        train_loss: In evaluation mode (dropout off), over a fixed stratified subset of `train` as
            large as `val`.
        train_accuracy: Over the same images, in evaluation mode.
        val_loss: Over all of `val`.
        val_accuracy: Over all of `val`.
        score: The best value so far of the study's metric on `val`.
        rung: ASHA's decision after this epoch; empty if it made none.
        start: Start time of the epoch.
        end: End time, evaluation included.
        worker: The process that trained, as host:pid.
        val_balanced_accuracy: Mean of the per-class accuracies over all of `val`; NaN if missing.
    """

    phase: Literal["search", "confirm"]
    run_id: str
    attempt: int
    arm: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    score: float
    rung: Literal["", "continue", "stop"]
    start: float
    end: float
    worker: str
    val_balanced_accuracy: float = math.nan


@dataclass(frozen=True)
class PhaseRow:
    """One phase of one start of the study, a line of phases.jsonl.

    A phase interrupted by an error or a signal that can be handled ends there; one whose process
    is killed has no row.

    Attributes:
        start: 1 for the study's first start, 2 for the first time it was resumed or extended.
        phase: "start-up": from the start of the command until imports are done and a local Ray is
            running; "ray": joining a cluster; "data": images, weights, split; "features": computed
            or read from the cache; "hand over": passing the data to Ray, measuring the GPU;
            "search"; "confirm"; "report"; "export".
        begin: Start time.
        end: End time.
        slots: Number of concurrent runs in search and confirm; 1 elsewhere.
    """

    start: int
    phase: str
    begin: float
    end: float
    slots: int


@dataclass(frozen=True)
class TrialRow:
    """One trial of the search, a line of trials.csv.

    Attributes:
        run_id: Name of the run, as in epochs.jsonl.
        arm: Arm of the trial.
        hyperparameters: By name; a column each in the file, named as in `search_spaces`.
        seed: Seed of the run.
        state: `completed` reached the last epoch, `pruned` was stopped by ASHA, `diverged` had a
            non-finite loss, `failed` raised an exception.
        epochs: Number of epochs finished.
        best_epoch: From 1, the epoch of its score; 0 if no epoch was finished.
        score: The best value of the study's metric on `val`.
        train_loss: At the best epoch, over a subset of `train` as in `EpochRow`.
        train_accuracy: At the best epoch, over the same images.
        val_loss: At the best epoch.
        val_accuracy: At the best epoch.
        start: Start time of its last attempt.
        end: End time.
        attempts: Number of attempts.
        error: The exception of a failed or diverged trial, in one line; else empty.
        val_balanced_accuracy: At the best epoch, as in `EpochRow`.
    """

    run_id: str
    arm: str
    hyperparameters: Mapping[str, Value]
    seed: int
    state: Literal["completed", "pruned", "diverged", "failed"]
    epochs: int
    best_epoch: int
    score: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    start: float
    end: float
    attempts: int
    error: str
    val_balanced_accuracy: float = math.nan


@dataclass(frozen=True)
class ConfirmRow:
    """One confirmation run, a line of confirm.csv.

    Attributes:
        run_id: Name of the run, as in epochs.jsonl and confirm/.
        recipe: The arm whose champion the recipe comes from.
        setting: The arm whose champion the factor's value comes from, or a setting that the space
            defines.
        hyperparameters: By name; a column each in the file, named as in `search_spaces`.
        seed: Seed of the run; runs with the same recipe and seed are matched.
        best_epoch: From 1, the epoch selected by the study's metric on `val`.
        score: The metric at that epoch.
        train_accuracy: At the selected epoch, in evaluation mode over all of `train`.
        train_loss: At the selected epoch, in evaluation mode over all of `train`.
        val_accuracy: At the selected epoch.
        val_loss: At the selected epoch.
        test_accuracy: At the selected epoch.
        test_loss: At the selected epoch.
        last_train_accuracy: At the last epoch, where the article measured.
        last_train_loss: At the last epoch.
        last_val_accuracy: At the last epoch.
        last_val_loss: At the last epoch.
        last_test_accuracy: At the last epoch.
        last_test_loss: At the last epoch.
        epochs: Number of epochs of the run; always the number requested.
        seconds: Duration of the run; if it was interrupted, of its last attempt.
        train_balanced_accuracy: Mean of the per-class accuracies at the selected epoch, measured
            like `train_accuracy`; NaN if missing.
        val_balanced_accuracy: At the selected epoch.
        test_balanced_accuracy: At the selected epoch.
        last_train_balanced_accuracy: At the last epoch.
        last_val_balanced_accuracy: At the last epoch.
        last_test_balanced_accuracy: At the last epoch.
    """

    run_id: str
    recipe: str
    setting: str
    hyperparameters: Mapping[str, Value]
    seed: int
    best_epoch: int
    score: float
    train_accuracy: float
    train_loss: float
    val_accuracy: float
    val_loss: float
    test_accuracy: float
    test_loss: float
    last_train_accuracy: float
    last_train_loss: float
    last_val_accuracy: float
    last_val_loss: float
    last_test_accuracy: float
    last_test_loss: float
    epochs: int
    seconds: float
    train_balanced_accuracy: float = math.nan
    val_balanced_accuracy: float = math.nan
    test_balanced_accuracy: float = math.nan
    last_train_balanced_accuracy: float = math.nan
    last_val_balanced_accuracy: float = math.nan
    last_test_balanced_accuracy: float = math.nan
