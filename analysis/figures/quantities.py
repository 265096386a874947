"""Accuracy and loss: their units in figures and in text."""

from collections.abc import Mapping
from typing import Literal

Quantity = Literal["accuracy", "loss"]

#: Axis label, and the factor that converts stored values to its unit.
UNITS: Mapping[Quantity, tuple[str, float]] = {
    "accuracy": ("accuracy (%)", 100),
    "loss": ("loss (nats per image)", 1),
}


def quantity_of(measure: str) -> Quantity:
    """Return the quantity of a measure such as `val_loss` or `train_accuracy`."""
    return "loss" if measure.endswith("loss") else "accuracy"


def scale_of(measure: str) -> float:
    """Return the factor that converts stored values of a measure to the unit of its axis."""
    return UNITS[quantity_of(measure)][1]


def describe_measured(measure: str, value: float) -> str:
    """Return a value with its unit: 88.58 %, 0.373 nats."""
    return f"{100 * value:.2f} %" if quantity_of(measure) == "accuracy" else f"{value:.3f} nats"
