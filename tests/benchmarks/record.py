"""Train many hyperparameter sets in full, once each, for tests/benchmarks/search_quality.py.

    python -m tests.benchmarks.record FILE.csv [--seed 1] [--sets 400] [--seconds 600]

Each arm of the space `dropout` gets the same number of sets, drawn at random from the ranges. Each
set is one run of the study's own training loop on cached features, 15 epochs without early
stopping; its curves on `val` are one row of the file. When the time is up, the rows of the finished
sets are written.

A GPU is shared by several processes; on a CPU there is one process per core.

The committed recorded.csv is the concatenation of two such files, both cut short by the time limit:
`--seed 1` (213 sets) and `--seed 2` (168 sets). All of CIFAR-10 (45,000 images in train, 5,000 in
val) at 96 px, frozen ResNet50 with Keras' ImageNet weights, whose kernels had been rounded to bf16;
one NVIDIA H200, torch 2.11. Kernels that round differently change the last digits of a curve.
"""

import argparse
import contextlib
import csv
import math
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch

from search_spaces import Space, Value, find_space
from study.config import StudyConfig
from study.data.load import load_dataset
from study.data.split import make_split
from study.features.extract import load_features
from study.models.weights import load_weights
from study.search.searcher import _distributions
from study.seeds import derive_seed
from study.system.hardware import cpu_count
from study.training.data import TrainingData
from study.training.loop import NonFiniteLossError, train
from study.training.prepare import prepare_features

SPACE = "dropout"
EPOCHS = StudyConfig.epochs


@dataclass(frozen=True)
class Job:
    """One set to train."""

    arm: str
    number: int
    values: Mapping[str, Value]
    seed: int
    """Seed of the run."""


def draw(space: Space, sets: int, seed: int) -> Iterator[Job]:
    """Draw sets at random, alternating arms, so that a file cut short is balanced."""
    drawn = {}
    for arm in space.arms:
        sampler = optuna.samplers.RandomSampler(seed=derive_seed(seed, "record", arm.name))
        drawn[arm.name] = optuna.create_study(sampler=sampler)
    for number in range(sets):
        for arm in space.arms:
            asked = drawn[arm.name].ask(_distributions(space.ranges(arm)))
            values = {**space.fixed_values(arm), **asked.params}
            yield Job(arm.name, number, values, derive_seed(seed, "run", arm.name, number))


DATA: list[TrainingData] = []


def begin(file: str, device: str) -> None:
    """Initialize a worker process."""
    torch.set_num_threads(1)
    DATA.append(pickle.loads(Path(file).read_bytes()).to(torch.device(device)))


def run(job: Job) -> tuple[Job, list[tuple[float, float]]]:
    """Return the job, and accuracy and loss on val per epoch; fewer epochs if it diverges."""
    curve: list[tuple[float, float]] = []
    with contextlib.suppress(NonFiniteLossError):
        train(
            job.values,
            DATA[0],
            seed=job.seed,
            epochs=EPOCHS,
            metric="val_accuracy",
            report=lambda e: curve.append((e.val_accuracy, e.val_loss)),
        )
    return job, curve


def record(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train until all sets are done or the time is up; return one row per set."""
    until = time.monotonic() + options.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, weights = load_dataset(options.data, options.images), load_weights(options.weights)
    preprocess = replace(weights.preprocess, image_size=options.image_size)
    features = load_features(dataset, weights, preprocess)
    print(f"features: {features.seconds:.0f} s", flush=True)
    jobs = list(draw(find_space(SPACE), options.sets, options.seed))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.pickle"
        split = make_split(dataset)
        file.write_bytes(pickle.dumps(prepare_features(dataset, split, features)[0].training))
        with context.Pool(options.processes, begin, (str(file), device)) as pool:
            found = pool.imap_unordered(run, jobs)
            for number in range(len(jobs)):
                try:
                    job, curve = found.next(timeout=max(0.1, until - time.monotonic()))
                except multiprocessing.TimeoutError:
                    print(f"time is up: {number} of {len(jobs)} runs are done", flush=True)
                    break
                rows[job.arm, job.number] = _row(job, curve)
            pool.terminate()
    print(f"{len(rows)} sets, {time.monotonic() - until + options.seconds:.0f} s", flush=True)
    return [rows[key] for key in sorted(rows)]


def _row(job: Job, curve: list[tuple[float, float]]) -> dict[str, Any]:
    full = curve + [(math.nan, math.nan)] * (EPOCHS - len(curve))
    values = {
        name: value if isinstance(value, str | int) else f"{value:.6g}"
        for name, value in job.values.items()
    }
    return {
        "arm": job.arm,
        **values,
        **{f"val_accuracy_{epoch}": f"{a:.4f}" for epoch, (a, _) in enumerate(full, start=1)},
        **{f"val_loss_{epoch}": f"{loss:.4f}" for epoch, (_, loss) in enumerate(full, start=1)},
    }


def main() -> None:
    """Train the sets and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sets", type=int, default=400, help="per arm")
    parser.add_argument("--seed", type=int, default=1, help="of the sets and their runs")
    parser.add_argument("--seconds", type=float, default=1e6, help="when to stop")
    parser.add_argument("--images", type=int)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--data", default="cifar10", help="as run_study.py takes it")
    parser.add_argument("--weights", default="auto", help="as run_study.py takes it")
    default = 6 if torch.cuda.is_available() else cpu_count()
    parser.add_argument("--processes", type=int, default=default)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = record(options)
    with options.file.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
