"""Study frames with made-up numbers, for tests of what is computed from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.frames import StudyFrames

TRIAL_COLUMNS = ["arm", "state", "score", "train_accuracy", "val_accuracy"]
MEASURES = ("train_accuracy", "val_accuracy", "test_accuracy")


def confirmed(
    figures: Mapping[tuple[str, str], Sequence[float] | NDArray[np.float64]],
    losses: Sequence[float] = (),
    **changes: Any,
) -> StudyFrames:
    """Return a study with confirmation runs only.

    Args:
        figures: By recipe and setting, the accuracy of each seed's run on train, val and test.
        losses: Loss of all runs of each cell, in the order of `figures`; default 1 - accuracy.
        changes: Columns of the confirmation runs to overwrite.
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


def article_arms(
    dropout: float, warm_up: float, seeds: int = 8, last: tuple[float, float] | None = None
) -> StudyFrames:
    """Return the three arms of the space `article`, confirmed with the first arm's recipe.

    Args:
        dropout: Mean gain in accuracy from dropout.
        warm_up: Mean gain in accuracy from 15 epochs with an earlier head.
        seeds: Number of seeds.
        last: The same two gains at the last epoch; default: (dropout, warm_up).
    """
    added = {"without": 0.0, "with": dropout, "as-printed": warm_up}
    at_last = {"without": 0.0, "with": (last or (dropout, 0))[0]}
    at_last["as-printed"] = last[1] if last else warm_up
    base = 0.78 + np.resize([0.0, 0.002, -0.001, 0.001, -0.002, 0.003, 0.001, -0.001], seeds)
    wobble = np.resize([0.001, -0.0015, 0.0005, 0.002, -0.001, 0.0, -0.002, 0.0015], seeds)
    wobbles = {"without": 0 * wobble, "with": wobble, "as-printed": wobble[::-1]}
    made = confirmed(
        {("without", name): base + wobbles[name] + gain for name, gain in added.items()}
    )
    setting = made.confirm["setting"]
    later = setting.map(at_last) - setting.map(added)
    confirm = made.confirm.assign(
        last_test_accuracy=made.confirm["test_accuracy"] + later,
        dropout=setting.map({"without": 0.0, "with": 0.3, "as-printed": 0.0}),
        backbone_warmup_epochs=setting.map({"without": 0, "with": 0, "as-printed": 15}),
        epochs=15,
    )
    # As in confirm.csv: by seed, and within a seed in the order of the arms.
    return frames(confirm=confirm.sort_values("seed", kind="stable", ignore_index=True))


def searched(rows: Sequence[Mapping[str, Any]], **record: Any) -> StudyFrames:
    """Return a study with trials only; omitted fields of a row have a default."""
    default = {"state": "completed", "epochs": 5, "val_accuracy": 0.8, "score": 0.8}
    names = [f"trial-{number}" for number in range(len(rows))]
    trials = pd.DataFrame([{**default, **row} for row in rows]).assign(run_id=names)
    return frames(trials=trials, record=record)


def frames(
    confirm: pd.DataFrame | None = None,
    trials: pd.DataFrame | None = None,
    record: Mapping[str, Any] | None = None,
) -> StudyFrames:
    """Return frames of a study; those not given are empty."""
    known = {"head", "learning_rate", "weight_decay", "batch_size"}
    known |= {"dropout", "dropout_1", "dropout_2", "backbone_warmup_epochs"}
    columns = [name for table in (trials, confirm) if table is not None for name in table.columns]
    return StudyFrames(
        path=Path("made-up"),
        record=dict(record or {}),
        epochs=pd.DataFrame(),
        trials=pd.DataFrame(columns=TRIAL_COLUMNS) if trials is None else trials,
        confirm=pd.DataFrame() if confirm is None else confirm,
        hyperparameters=tuple(dict.fromkeys(name for name in columns if name in known)),
    )
