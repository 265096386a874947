"""Every hyperparameter there is, each once: its name, meaning, default and typical range."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from search_spaces.ranges import Choice, Fixed, Float, Range, SpaceError, Value, is_finite


@dataclass(frozen=True)
class Rule:
    """What every value of a hyperparameter must be.

    Attributes:
        words: The rule, as it ends the sentence "x is not ...".
        allows: Whether a value obeys it.
    """

    words: str
    allows: Callable[[Value], bool]


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter.

    Attributes:
        name: Its name in spaces, tables and files.
        meaning: What it is; a phrase.
        default: Its value where a space does not mention it.
        range: Where to search it; for what concerns the head, when the backbone is frozen.
        rule: What every value of it must be.
        backbone: Whether it concerns the training of the backbone, and so means nothing where the
            backbone is frozen.
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
        """Make sure that every value of a range is allowed.

        Raises:
            SpaceError: One is not.
        """
        for value in values.ends:
            if not self.rule.allows(value):
                raise SpaceError(f"{self.name}: {value!r} is not {self.rule.words}")


def _number(value: Value) -> float:
    """The value, or NaN, which fails every comparison, where it is no finite number."""
    if isinstance(value, str | bool) or not is_finite(value):
        return math.nan
    return value


def is_count(value: Value, low: int = 1) -> bool:
    """Whether it is a whole number of so many or more."""
    return isinstance(value, int) and _number(value) >= low


def _is_whole(value: Value) -> bool:
    return is_count(value, 0)


def one_of(*options: str) -> Rule:
    """The rule that a value is one of some words."""
    words = f"{', '.join(map(repr, options[:-1]))} or {options[-1]!r}"
    return Rule(words, lambda value: value in options)


#: Widths of at most six digits: no network is wider.
WIDTH_PATTERN = r"[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})*"


def _is_widths(value: Value) -> bool:
    return isinstance(value, str) and re.fullmatch(WIDTH_PATTERN, value) is not None


RATE = Rule("a number from 0 up to, but not including, 1", lambda value: 0 <= _number(value) < 1)
POSITIVE = Rule("a number above 0", lambda value: _number(value) > 0)
NOT_NEGATIVE = Rule("a number of 0 or more", lambda value: _number(value) >= 0)
COUNT = Rule("a whole number of 1 or more", is_count)
WHOLE = Rule("a whole number of 0 or more", _is_whole)
WIDTHS = Rule("text such as '512' or '512-256'", _is_widths)

#: The dropout rates of single hidden layers, the first layer's first.
LAYER_RATES = ("dropout_1", "dropout_2", "dropout_3", "dropout_4")

PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "head",
            "widths of the hidden layers, from the backbone to the classes",
            default="1024",
            range=Choice(
                ("512-256-512-128", "256", "512", "1024", "512-256", "1024-512", "2048-512")
            ),
            rule=WIDTHS,
        ),
        Parameter(
            "learning_rate",
            "step size of the optimizer",
            default=5e-4,
            range=Float(3e-5, 3e-3, log=True),
            rule=POSITIVE,
        ),
        Parameter(
            "weight_decay",
            "decoupled with adamw; an L2 term of the gradient with adam",
            default=1e-2,
            range=Float(1e-6, 1e-1, log=True),
            rule=NOT_NEGATIVE,
        ),
        Parameter(
            "batch_size",
            "images per step",
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
            "chance that a unit is dropped in training, the same in every hidden layer",
            default=0.0,
            range=Float(0.05, 0.6),
            rule=RATE,
        ),
        *(
            Parameter(
                name,
                f"chance that a unit of hidden layer {layer} is dropped in training",
                default=0.0,
                range=Float(0.05, 0.6),
                rule=RATE,
            )
            for layer, name in enumerate(LAYER_RATES, start=1)
        ),
        Parameter(
            "label_smoothing",
            "share of the target that training spreads over all classes; losses are measured"
            " without it",
            default=0.0,
            range=Choice((0.0, 0.1)),
            rule=RATE,
        ),
        Parameter(
            "lr_warmup_epochs",
            "epochs over which the learning rates rise from 0, step by step",
            default=0,
            range=Choice((0, 1)),
            rule=WHOLE,
        ),
        Parameter(
            "lr_schedule",
            "the learning rates after that: constant, or falling to 0 along half a cosine",
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
            "what of the backbone stays as it was pretrained: none, the stem, or all to stage 3",
            default="none",
            range=Choice(("none", "stem", "stage-3")),
            rule=one_of("none", "stem", "stage-3"),
            backbone=True,
        ),
        Parameter(
            "batch_norm",
            "what BatchNorm normalises by in training: the batch's statistics (batch), which also"
            " update the running ones, or the pretrained ones, unchanged (pretrained)",
            default="batch",
            range=Choice(("batch", "pretrained")),
            rule=one_of("batch", "pretrained"),
            backbone=True,
        ),
        Parameter(
            "backbone_warmup_epochs",
            "epochs for which the backbone first trains under another head, without dropout, which"
            " is then thrown away",
            default=0,
            range=Choice((0, 5)),
            rule=WHOLE,
            backbone=True,
        ),
        Parameter(
            "mask_stream",
            "which stream of dropout masks a seed stands for; changes nothing else: a placebo",
            default=1,
            range=Choice((1, 2)),
            rule=COUNT,
        ),
    )
}


def parameter(name: str) -> Parameter:
    """The hyperparameter of that name.

    Raises:
        SpaceError: There is none.
    """
    if name not in PARAMETERS:
        raise SpaceError(f"unknown hyperparameter {name!r}; there are {', '.join(PARAMETERS)}")
    return PARAMETERS[name]


def typical(*names: str) -> dict[str, Range]:
    """The typical ranges of some hyperparameters, to build a recipe from.

    Raises:
        SpaceError: A name is unknown.
    """
    return {name: parameter(name).range for name in names}


def value_of(hyperparameters: Mapping[str, Value], name: str) -> Value:
    """The value of a hyperparameter in one run: its own, else the default.

    Args:
        hyperparameters: The values of one run.
        name: Of a hyperparameter in `PARAMETERS`.
    """
    return hyperparameters.get(name, PARAMETERS[name].default)


def hidden_widths(hyperparameters: Mapping[str, Value]) -> tuple[int, ...]:
    """The widths of the head's hidden layers: `{"head": "512-256"}` gives (512, 256)."""
    return tuple(int(width) for width in str(hyperparameters["head"]).split("-"))


def dropout_rates(hyperparameters: Mapping[str, Value]) -> tuple[float, ...]:
    """The dropout rate after each hidden layer of the head, each in [0, 1).

    Args:
        hyperparameters: The values of one run; either `dropout`, the same for every layer, or
            `dropout_1`, `dropout_2`, ..., as many as the head has hidden layers; 0 where neither.

    Returns:
        As many rates as the head has hidden layers.

    Raises:
        SpaceError: There are rates of single layers, but not one for each.
    """
    depth = len(hidden_widths(hyperparameters))
    given = [name for name in LAYER_RATES if name in hyperparameters]
    if not given:
        return (float(value_of(hyperparameters, "dropout")),) * depth
    if given != list(LAYER_RATES[:depth]):
        raise SpaceError(
            f"head {hyperparameters['head']} needs {depth} rates, got {', '.join(given)}"
        )
    return tuple(float(hyperparameters[name]) for name in given)


def without_dropout(hyperparameters: Mapping[str, Value]) -> dict[str, Value]:
    """The same hyperparameters with every dropout rate at 0."""
    rates = {"dropout", *LAYER_RATES} & hyperparameters.keys()
    return {**hyperparameters, **dict.fromkeys(rates, 0.0)}
