"""Does dropout help in the article's own head, under the article's own settings?

    python run_study.py --space article

Nothing is searched, so the study goes straight to the confirmation runs. Head, optimizer, learning
rate and batch size are the article's, as are raw 32-pixel images and Keras weights. The article
names no dropout rate; 0.3 is this project's choice, the middle of the 0 to 0.6 that the space
`dose` covers.
"""

from search_spaces.ranges import Fixed
from search_spaces.space import Arm, Space

SPACE = Space(
    name="article",
    question="Does dropout help in the head and under the settings of the article?",
    arms=(
        Arm("no-dropout", {"dropout": Fixed(0.0)}),
        Arm("dropout", {"dropout": Fixed(0.3)}),
    ),
    recipe={
        "head": Fixed("512-256-512-128"),
        "learning_rate": Fixed(1e-3),
        "weight_decay": Fixed(0.0),
        "batch_size": Fixed(100),
        "optimizer": Fixed("adam"),
    },
    options={"image_size": 32, "preprocess": "raw", "weights": "keras"},
)
