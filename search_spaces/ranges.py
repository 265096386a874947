"""From what a hyperparameter takes its values: one value, an interval, or a few options."""

import math
from dataclasses import dataclass

Value = float | int | str


def is_finite(value: float) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is too large
        return False


class SpaceError(ValueError):
    """A space that makes no sense, or cannot be found; the message is one line."""


@dataclass(frozen=True)
class Fixed:
    """One value for every trial.

    Attributes:
        value: The value.
    """

    value: Value

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that must be allowed for the whole range to be."""
        return (self.value,)

    def __str__(self) -> str:
        return readable(self.value)


@dataclass(frozen=True)
class Float:
    """Any number of an interval.

    Attributes:
        low: Its lower end, included; above 0 where `log` is set.
        high: Its upper end, included; above `low`.
        log: Draw evenly on a logarithmic scale.

    Raises:
        SpaceError: The ends are no such interval.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (is_finite(self.low) and is_finite(self.high) and self.low < self.high):
            raise SpaceError(f"Float({self.low}, {self.high}): low must be below high")
        if self.log and self.low <= 0:
            raise SpaceError(f"Float({self.low}, {self.high}, log=True): low must be above 0")

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that must be allowed for the whole range to be."""
        return (float(self.low), float(self.high))

    def __str__(self) -> str:
        return f"{readable(self.low)} to {readable(self.high)}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few options.

    Attributes:
        options: At least two different values of one type; no order between them is assumed.

    Raises:
        SpaceError: There are fewer than two options, or two are equal, or the types are mixed.
    """

    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise SpaceError(f"Choice({self.options}): use Fixed for fewer than two options")
        if len(set(self.options)) < len(self.options):
            raise SpaceError(f"Choice({self.options}): an option stands there twice")
        if len({type(option) for option in self.options}) > 1:
            raise SpaceError(f"Choice({self.options}): all options must be of one type")

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that must be allowed for the whole range to be."""
        return self.options

    def __str__(self) -> str:
        return ", ".join(readable(option) for option in self.options)


Range = Fixed | Float | Choice


def readable(value: Value) -> str:
    """A value as a person writes it: six digits at most, whole numbers without a point."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
