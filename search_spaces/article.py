"""The article's question under its own settings, and the comparison its code actually makes.

    python run_study.py --space article --transfer finetune

Nothing is searched, so the study goes straight to the confirmation runs. Head, optimizer, learning
rate, batch size and 15 epochs are the article's, as are raw 32-pixel images, Keras weights and no
augmentation. There are three arms:

- `no-dropout`: the model as the article describes it, without dropout.
- `dropout`: the same with dropout after each hidden layer. The article does not give a rate; 0.3
  is this project's choice, the middle of the range 0 to 0.6 that the space `dose` covers.
- `as-printed`: what the article's code does for its model "with dropout". Both of its models share
  one backbone object, which the first model has trained for 15 epochs by the time the second one
  starts, and the second model has no dropout layer. So the backbone of `no-dropout` trains for 15
  more epochs under a new head, without dropout.

With a frozen backbone (`--transfer frozen`) there is nothing to warm up, so `as-printed` is
dropped.
"""

from search_spaces.ranges import Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="article",
    question="What made the article's second model better: dropout, or training for longer?",
    arms=(
        Arm("no-dropout", {"dropout": Fixed(0.0), "backbone_warmup_epochs": Fixed(0)}),
        Arm("dropout", {"dropout": Fixed(0.3), "backbone_warmup_epochs": Fixed(0)}),
        Arm("as-printed", {"dropout": Fixed(0.0), "backbone_warmup_epochs": Fixed(15)}),
    ),
    recipe={
        "head": Fixed("512-256-512-128"),
        "learning_rate": Fixed(1e-3),
        "backbone_lr_ratio": Fixed(1.0),
        "weight_decay": Fixed(0.0),
        "batch_size": Fixed(100),
        "optimizer": Fixed("adam"),
    },
    options={"image_size": 32, "preprocess": "raw", "weights": "keras", "augment": "none"},
)
