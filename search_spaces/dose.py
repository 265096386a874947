"""How much dropout is best, all else equal?

    python run_study.py --space dose --trials 40

One search, in which dropout varies freely, finds one recipe; the confirmation runs then train it at
seven rates. The curve is computed from these runs only: a search samples where it expects good
scores, so its trials reflect the sampler as much as the effect of dropout.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Fixed, Float
from search_spaces.space import Arm, Space

SPACE = Space(
    name="dose",
    question="How much dropout is best?",
    arms=(Arm("any-dropout", {"dropout": Float(0.0, 0.6)}),),
    recipe=typical("head", "learning_rate", "weight_decay", "batch_size", "optimizer"),
    settings=tuple(
        Arm(f"dropout-{rate}", {"dropout": Fixed(rate)})
        for rate in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    ),
)
