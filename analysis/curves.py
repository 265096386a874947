"""Accuracy and loss by epoch, for every setting of the factor."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.frames import Evidence, StudyFrames, compute_compared_runs

MEASURES = ("train_accuracy", "val_accuracy", "train_loss", "val_loss")


@dataclass(frozen=True)
class Band:
    """One measure of several runs, epoch by epoch; accuracies are fractions.

    Attributes:
        epochs: [epochs], from 1.
        mean: [epochs], over the runs.
        low: [epochs], the lowest run.
        high: [epochs], the highest run.
    """

    epochs: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class SettingCurves:
    """The curves of one setting.

    Attributes:
        setting: Its name.
        n: Number of runs.
        bands: By measure: `train_accuracy`, `val_accuracy`, `train_loss`, `val_loss`.
    """

    setting: str
    n: int
    bands: Mapping[str, Band]


@dataclass(frozen=True)
class Curves:
    """The curves of a study.

    Attributes:
        evidence: The kind of runs behind them.
        settings: In the study's order; those without a row in epochs.jsonl are left out.
    """

    evidence: Evidence
    settings: tuple[SettingCurves, ...]


def compute_curves(frames: StudyFrames) -> Curves:
    """Mean and extent of every measure over the runs of each setting."""
    compared = compute_compared_runs(frames)
    setting_of = compared.runs[["run_id", "setting"]]
    epochs = frames.epochs.merge(setting_of, on="run_id")
    curves = []
    for setting in compared.settings:
        rows = epochs[epochs["setting"] == setting]
        if len(rows):
            bands = {measure: _band(rows, measure) for measure in MEASURES}
            curves.append(SettingCurves(setting, rows["run_id"].nunique(), bands))
    return Curves(compared.evidence, tuple(curves))


def _band(rows: pd.DataFrame, measure: str) -> Band:
    by_epoch = rows.groupby("epoch")[measure].agg(["mean", "min", "max"])
    return Band(
        epochs=by_epoch.index.to_numpy(dtype=np.float64),
        mean=by_epoch["mean"].to_numpy(dtype=np.float64),
        low=by_epoch["min"].to_numpy(dtype=np.float64),
        high=by_epoch["max"].to_numpy(dtype=np.float64),
    )
