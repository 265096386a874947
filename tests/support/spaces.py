"""User-defined spaces for tests: `--space tests.support.spaces:NAME`."""

from search_spaces import Arm, Choice, Fixed, Float, Space

#: About every second trial diverges at once.
DIVERGING = Space(
    name="diverging",
    question="What happens to trials that diverge?",
    arms=(Arm("no-dropout", {"dropout": Fixed(0.0)}), Arm("dropout", {"dropout": Float(0.1, 0.5)})),
    recipe={"head": Fixed("64"), "learning_rate": Choice((1e-3, 1e30)), "batch_size": Fixed(128)},
)

#: Has no effect with a frozen backbone.
WARM_UP = Space(
    name="warm-up",
    question="Does warming up the backbone help?",
    arms=(
        Arm("cold", {"backbone_warmup_epochs": Fixed(0)}),
        Arm("warm", {"backbone_warmup_epochs": Fixed(2)}),
    ),
    recipe={"learning_rate": Float(1e-4, 1e-3)},
)

#: Trains almost instantly.
TINY = Space(
    name="tiny",
    question="What happens to trials that are hit by a fault?",
    arms=(Arm("no-dropout", {"dropout": Fixed(0.0)}), Arm("dropout", {"dropout": Float(0.1, 0.5)})),
    recipe={"head": Fixed("32"), "learning_rate": Float(1e-4, 1e-2), "batch_size": Fixed(64)},
)
