"""Does a study find a difference where there is none?

    python run_study.py --space placebo --trials 40

Both arms have the same dropout and differ only in the number that selects the stream of dropout
masks. A verdict that claims a difference is a false positive: at most one study in twenty may.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="placebo",
    question="Does a study find a difference where there is none?",
    arms=(Arm("no-placebo", {"mask_stream": Fixed(1)}), Arm("placebo", {"mask_stream": Fixed(2)})),
    recipe={
        "dropout": Fixed(0.3),
        **typical("head", "learning_rate", "weight_decay", "batch_size", "optimizer"),
    },
)
