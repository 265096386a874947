"""All hyperparameters: name, meaning, default and typical range of each."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from search_spaces.ranges import Choice, Fixed, Float, Range, SpaceError, Value, is_finite


@dataclass(frozen=True)
class Rule:
    """A constraint on the values of a hyperparameter.

    Attributes:
        words: The constraint as a phrase that completes "expected ...".
        allows: Returns whether a value satisfies the constraint.
    """

    words: str
    allows: Callable[[Value], bool]


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter.

    Attributes:
        name: Name in spaces, tables and files.
        meaning: A phrase that describes it.
        default: Value used if a space does not set it.
        range: Typical search range; for the head's hyperparameters, with a frozen backbone.
        rule: Constraint on its values.
        backbone: True if it affects only the training of the backbone, and so has no effect if
            the backbone is frozen.
    """

    name: str
    meaning: str
    default: Value
    range: Range
    rule: Rule
    backbone: bool = False

    def __post_init__(self) -> None:
        self.check(Fixed(self.default))
        self.check(self.range)

    def check(self, values: Range) -> None:
        """Check that every value in a range is allowed.

        Raises:
            SpaceError: A value violates the rule.
        """
        for value in values.ends:
            if not self.rule.allows(value):
                raise SpaceError(f"{self.name}: {value!r} is invalid; expected {self.rule.words}")


def _number(value: Value) -> float:
    """Return the value if it is a finite number, else NaN, which fails every comparison."""
    if isinstance(value, str | bool) or not is_finite(value):
        return math.nan
    return value


def is_count(value: Value, low: int = 1) -> bool:
    """Return whether the value is a whole number of at least `low`."""
    return isinstance(value, int) and _number(value) >= low


def _is_whole(value: Value) -> bool:
    return is_count(value, 0)


def one_of(*options: str) -> Rule:
    """Return the rule that a value is one of some words."""
    words = f"{', '.join(map(repr, options[:-1]))} or {options[-1]!r}"
    return Rule(words, lambda value: value in options)


#: Widths have at most six digits, which is wider than any network.
WIDTH_PATTERN = r"[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})*"


def _is_widths(value: Value) -> bool:
    return isinstance(value, str) and re.fullmatch(WIDTH_PATTERN, value) is not None


RATE = Rule("a number in [0, 1)", lambda value: 0 <= _number(value) < 1)
POSITIVE = Rule("a number above 0", lambda value: _number(value) > 0)
NOT_NEGATIVE = Rule("a number of 0 or more", lambda value: _number(value) >= 0)
COUNT = Rule("a whole number of 1 or more", is_count)
WHOLE = Rule("a whole number of 0 or more", _is_whole)
WIDTHS = Rule("layer widths such as '512' or '512-256'", _is_widths)

#: Dropout rates of the individual hidden layers, in layer order.
LAYER_RATES = ("dropout_1", "dropout_2", "dropout_3", "dropout_4")

PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "head",
            "widths of the hidden layers, from the backbone to the output",
            default="1024",
            range=Choice(
                ("512-256-512-128", "256", "512", "1024", "512-256", "1024-512", "2048-512")
            ),
            rule=WIDTHS,
        ),
        Parameter(
            "learning_rate",
            "learning rate of the head",
            default=5e-4,
            range=Float(3e-5, 3e-3, log=True),
            rule=POSITIVE,
        ),
        Parameter(
            "weight_decay",
            "decoupled with adamw; an L2 penalty added to the gradient with adam",
            default=1e-2,
            range=Float(1e-6, 1e-1, log=True),
            rule=NOT_NEGATIVE,
        ),
        Parameter(
            "batch_size",
            "images per training step",
            default=256,
            range=Choice((256, 512, 1024)),
            rule=COUNT,
        ),
        Parameter(
            "optimizer",
            "adam or adamw",
            default="adamw",
            range=Fixed("adamw"),
            rule=one_of("adam", "adamw"),
        ),
        Parameter(
            "dropout",
            "probability of dropping a unit in training, the same in every hidden layer",
            default=0.0,
            range=Float(0.05, 0.6),
            rule=RATE,
        ),
        *(
            Parameter(
                name,
                f"probability of dropping a unit of hidden layer {layer} in training",
                default=0.0,
                range=Float(0.05, 0.6),
                rule=RATE,
            )
            for layer, name in enumerate(LAYER_RATES, start=1)
        ),
        Parameter(
            "label_smoothing",
            "share of the target spread evenly over all classes in training; reported losses do"
            " not include it",
            default=0.0,
            range=Choice((0.0, 0.1)),
            rule=RATE,
        ),
        Parameter(
            "lr_warmup_epochs",
            "epochs over which the learning rates rise linearly from 0, step by step",
            default=0,
            range=Choice((0, 1)),
            rule=WHOLE,
        ),
        Parameter(
            "lr_schedule",
            "learning rates after the warm-up: constant, or decaying to 0 along half a cosine",
            default="constant",
            range=Choice(("constant", "cosine")),
            rule=one_of("constant", "cosine"),
        ),
        Parameter(
            "backbone_lr_ratio",
            "learning rate of the backbone as a multiple of the head's",
            default=0.1,
            range=Float(0.03, 1.0, log=True),
            rule=POSITIVE,
            backbone=True,
        ),
        Parameter(
            "frozen_layers",
            "frozen part of the backbone: none, the stem, or everything up to stage 3",
            default="none",
            range=Choice(("none", "stem", "stage-3")),
            rule=one_of("none", "stem", "stage-3"),
            backbone=True,
        ),
        Parameter(
            "batch_norm",
            "BatchNorm statistics used in training: those of the batch, which also update the"
            " running ones (batch), or the pretrained ones, unchanged (pretrained)",
            default="batch",
            range=Choice(("batch", "pretrained")),
            rule=one_of("batch", "pretrained"),
            backbone=True,
        ),
        Parameter(
            "backbone_warmup_epochs",
            "epochs for which the backbone first trains under another head, without dropout, which"
            " is then discarded",
            default=0,
            range=Choice((0, 5)),
            rule=WHOLE,
            backbone=True,
        ),
        Parameter(
            "mask_stream",
            "stream of dropout masks drawn for a seed; has no other effect: a placebo",
            default=1,
            range=Choice((1, 2)),
            rule=COUNT,
        ),
    )
}


def parameter(name: str) -> Parameter:
    """Return the hyperparameter of that name.

    Raises:
        SpaceError: The name is unknown.
    """
    if name not in PARAMETERS:
        raise SpaceError(f"unknown hyperparameter {name!r}; choose from {', '.join(PARAMETERS)}")
    return PARAMETERS[name]


def typical(*names: str) -> dict[str, Range]:
    """Return the typical ranges of some hyperparameters, to build a recipe from.

    Raises:
        SpaceError: A name is unknown.
    """
    return {name: parameter(name).range for name in names}


def value_of(hyperparameters: Mapping[str, Value], name: str) -> Value:
    """Return the value of a hyperparameter in one run, or its default if the run does not set it.

    Args:
        hyperparameters: The values of one run.
        name: Name of a hyperparameter in `PARAMETERS`.
    """
    return hyperparameters.get(name, PARAMETERS[name].default)


def hidden_widths(hyperparameters: Mapping[str, Value]) -> tuple[int, ...]:
    """Return the widths of the head's hidden layers: (512, 256) for `{"head": "512-256"}`."""
    return tuple(int(width) for width in str(hyperparameters["head"]).split("-"))


def dropout_rates(hyperparameters: Mapping[str, Value]) -> tuple[float, ...]:
    """Return the dropout rate after each hidden layer of the head, each in [0, 1).

    Args:
        hyperparameters: The values of one run, with either `dropout`, one rate for all layers, or
            `dropout_1`, `dropout_2`, ..., one per hidden layer; 0 if neither is set.

    Returns:
        One rate per hidden layer.

    Raises:
        SpaceError: Rates per layer are given, but not exactly one for each hidden layer.
    """
    depth = len(hidden_widths(hyperparameters))
    given = [name for name in LAYER_RATES if name in hyperparameters]
    if not given:
        return (float(value_of(hyperparameters, "dropout")),) * depth
    if given != list(LAYER_RATES[:depth]):
        raise SpaceError(
            f"head {hyperparameters['head']} needs {depth} dropout rates, one per hidden layer;"
            f" got {', '.join(given)}"
        )
    return tuple(float(hyperparameters[name]) for name in given)


def without_dropout(hyperparameters: Mapping[str, Value]) -> dict[str, Value]:
    """Return the hyperparameters with every dropout rate set to 0."""
    rates = {"dropout", *LAYER_RATES} & hyperparameters.keys()
    return {**hyperparameters, **dict.fromkeys(rates, 0.0)}
