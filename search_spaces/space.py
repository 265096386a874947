"""A space: what a study varies, as data. Arms hold the factor, the recipe everything else."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from search_spaces.parameters import (
    LAYER_RATES,
    PARAMETERS,
    Rule,
    hidden_widths,
    is_count,
    one_of,
    parameter,
)
from search_spaces.ranges import Fixed, Range, SpaceError, Value

#: Options of the study that a space may give its own default.
OPTIONS: Mapping[str, Rule] = {
    "transfer": one_of("auto", "frozen", "finetune"),
    "image_size": Rule("a whole number of 32 or more", lambda value: is_count(value, 32)),
    "preprocess": one_of("own", "raw"),
    "weights": Rule("text", lambda value: isinstance(value, str)),
    "augment": one_of("none", "flip", "crop-flip"),
}

#: Hyperparameters that every run needs; those a space omits get their default.
NEEDED = ("head", "learning_rate", "weight_decay", "batch_size", "optimizer")


@dataclass(frozen=True)
class Arm:
    """One setting of the factor, fixed or ranged.

    Attributes:
        name: Letters, digits, dots, dashes and underscores; it becomes part of file names.
        factor: The hyperparameters that differ between the arms, at least one.

    Raises:
        SpaceError: The name, a hyperparameter's name or one of its values is not allowed.
    """

    name: str
    factor: Mapping[str, Range]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SpaceError(
                f"arm {self.name!r}: the name must start with a letter or digit, and contain only"
                " letters, digits, dots, dashes and underscores"
            )
        if not self.factor:
            raise SpaceError(f"arm {self.name}: the factor needs at least one hyperparameter")
        for name, values in self.factor.items():
            parameter(name).check(values)

    @property
    def fixed(self) -> bool:
        """True if every value of the factor is fixed."""
        return all(isinstance(values, Fixed) for values in self.factor.values())


@dataclass(frozen=True)
class Space:
    """What a study varies.

    Attributes:
        name: Name of the space, as given to `--space`.
        question: The question that a study of this space answers, one sentence.
        arms: One or more; each is searched with the same number of trials.
        recipe: All other hyperparameters, searched alike in every arm; omitted ones have their
            default.
        settings: Values of the factor at which the confirmation runs test the champions' recipes;
            if empty, the champions' own.
        options: Defaults for options of the study: `transfer`, `image_size` (pixels),
            `preprocess`, `weights`, `augment`.

    Raises:
        SpaceError: The space is invalid or inconsistent.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    recipe: Mapping[str, Range]
    settings: tuple[Arm, ...] = ()
    options: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.isprintable():
            raise SpaceError(
                f"space {self.name!r}: the name must contain printable characters only"
            )
        try:
            self._check_arms()
            self._check_recipe()
            self._check_rates()
            self._check_options()
        except SpaceError as error:
            raise SpaceError(f"space {self.name}: {error}") from None

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The names of the hyperparameters that make up the factor."""
        return tuple(self.arms[0].factor)

    def ranges(self, arm: Arm) -> dict[str, Range]:
        """Return the range of every hyperparameter of a run: the recipe and the arm's factor."""
        named = {**self.recipe, **arm.factor}
        defaults = {name: Fixed(PARAMETERS[name].default) for name in NEEDED if name not in named}
        return {**defaults, **named}

    def fixed_values(self, arm: Arm) -> dict[str, Value]:
        """Return the fixed hyperparameters of an arm's runs."""
        ranges = self.ranges(arm)
        return {name: r.value for name, r in ranges.items() if isinstance(r, Fixed)}

    def searches(self, arm: Arm) -> bool:
        """Return whether the arm has anything to search; if not, it skips the search."""
        return not all(isinstance(values, Fixed) for values in self.ranges(arm).values())

    def with_frozen_backbone(self) -> "Space":
        """Return the space reduced to what applies to a frozen backbone.

        Hyperparameters of the backbone's training are removed, and so are arms and settings that
        then equal an earlier one.

        Raises:
            SpaceError: The arms differ only in hyperparameters of the backbone's training.
        """
        if not any(PARAMETERS[name].backbone for name in self.ranges(self.arms[0])):
            return self
        if all(PARAMETERS[name].backbone for name in self.factor_names):
            raise SpaceError(
                f"space {self.name}: its arms differ only in {', '.join(self.factor_names)}, which"
                " has no effect with a frozen backbone"
            )
        return replace(
            self,
            arms=_without_backbone(self.arms),
            settings=_without_backbone(self.settings),
            recipe=_of_the_head(self.recipe),
        )

    def _check_arms(self) -> None:
        if not self.arms:
            raise SpaceError("it has no arms; at least one is required")
        _refuse_twins("arms", self.arms)
        _refuse_twins("settings", self.settings)
        for arm in (*self.arms, *self.settings):
            if set(arm.factor) != set(self.factor_names):
                raise SpaceError(
                    f"{arm.name} sets {', '.join(arm.factor)}, but {self.arms[0].name} sets"
                    f" {', '.join(self.factor_names)}; all arms and settings must set the"
                    " same hyperparameters"
                )
        for setting in self.settings:
            if not setting.fixed:
                raise SpaceError(f"setting {setting.name}: every value must be Fixed")

    def _check_recipe(self) -> None:
        for name, values in self.recipe.items():
            parameter(name).check(values)
            if name in self.factor_names:
                raise SpaceError(f"{name} is in both the recipe and the factor; remove one")

    def _check_rates(self) -> None:
        ranges = self.ranges(self.arms[0])
        rates = [name for name in LAYER_RATES if name in ranges]
        if rates and "dropout" in ranges:
            raise SpaceError(
                f"dropout and {rates[0]} cannot be combined; set one rate for all hidden layers, or"
                " one per layer"
            )
        for head in ranges["head"].ends if rates else ():
            depth = len(hidden_widths({"head": head}))
            if rates != list(LAYER_RATES[:depth]):
                raise SpaceError(
                    f"head {head} has {depth} hidden layers, but the dropout rates are"
                    f" {', '.join(rates)}; give one per hidden layer"
                )

    def _check_options(self) -> None:
        for name, value in self.options.items():
            if name not in OPTIONS:
                raise SpaceError(f"unknown option {name!r}; a space may set {', '.join(OPTIONS)}")
            if not OPTIONS[name].allows(value):
                raise SpaceError(
                    f"option {name}: {value!r} is invalid; expected {OPTIONS[name].words}"
                )


def _without_backbone(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Remove hyperparameters of the backbone's training from arms, and then duplicate arms."""
    kept: list[Arm] = []
    for arm in arms:
        factor = _of_the_head(arm.factor)
        if factor not in [other.factor for other in kept]:
            kept.append(Arm(arm.name, factor))
    return tuple(kept)


def _of_the_head(ranges: Mapping[str, Range]) -> dict[str, Range]:
    return {name: values for name, values in ranges.items() if not PARAMETERS[name].backbone}


def _refuse_twins(what: str, arms: Iterable[Arm]) -> None:
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise SpaceError(f"two {what} are named {name}; names must be unique")
