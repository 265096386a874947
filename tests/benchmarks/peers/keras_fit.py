"""Keras on cached features: `model.fit` for each trial."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import time

import keras

from tests.benchmarks.peers.work import CLASSES, Trial, Work, answer, parser


def main() -> None:
    """Run the trials one after another."""
    work: Work = parser().parse_args().work
    train_data, val_data = (
        (work.array(f"{part}_features"), work.array(f"{part}_labels")) for part in ("train", "val")
    )
    start = time.time()
    accuracies = []
    for trial in work.trials:
        keras.utils.clear_session()
        keras.utils.set_random_seed(trial.seed)
        model = build_model(trial, features=train_data[0].shape[1])
        history = model.fit(
            *train_data,
            batch_size=trial.batch_size,
            epochs=work.epochs,
            validation_data=val_data,
            verbose=0,
        )
        accuracies.append(history.history["val_accuracy"])
    answer(accuracies, time.time() - start, ["keras", "tensorflow-cpu"])


def build_model(trial: Trial, features: int) -> keras.Model:
    """Return the compiled head."""
    layers = [keras.layers.Input((features,))]
    for width in trial.widths:
        layers.append(keras.layers.Dense(width, activation="relu"))
        layers.append(keras.layers.Dropout(trial.dropout))
    model = keras.Sequential([*layers, keras.layers.Dense(CLASSES)])
    model.compile(
        optimizer=keras.optimizers.AdamW(trial.learning_rate, weight_decay=trial.weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


if __name__ == "__main__":
    main()
