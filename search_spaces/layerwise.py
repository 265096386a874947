"""Does dropout help, when each hidden layer may have its own rate?

    python run_study.py --space layerwise --trials 40

Heads of two hidden layers only, so that every trial has the same two rates to search.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Choice, Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="layerwise",
    question="Does dropout help, with a rate of its own for each hidden layer?",
    arms=(
        Arm("no-dropout", {"dropout_1": Fixed(0.0), "dropout_2": Fixed(0.0)}),
        Arm("dropout", typical("dropout_1", "dropout_2")),
    ),
    recipe={
        "head": Choice(("512-256", "1024-512", "2048-512")),
        **typical("learning_rate", "weight_decay", "batch_size", "optimizer"),
    },
)
