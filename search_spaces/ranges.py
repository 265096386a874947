"""Ranges of hyperparameters: one value, an interval, or a few options."""

import math
from dataclasses import dataclass

Value = float | int | str


def is_finite(value: float) -> bool:
    """Return whether the value is finite and fits into a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


class SpaceError(ValueError):
    """A space is invalid or cannot be found; the message is one line."""


@dataclass(frozen=True)
class Fixed:
    """One value for every trial.

    Attributes:
        value: The value.
    """

    value: Value

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check: if these are allowed, the whole range is."""
        return (self.value,)

    def __str__(self) -> str:
        return readable(self.value)


@dataclass(frozen=True)
class Float:
    """Any number in an interval.

    Attributes:
        low: Lower end, inclusive; above 0 if `log` is set.
        high: Upper end, inclusive; above `low`.
        log: Sample uniformly on a logarithmic scale.

    Raises:
        SpaceError: The ends are invalid.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (is_finite(self.low) and is_finite(self.high) and self.low < self.high):
            raise SpaceError(
                f"Float({self.low}, {self.high}): low and high must be finite, and low below high"
            )
        if self.log and self.low <= 0:
            raise SpaceError(
                f"Float({self.low}, {self.high}, log=True): low must be above 0 on a log scale"
            )

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check: if these are allowed, the whole range is."""
        return (float(self.low), float(self.high))

    def __str__(self) -> str:
        return f"{readable(self.low)} to {readable(self.high)}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few options.

    Attributes:
        options: At least two distinct values of one type; no order between them is assumed.

    Raises:
        SpaceError: There are fewer than two options, duplicates, or mixed types.
    """

    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise SpaceError(
                f"Choice({self.options}): give at least two options, or use Fixed for one value"
            )
        if len(set(self.options)) < len(self.options):
            raise SpaceError(f"Choice({self.options}): an option is listed twice")
        if len({type(option) for option in self.options}) > 1:
            raise SpaceError(f"Choice({self.options}): all options must have the same type")

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check: if these are allowed, the whole range is."""
        return self.options

    def __str__(self) -> str:
        return ", ".join(readable(option) for option in self.options)


Range = Fixed | Float | Choice


def readable(value: Value) -> str:
    """Format a value: at most six significant digits, whole numbers without a decimal point."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
