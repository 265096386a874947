"""Does dropout in the head help, when both sides get the recipe that suits them best?

    python run_study.py --space dropout --trials 40

The default where the backbone is frozen. Both arms search the same recipe with the same number of
trials. The arms do not touch: a rate below 0.05 hardly differs from none, and would let the
dropout arm win with a model that has no dropout to speak of.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="dropout",
    question="Does dropout in the head help?",
    arms=(
        Arm("no-dropout", {"dropout": Fixed(0.0)}),
        Arm("dropout", typical("dropout")),
    ),
    recipe=typical("head", "learning_rate", "weight_decay", "batch_size", "optimizer"),
)
