"""scikit-learn's MLPClassifier on cached features.

It supports neither dropout nor decoupled weight decay, so its trials omit them.
"""

import time

import joblib
import numpy as np
from sklearn.neural_network import MLPClassifier

from tests.benchmarks.peers.work import CLASSES, Trial, Work, answer, parser


def main() -> None:
    """Run the trials one after another, or several at once with joblib."""
    options = parser()
    options.add_argument("--jobs", type=int, default=1, help="-1: as many as there are cores")
    given = options.parse_args()
    work: Work = given.work
    train_data, val_data = (
        (work.array(f"{part}_features"), work.array(f"{part}_labels")) for part in ("train", "val")
    )
    start = time.time()
    accuracies = joblib.Parallel(n_jobs=given.jobs)(
        joblib.delayed(train)(trial, work.epochs, train_data, val_data) for trial in work.trials
    )
    answer(accuracies, time.time() - start, ["scikit-learn", "joblib"])


def train(
    trial: Trial,
    epochs: int,
    train_data: tuple[np.ndarray, np.ndarray],
    val_data: tuple[np.ndarray, np.ndarray],
) -> list[float]:
    """Train a head; return the accuracy on val after each epoch."""
    model = MLPClassifier(
        hidden_layer_sizes=trial.widths,
        solver="adam",
        alpha=0.0,
        batch_size=trial.batch_size,
        learning_rate_init=trial.learning_rate,
        random_state=trial.seed,
    )
    accuracies = []
    for _ in range(epochs):
        model.partial_fit(*train_data, classes=np.arange(CLASSES))
        accuracies.append(float(model.score(*val_data)))
    return accuracies


if __name__ == "__main__":
    main()
