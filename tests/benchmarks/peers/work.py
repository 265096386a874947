"""The work given to every contender, and its answer.

Contenders run in separate environments, so this module needs only numpy.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

CLASSES = 10


@dataclass(frozen=True)
class Trial:
    """The hyperparameters of a trial and its seed; the optimizer is AdamW."""

    head: str
    """Widths of the hidden layers, such as "512-256"."""
    dropout: float
    learning_rate: float
    weight_decay: float
    batch_size: int
    seed: int = 0

    @property
    def widths(self) -> list[int]:
        """Widths of the hidden layers."""
        return [int(width) for width in self.head.split("-")]


#: The trials: various heads, dropout rates from 0 to the largest, all batch sizes.
TRIALS = (
    Trial("512", 0.0, 5e-4, 1e-2, 128),
    Trial("1024", 0.3, 1e-3, 1e-4, 256),
    Trial("512-256", 0.5, 1e-3, 1e-2, 64),
    Trial("1024-512", 0.2, 3e-4, 1e-3, 128),
    Trial("256", 0.0, 2e-3, 1e-5, 256),
    Trial("2048-512", 0.4, 5e-4, 1e-2, 256),
    Trial("512-256-512-128", 0.1, 5e-4, 1e-3, 128),
    Trial("1024", 0.6, 1e-3, 5e-2, 64),
)


def choose_trials(count: int) -> tuple[Trial, ...]:
    """Return `count` trials, each with its own seed; the sets repeat after the last one."""
    sets = (asdict(TRIALS[seed % len(TRIALS)]) for seed in range(count))
    return tuple(Trial(**{**values, "seed": seed}) for seed, values in enumerate(sets))


@dataclass(frozen=True)
class Work:
    """Trials and their training data."""

    trials: tuple[Trial, ...]
    epochs: int
    images: int
    """Images of CIFAR-10 in total."""
    image_size: int
    """Side of the backbone's input in pixels."""
    folder: str
    """Folder of arrays, for `part` in train and val: {part}_features.npy, standardized, float32
    [n, 2048]; {part}_labels.npy, int64 [n]; {part}_images.npy, uint8 [n, 32, 32, 3]. Also mean.npy
    and std.npy, float32 [2048], which standardize features."""

    def array(self, name: str) -> np.ndarray:
        """Load one of the arrays."""
        found: np.ndarray = np.load(Path(self.folder) / f"{name}.npy")
        return found

    @property
    def path(self) -> Path:
        """File in the folder with everything but the arrays."""
        return Path(self.folder) / "work.json"

    def write(self) -> None:
        """Write everything but the arrays to `path`."""
        self.path.write_text(json.dumps(asdict(self)))


def read_work(path: str) -> Work:
    """Read a file written by `Work.write`."""
    content = json.loads(Path(path).read_text())
    return Work(**{**content, "trials": tuple(Trial(**trial) for trial in content["trials"])})


def parser() -> argparse.ArgumentParser:
    """Return the parser of a contender's command line: the file of the work."""
    options = argparse.ArgumentParser()
    options.add_argument("work", type=read_work)
    return options


@dataclass(frozen=True)
class Answer:
    """Results of a contender."""

    val_accuracies: tuple[tuple[float, ...], ...]
    """Accuracy on val, in [0, 1], per trial and epoch."""
    training: float
    """Seconds from the start of the first trial to the end of the last one."""
    versions: str
    """Versions of the packages used."""


def answer(
    val_accuracies: Sequence[Sequence[float]], training: float, packages: Sequence[str]
) -> None:
    """Print the answer on a separate line."""
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in packages)
    accuracies = tuple(tuple(map(float, epochs)) for epochs in val_accuracies)
    print(f"\n{json.dumps(asdict(Answer(accuracies, training, versions)))}", flush=True)


def read_answer(output: str) -> Answer:
    """Find the answer in the output of a contender and its libraries."""
    (line,) = (line for line in output.splitlines() if line.startswith('{"val_accuracies"'))
    content = json.loads(line)
    return Answer(**{**content, "val_accuracies": tuple(map(tuple, content["val_accuracies"]))})
