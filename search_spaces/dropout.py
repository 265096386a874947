"""Does dropout in the head help when each arm gets the recipe that suits it best?

    python run_study.py --space dropout --trials 40

The default for a frozen backbone. Both arms search the same recipe with the same number of trials.
There is a gap between the arms: a rate below 0.05 is hardly different from 0, and would let the
dropout arm win with a model that has virtually no dropout.
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
