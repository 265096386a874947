"""Does dropout in the head help when all layers train?

    python run_study.py --transfer finetune --trials 40

The default for fine-tuning. The backbone has its own learning rate, a multiple of the head's: one
that suits a new head would wreck a pretrained backbone. As in `dropout`, both arms search the same
recipe with the same number of trials.
"""

from search_spaces.parameters import typical
from search_spaces.ranges import Choice, Fixed, Float
from search_spaces.space import Arm, Space

SPACE = Space(
    name="finetune",
    question="Does dropout in the head help when all layers train?",
    arms=(
        Arm("no-dropout", {"dropout": Fixed(0.0)}),
        Arm("dropout", typical("dropout")),
    ),
    recipe={
        "head": Choice(("512-256-512-128", "512", "1024", "512-256")),
        "learning_rate": Float(1e-4, 3e-3, log=True),
        **typical("backbone_lr_ratio", "weight_decay"),
        "batch_size": Choice((64, 128, 256)),
        **typical("label_smoothing", "lr_warmup_epochs", "lr_schedule", "frozen_layers"),
        **typical("optimizer"),
    },
    options={"transfer": "finetune"},
)
