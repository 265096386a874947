"""Overhead of Ray Tune, Optuna and bookkeeping in the search phase.

    python -m tests.benchmarks.search_overhead [--trials 12] [--repeats 3] [--images 60000]

Each repeat runs a real search (default space, real features), then exactly the same epochs of the
same trials in a bare loop: one process per core that only calls the training loop. Prints the ratio
of the two wall-clock times, pair by pair. Both are timed from the first epoch's start to the last
epoch's end, so process starts and imports of torch, which happen once per study, do not count. The
time of the whole search phase, including process starts, is also printed.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

import ray
import torch

from analysis.rundir import TrialRow
from study.cluster.resources import plan_resources
from study.cluster.session import find_machines, ray_session
from study.config import StudyConfig
from study.data.load import load_dataset
from study.data.split import make_split
from study.features.extract import load_features
from study.inputs import choose_preprocess
from study.models.weights import load_weights
from study.runs.context import RunContext, run_settings
from study.screen import Screen
from study.search.tune import run_search
from study.study import resolve_study
from study.system.hardware import cpu_count
from study.training.data import TrainingArrays, TrainingData
from study.training.loop import train
from study.training.prepare import prepare_features

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Repeat:
    """One pair of timings, in seconds."""

    search: float
    whole_phase: float
    bare: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--image-size", type=int, default=96)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        config = StudyConfig(
            trials=options.trials,
            images=options.images,
            image_size=options.image_size,
            transfer="frozen",
            storage=folder,
            name="warm-up",
        )
        study = resolve_study(config)
        dataset = load_dataset("cifar10", options.images)
        weights = load_weights(study.weights)
        features = load_features(
            dataset, weights, choose_preprocess(weights, study.config.preprocess, study.image_size)
        )
        arrays = prepare_features(dataset, make_split(dataset), features)[0].training
        repeats = []
        for number in range(options.repeats):
            config = StudyConfig(
                trials=options.trials, storage=folder, name=f"r{number}", seed=number
            )
            repeats.append(measure(config, arrays))
            print(repeats[-1], flush=True)
    report(repeats, options)


def measure(config: StudyConfig, arrays: TrainingArrays) -> Repeat:
    """Time a search, then its epochs in a bare loop."""
    study = resolve_study(config)
    with ray_session(config.address):
        start = time.monotonic()
        study.rundir.path.mkdir()
        resources = plan_resources(study.config, find_machines(config.address))
        settings = run_settings(study, resources)
        run_search(study, RunContext(ray.put(arrays), settings, resources, Screen()))
        whole = time.monotonic() - start
    rows = study.rundir.read_epochs()
    searching = max(row.end for row in rows) - min(row.start for row in rows)

    trials = study.rundir.read_trials()
    context = multiprocessing.get_context("fork")
    with context.Pool(cpu_count(), initializer=warm_up, initargs=(arrays.to(CPU),)) as pool:
        spans = pool.map(train_bare, trials, chunksize=1)
    bare = max(end for _, end in spans) - min(start for start, _ in spans)
    return Repeat(searching, whole, bare)


DATA: list[TrainingData] = []


def warm_up(data: TrainingData) -> None:
    """Prepare a process of the bare loop: one thread, and the optimizer's lazy imports done."""
    torch.set_num_threads(1)
    DATA.append(data)
    layer = torch.nn.Linear(1, 1)
    layer(torch.zeros(1, 1)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def train_bare(trial: TrialRow) -> tuple[float, float]:
    """Train a trial for its epochs in the search; return start and end in Unix seconds."""
    start = time.time()
    train(
        trial.hyperparameters, DATA[0], seed=trial.seed, epochs=trial.epochs, metric="val_accuracy"
    )
    return start, time.time()


def report(repeats: list[Repeat], options: argparse.Namespace) -> None:
    """Print the ratios, and the machine they were measured on."""
    ratios = [repeat.search / repeat.bare for repeat in repeats]
    whole = [repeat.whole_phase / repeat.bare for repeat in repeats]
    print(
        json.dumps(
            {
                "search / bare loop (median, min, max)": [median(ratios), min(ratios), max(ratios)],
                "whole phase / bare loop": [median(whole), min(whole), max(whole)],
                "n": len(repeats),
                "trials": options.trials,
                "images": options.images,
                "cores": cpu_count(),
                "machine": platform.machine(),
                "versions": {name: version(name) for name in ("ray", "torch", "optuna")},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
