"""The rows of a run directory: every column of its tables, with unit and meaning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from search_spaces import Value


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one training run, a line of epochs.jsonl.

    Attributes:
        phase: To which phase of the study the run belongs.
        run_id: Name of the run, unique in the study.
        attempt: From 1; a run that was interrupted and taken up again has several.
        arm: The arm of a trial; of a confirmation run, the arm that its recipe comes from.
        seed: Of the run; all its random streams derive from it.
        epoch: From 1.
        train_loss: In evaluation mode (dropout off), over a fixed stratified part of `train` as
            large as `val`.
        train_accuracy: Over the same images, in the same way.
        val_loss: Over all of `val`.
        val_accuracy: Over all of `val`.
        score: The best value so far of the study's metric on `val`.
        rung: ASHA's decision after this epoch; empty where it made none.
        start: When the epoch began.
        end: When it ended, evaluation included.
        worker: The process that trained, as host:pid.
        val_balanced_accuracy: Over all of `val`, the mean over the classes of their accuracies;
            NaN where an earlier version of this project wrote the row.
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
    """When a phase of one start of the study began and ended, a line of phases.jsonl.

    A phase that is interrupted by an error or a signal that can be heard ends there; one whose
    process is killed has no row.

    Attributes:
        start: 1 for the study's first start, 2 for the first time it was resumed or extended.
        phase: "start-up" from the command's first line, until all is imported and this machine's
            own Ray is there; "ray": joining a cluster's; "data": images, weights, split;
            "features": computed, or read from the cache; "hand over": the data given to Ray, the
            GPU measured; "search"; "confirm"; "report"; "export".
        begin: When it began.
        end: When it ended.
        slots: Runs at once in search and confirm; 1 elsewhere.
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
        arm: The arm that it belongs to.
        hyperparameters: By name; in the file a column each, named as in `search_spaces`.
        seed: Of the run.
        state: `completed` reached the last epoch, `pruned` was stopped by ASHA, `diverged` met a
            loss that is not finite, `failed` raised an exception.
        epochs: How many it finished.
        best_epoch: From 1, the epoch of its score; 0 where none was finished.
        score: The best value of the study's metric on `val`.
        train_loss: At the best epoch, over a part of `train` as in `EpochRow`.
        train_accuracy: At the best epoch, over the same images.
        val_loss: At the best epoch.
        val_accuracy: At the best epoch.
        start: When its last attempt began.
        end: When it ended.
        attempts: How often it was started.
        error: The exception of a failed or diverged trial, one line; else empty.
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
        setting: The arm whose champion the factor's value comes from, or the space's setting.
        hyperparameters: By name; in the file a column each, named as in `search_spaces`.
        seed: Of the run; runs of one recipe and one seed are matched.
        best_epoch: From 1, the epoch selected by the study's metric on `val`.
        score: The metric at that epoch.
        train_accuracy: At the selected epoch, in evaluation mode over all of `train`.
        train_loss: Likewise.
        val_accuracy: At the selected epoch.
        val_loss: At the selected epoch.
        test_accuracy: At the selected epoch.
        test_loss: At the selected epoch.
        last_train_accuracy: The same six at the last epoch, as the article measured.
        last_train_loss: See there.
        last_val_accuracy: See there.
        last_val_loss: See there.
        last_test_accuracy: See there.
        last_test_loss: See there.
        epochs: Of the run, all that were asked for.
        seconds: Duration of the run; of one that was interrupted, of its last attempt.
        train_balanced_accuracy: Mean over the classes of their accuracies, at the selected epoch,
            measured as the others are; NaN where an earlier version of this project wrote the row.
        val_balanced_accuracy: Likewise.
        test_balanced_accuracy: Likewise.
        last_train_balanced_accuracy: The same three at the last epoch.
        last_val_balanced_accuracy: See there.
        last_test_balanced_accuracy: See there.
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
