"""Spaces for tests, as a user would write their own: `--space tests.support.spaces:NAME`."""

from search_spaces import Arm, Choice, Fixed, Float, Space

#: Every second trial or so diverges at once.
DIVERGING = Space(
    name="diverging",
    question="What becomes of trials that diverge?",
    arms=(Arm("no-dropout", {"dropout": Fixed(0.0)}), Arm("dropout", {"dropout": Float(0.1, 0.5)})),
    recipe={"head": Fixed("64"), "learning_rate": Choice((1e-3, 1e30)), "batch_size": Fixed(128)},
)

#: Means nothing where the backbone is frozen.
WARM_UP = Space(
    name="warm-up",
    question="Does a backbone that is warmed up do better?",
    arms=(
        Arm("cold", {"backbone_warmup_epochs": Fixed(0)}),
        Arm("warm", {"backbone_warmup_epochs": Fixed(2)}),
    ),
    recipe={"learning_rate": Float(1e-4, 1e-3)},
)

#: Trains in no time.
TINY = Space(
    name="tiny",
    question="What becomes of trials that something happens to?",
    arms=(Arm("no-dropout", {"dropout": Fixed(0.0)}), Arm("dropout", {"dropout": Float(0.1, 0.5)})),
    recipe={"head": Fixed("32"), "learning_rate": Float(1e-4, 1e-2), "batch_size": Fixed(64)},
)
