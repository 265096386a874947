"""Accuracy and loss: their units in figures and words."""

from collections.abc import Mapping
from typing import Literal

Quantity = Literal["accuracy", "loss"]

#: The label of an axis, and by what the files' figures are multiplied for it.
UNITS: Mapping[Quantity, tuple[str, float]] = {
    "accuracy": ("accuracy (%)", 100),
    "loss": ("loss (nats per image)", 1),
}


def quantity_of(measure: str) -> Quantity:
    """What a measure such as `val_loss` or `train_accuracy` is."""
    return "loss" if measure.endswith("loss") else "accuracy"


def scale_of(measure: str) -> float:
    """By what a measure's figures are multiplied to be drawn."""
    return UNITS[quantity_of(measure)][1]


def describe_measured(measure: str, value: float) -> str:
    """A figure with its unit: 88.58 %, 0.373 nats."""
    return f"{100 * value:.2f} %" if quantity_of(measure) == "accuracy" else f"{value:.3f} nats"
