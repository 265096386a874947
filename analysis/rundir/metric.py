"""The metric that a study optimises, and its direction."""

from typing import Literal

#: Objective of search, ASHA, epoch selection and export, measured on `val`.
Metric = Literal["val_accuracy", "val_loss", "val_balanced_accuracy"]


def mode(metric: str) -> Literal["min", "max"]:
    """Return "min" if smaller scores of this metric are better, else "max"."""
    return "min" if metric == "val_loss" else "max"


def is_better(value: float, than: float, metric: str) -> bool:
    """Return whether a score is strictly better than another."""
    return value < than if mode(metric) == "min" else value > than
