"""Overhead of the driver per trial, from the first trial to the ten thousandth.

    python -m tests.benchmarks.scale [--trials 1000] [--seconds 0.5] [--at-once 16] [--nodes 4]

Trials only sleep and report, so that only the driver takes time. The project's own search (two
arms, TPE, ASHA brackets, optuna.db, epochs.jsonl) and stock Ray Tune (random search, no scheduler)
run the same number of the same sleeping trials, one after the other on one simulated cluster, with
the same number at once, both with `reuse_actors=True`. `--sides ours` omits stock.

Prints a line per bin of trials, in the order in which they ended: the overhead per trial, which is
the wall-clock time minus its lower bound (sleeping time / trials at once), divided by the number of
trials; and the driver's own CPU time per trial. The first bin includes the start of Ray and its
processes.

Measured with `--trials 5000 --bin 1000`, once (AMD EPYC, 2 cores that others used too, Python
3.11.7, ray 2.60.0, optuna 5.0.0), in ms per trial:

    trials       overhead: stock  ours    driver's CPU time: stock  ours
    0-1000                  36.8  29.8                        19.0  32.0
    1000-2000               39.1  33.5                        24.8  37.1
    2000-3000               44.6  38.7                        33.3  41.9
    3000-4000               52.4  47.4                        38.9  47.3
    4000-5000               51.2  39.3                        41.9  42.7

Ours includes TPE, ASHA and optuna.db, and still grows less: stock Ray Tune iterates over all trials
at every step to find a waiting one, which `ArmScheduler.choose_trial_to_run` avoids. Without that,
in one run of 10,000 trials, ours went from 57.1 (first 1,000) to 81.8 (last 1,000), stock from 38.1
to 65.6; the CPU time from 34.5 to 64.4, and from 19.7 to 60.1. The remaining growth is within Ray,
in code common to both. With an idle disk and idle cores all numbers are smaller: over the first
1,000 trials of another run stock took 1.9 to 5.3, ours (without it) 7.7 to 13.2.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import platform
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import optuna
import ray
from ray import tune
from ray.cluster_utils import Cluster

from analysis.rundir import EpochRow
from analysis.rundir.optuna_db import open_storage
from search_spaces import Choice, Fixed, Float, Range, find_space
from study.cluster.resources import Resources
from study.runs.context import RunContext
from study.runs.worker import RunSettings
from study.screen import Screen
from study.search.searcher import _distributions, open_study, run_id
from study.search.tune import run_search
from study.study import Study
from study.system.hardware import cpu_count
from tests.benchmarks.sleeping import SleepSettings, sleep_and_report
from tests.support.tiny_study import make_study

SPACE = find_space("dropout")

#: Worker name of made-up trials.
NOBODY = "nobody"


@dataclass(frozen=True)
class Ended:
    """An ended trial."""

    begun: float
    """Start in Unix seconds, as is the end."""
    when: float
    epochs: int
    process: str


@dataclass
class CpuClock:
    """CPU time of this process, sampled twice a second."""

    times: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Record the CPU time used so far."""
        self.times.append(time.time())
        self.used.append(time.process_time())

    def at(self, moment: float) -> float:
        """Return the CPU time used up to a moment."""
        return float(np.interp(moment, self.times, self.used))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.5, help="that an epoch sleeps")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--bin", type=int, default=500)
    parser.add_argument(
        "--already", type=int, default=0, help="made-up trials in our run directory"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with tempfile.TemporaryDirectory() as folder, cluster(options):
        for side in options.sides:
            gc.collect()
            # Pending writes must not slow down the next side.
            os.sync()
            with watch_cpu() as clock:
                ended = SIDES[side](Path(folder), options)
            print_curve(side, sorted(ended, key=lambda trial: trial.when), clock, options)
    print_context(options)


@contextmanager
def cluster(options: argparse.Namespace) -> Iterator[None]:
    """Start a simulated cluster with one CPU for each trial at once."""
    cpus = -(-options.at_once // options.nodes)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        for _ in range(options.nodes - 1):
            nodes.add_node(num_cpus=cpus)
        ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextmanager
def watch_cpu() -> Iterator[CpuClock]:
    """Sample this process's CPU time while a block runs."""
    clock, done = CpuClock(), threading.Event()

    def follow() -> None:
        while not done.wait(0.5):
            clock.look()

    clock.look()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield clock
    finally:
        done.set()
        thread.join()
        clock.look()


def run_ours(folder: Path, options: argparse.Namespace) -> list[Ended]:
    """Run the project's search; return its trials."""
    trials = options.already + options.trials
    study = make_study(folder, trials=trials, epochs=options.epochs, space=SPACE.name)
    make_up_trials(study, options.already)
    settings = cast(RunSettings, SleepSettings(options.epochs, options.seconds))
    resources = Resources(1, 0.0, options.at_once)
    with (
        patch("study.search.tune.run_trial", sleep_and_report),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run_search(study, RunContext(ray.put(cast(Any, None)), settings, resources, Screen()))
    ended = study.rundir.read_trials()
    assert len(ended) == options.already + options.trials
    assert all(trial.state in ("completed", "pruned") for trial in ended)
    first: dict[str, EpochRow] = {}
    last: dict[str, EpochRow] = {}
    for row in study.rundir.read_epochs():
        if row.worker != NOBODY:
            first.setdefault(row.run_id, row)
            last[row.run_id] = row
    return [Ended(first[run].start, row.end, row.epoch, row.worker) for run, row in last.items()]


def run_stock(folder: Path, options: argparse.Namespace) -> list[Ended]:
    """Run stock Ray Tune with random search; return its trials."""
    settings = SleepSettings(options.epochs, options.seconds)
    trainable = tune.with_parameters(sleep_and_report, settings=settings)
    values = {name: stock_range(values) for name, values in SPACE.ranges(SPACE.arms[1]).items()}
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"hyperparameters": values, "seed": tune.randint(0, 2**31)},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=options.trials,
            max_concurrent_trials=options.at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="stock", storage_path=str(folder / "stock"), verbose=0),
    ).fit()
    assert len(results) == options.trials
    last = [results[index].metrics or {} for index in range(len(results))]
    return [
        Ended(row["begun"], row["end"], row["epoch"], f"{row['node_ip']}:{row['pid']}")
        for row in last
    ]


