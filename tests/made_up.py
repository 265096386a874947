"""Frames with made-up figures, for tests of what is computed from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.frames import StudyFrames

MEASURES = ("train_accuracy", "val_accuracy", "test_accuracy")


def confirmed(
    figures: Mapping[tuple[str, str], Sequence[float] | NDArray[np.float64]],
    losses: Sequence[float] = (),
    **changes: Any,
) -> StudyFrames:
    """A study that has confirmation runs only.

    Args:
        figures: By recipe and setting, the accuracy of each seed's run, on all parts of the data.
        losses: By cell, in the same order, the loss of all its runs.
        changes: Columns of the confirmation runs to set.
    """
    rows = []
    for cell, ((recipe, setting), accuracies) in enumerate(figures.items()):
        for seed, accuracy in enumerate(accuracies):
            loss = losses[cell] if losses else 1 - accuracy
            row: dict[str, Any] = {"seed": seed, "recipe": recipe, "setting": setting}
            row |= {"run_id": f"{recipe}-recipe-{setting}-{seed}", "best_epoch": 3, "epochs": 5}
            for prefix in ("", "last_"):
                row |= {f"{prefix}{measure}": accuracy for measure in MEASURES}
                row |= {f"{prefix}{m.replace('accuracy', 'loss')}": loss for m in MEASURES}
            rows.append(row)
    return frames(confirm=pd.DataFrame(rows).assign(**changes))


def searched(rows: Sequence[Mapping[str, Any]], **record: Any) -> StudyFrames:
    """A study that has trials only; what a row leaves out has a default."""
    default = {"state": "completed", "epochs": 5, "val_accuracy": 0.8, "score": 0.8}
    names = [f"trial-{number}" for number in range(len(rows))]
    trials = pd.DataFrame([{**default, **row} for row in rows]).assign(run_id=names)
    return frames(trials=trials, record=record)


def frames(
    confirm: pd.DataFrame | None = None,
    trials: pd.DataFrame | None = None,
    record: Mapping[str, Any] | None = None,
) -> StudyFrames:
    """Frames of which some are empty."""
    known = {"head", "learning_rate", "weight_decay", "batch_size", "dropout"}
    columns = trials.columns if trials is not None else ()
    return StudyFrames(
        path=Path("made-up"),
        record=dict(record or {}),
        epochs=pd.DataFrame(),
        trials=pd.DataFrame(columns=["arm", "state", "score"]) if trials is None else trials,
        confirm=pd.DataFrame() if confirm is None else confirm,
        hyperparameters=tuple(name for name in columns if name in known),
    )
