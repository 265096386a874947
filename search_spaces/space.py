"""A space: what a study varies, as data. The factor stands in arms, all else in the recipe."""

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

#: The study's options for which a space may have a better default than the study.
OPTIONS: Mapping[str, Rule] = {
    "transfer": one_of("auto", "frozen", "finetune"),
    "image_size": Rule("a whole number of 32 or more", lambda value: is_count(value, 32)),
    "preprocess": one_of("own", "raw"),
    "weights": Rule("text", lambda value: isinstance(value, str)),
    "augment": one_of("none", "flip", "crop-flip"),
}

#: What every run needs; the default stands in where a space leaves one out.
NEEDED = ("head", "learning_rate", "weight_decay", "batch_size", "optimizer")


@dataclass(frozen=True)
class Arm:
    """One setting of the factor, fixed or ranged.

    Attributes:
        name: Letters, digits, dots, dashes and underscores; it becomes a part of file names.
        factor: The hyperparameters that make the difference between the arms, at least one.

    Raises:
        SpaceError: The name, a hyperparameter's name or one of its values is not allowed.
    """

    name: str
    factor: Mapping[str, Range]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SpaceError(f"arm {self.name!r}: use letters, digits, dots and dashes in its name")
        if not self.factor:
            raise SpaceError(f"arm {self.name}: its factor holds no hyperparameter")
        for name, values in self.factor.items():
            parameter(name).check(values)

    @property
    def fixed(self) -> bool:
        """Whether every value of the factor is fixed."""
        return all(isinstance(values, Fixed) for values in self.factor.values())


@dataclass(frozen=True)
class Space:
    """What a study varies.

    Attributes:
        name: The name under which `--space` finds it.
        question: What a study of this space answers, one sentence.
        arms: One or more; each is searched with the same number of trials.
        recipe: All other hyperparameters, searched alike in every arm; one that is left out has
            its default.
        settings: Values of the factor at which the confirmation runs try the champions' recipes;
            where empty, they are the champions' own.
        options: The study's options that this space sets unless the user does: `transfer`,
            `image_size` (pixels), `preprocess`, `weights`, `augment`.

    Raises:
        SpaceError: The parts do not fit together.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    recipe: Mapping[str, Range]
    settings: tuple[Arm, ...] = ()
    options: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.isprintable():
            raise SpaceError(f"space {self.name!r}: use letters, digits and dashes in its name")
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
        """The range of every hyperparameter of a run: the recipe's and the arm's factor."""
        named = {**self.recipe, **arm.factor}
        defaults = {name: Fixed(PARAMETERS[name].default) for name in NEEDED if name not in named}
        return {**defaults, **named}

    def fixed_values(self, arm: Arm) -> dict[str, Value]:
        """The hyperparameters of an arm's runs that are not searched."""
        ranges = self.ranges(arm)
        return {name: r.value for name, r in ranges.items() if isinstance(r, Fixed)}

    def searches(self, arm: Arm) -> bool:
        """Whether the arm has anything to search; where not, it goes straight to confirmation."""
        return not all(isinstance(values, Fixed) for values in self.ranges(arm).values())

    def with_frozen_backbone(self) -> "Space":
        """What is left of the space where the backbone is frozen.

        The hyperparameters of the backbone's training fall away, and with them the arms and
        settings that differ from an earlier one in nothing else.

        Raises:
            SpaceError: The arms differ in nothing else, so that there is no question left.
        """
        if not any(PARAMETERS[name].backbone for name in self.ranges(self.arms[0])):
            return self
        if all(PARAMETERS[name].backbone for name in self.factor_names):
            raise SpaceError(
                f"space {self.name}: its arms differ in {', '.join(self.factor_names)} only, which"
                " means nothing with a frozen backbone"
            )
        return replace(
            self,
            arms=_without_backbone(self.arms),
            settings=_without_backbone(self.settings),
            recipe=_of_the_head(self.recipe),
        )

    def _check_arms(self) -> None:
        if not self.arms:
            raise SpaceError("it has no arms")
        _refuse_twins("arms", self.arms)
        _refuse_twins("settings", self.settings)
        for arm in (*self.arms, *self.settings):
            if set(arm.factor) != set(self.factor_names):
                raise SpaceError(
                    f"{arm.name} sets {', '.join(arm.factor)}, but {self.arms[0].name} sets"
                    f" {', '.join(self.factor_names)}; the factor must be the same everywhere"
                )
        for setting in self.settings:
            if not setting.fixed:
                raise SpaceError(f"setting {setting.name}: every value must be Fixed")

    def _check_recipe(self) -> None:
        for name, values in self.recipe.items():
            parameter(name).check(values)
            if name in self.factor_names:
                raise SpaceError(f"{name} stands in the recipe and in the factor; choose one")

    def _check_rates(self) -> None:
        ranges = self.ranges(self.arms[0])
        rates = [name for name in LAYER_RATES if name in ranges]
        if rates and "dropout" in ranges:
            raise SpaceError(f"dropout and {rates[0]} together; choose one way")
        for head in ranges["head"].ends if rates else ():
            depth = len(hidden_widths({"head": head}))
            if rates != list(LAYER_RATES[:depth]):
                raise SpaceError(
                    f"head {head} has {depth} hidden layers, but there are rates for"
                    f" {', '.join(rates)}"
                )

    def _check_options(self) -> None:
        for name, value in self.options.items():
            if name not in OPTIONS:
                raise SpaceError(f"unknown option {name!r}; a space may set {', '.join(OPTIONS)}")
            if not OPTIONS[name].allows(value):
                raise SpaceError(f"option {name}: {value!r} is not {OPTIONS[name].words}")


def _without_backbone(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """The arms without what concerns the backbone's training; of equal ones the first."""
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
            raise SpaceError(f"two {what} are named {name}")