def make_up_trials(study: Study, count: int) -> None:
    """Write `count` made-up trials to the run directory."""
    luck, rows = random.Random(0), []
    storage = open_storage(study.rundir.optuna_db)
    for index, arm in enumerate(SPACE.arms):
        ot_study = open_study(storage, arm.name, study.mode)
        ranges = _distributions(SPACE.ranges(arm))
        sampler = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=index))
        for number in range(count // len(SPACE.arms)):
            score = luck.random()
            rows.append(
                EpochRow(
                    phase="search",
                    run_id=run_id(arm.name, number),
                    attempt=1,
                    arm=arm.name,
                    seed=number,
                    epoch=study.config.epochs,
                    train_loss=1 - score,
                    train_accuracy=score,
                    val_loss=1 - score,
                    val_accuracy=score,
                    score=score,
                    rung="continue",
                    start=0.0,
                    end=1.0,
                    worker=NOBODY,
                )
            )
            ot_study.add_trial(
                optuna.trial.create_trial(
                    value=score,
                    params=sampler.ask(ranges).params,
                    distributions=ranges,
                    user_attrs={"attempts": 1, "state": "completed"},
                    intermediate_values={study.config.epochs: score},
                )
            )
    study.rundir.append_epochs(rows)


def stock_range(values: Range) -> Any:
    """Convert a range to a Ray Tune domain."""
    match values:
        case Float(low, high, log):
            return tune.loguniform(low, high) if log else tune.uniform(low, high)
        case Choice(choices):
            return tune.choice(list(choices))
        case Fixed(value):
            return value


SIDES = {"stock": run_stock, "ours": run_ours}


def print_curve(
    side: str, trials: list[Ended], clock: CpuClock, options: argparse.Namespace
) -> None:
    """Print a line per bin."""
    start, end = min(trial.begun for trial in trials), trials[-1].when
    least = sum(map(slept(options), trials))
    processes = len({trial.process for trial in trials})
    print(
        f"{side}: {len(trials)} trials in {end - start:.0f} s, {least:.0f} s of them sleep, in"
        f" {processes} processes; {start - clock.times[0]:.0f} s before the first,"
        f" {clock.times[-1] - end:.0f} s after the last"
    )
    print(f"{'trials':>13}  {'overhead, ms/trial':>18}  {'driver CPU, ms/trial':>20}")
    for first in range(0, len(trials), options.bin):
        part = trials[first : first + options.bin]
        begun = trials[first - 1].when if first else start
        overhead = part[-1].when - begun - sum(map(slept(options), part))
        cpu = clock.at(part[-1].when) - clock.at(begun)
        name = f"{first}-{first + len(part)}"
        print(f"{name:>13}  {ms(overhead / len(part)):>18}  {ms(cpu / len(part)):>20}", flush=True)


def slept(options: argparse.Namespace) -> Callable[[Ended], float]:
    """Return a function of the least wall-clock seconds that a trial adds."""
    return lambda trial: trial.epochs * options.seconds / options.at_once


def ms(seconds: float) -> str:
    """Format seconds as milliseconds."""
    return f"{1000 * seconds:.1f}"


def print_context(options: argparse.Namespace) -> None:
    """Print machine, versions and options."""
    print(
        json.dumps(
            {
                **vars(options),
                "cores": cpu_count(),
                "load before the end": os.getloadavg(),
                "machine": platform.machine(),
                "versions": {
                    "python": platform.python_version(),
                    **{name: version(name) for name in ("ray", "optuna")},
                },
            }
        )
    )


if __name__ == "__main__":
    main()
