"""The metric that a study optimises, and which of two scores is better."""

from typing import Literal

#: What search, ASHA, epoch selection and export optimise, measured on `val`.
Metric = Literal["val_accuracy", "val_loss", "val_balanced_accuracy"]


def mode(metric: str) -> Literal["min", "max"]:
    """Whether a better score of this metric is smaller or larger."""
    return "min" if metric == "val_loss" else "max"


def is_better(value: float, than: float, metric: str) -> bool:
    """Whether a score is strictly better than another."""
    return value < than if mode(metric) == "min" else value > than
