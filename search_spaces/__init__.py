"""Search spaces as data: hyperparameters, their ranges, arms and spaces."""

from search_spaces.parameters import (
    PARAMETERS,
    Parameter,
    dropout_rates,
    hidden_widths,
    typical,
    value_of,
    without_dropout,
)
from search_spaces.ranges import Choice, Fixed, Float, Range, SpaceError, Value
from search_spaces.registry import SPACES, find_space
from search_spaces.space import Arm, Space

__all__ = [
    "PARAMETERS",
    "SPACES",
    "Arm",
    "Choice",
    "Fixed",
    "Float",
    "Parameter",
    "Range",
    "Space",
    "SpaceError",
    "Value",
    "dropout_rates",
    "find_space",
    "hidden_widths",
    "typical",
    "value_of",
    "without_dropout",
]
