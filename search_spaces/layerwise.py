"""Does dropout help when each hidden layer has its own rate?

    python run_study.py --space layerwise --trials 40

All heads have two hidden layers, so that every trial searches the same two rates.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Choice, Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="layerwise",
    question="Does dropout help when each hidden layer has its own rate?",
    arms=(
        Arm("no-dropout", {"dropout_1": Fixed(0.0), "dropout_2": Fixed(0.0)}),
        Arm("dropout", typical("dropout_1", "dropout_2")),
    ),
    recipe={
        "head": Choice(("512-256", "1024-512", "2048-512")),
        **typical("learning_rate", "weight_decay", "batch_size", "optimizer"),
    },
)
