"""Time of the same trials with this project and with other tools.

    python -m tests.benchmarks.peers [--images 3000] [--image-size 32] [--trials 8] [--epochs 5]
        [--repeats 5] [--repeats-tutorial 1] [--only NAME ...]

All contenders train the same heads with the same hyperparameters for the same epochs on the same
part of CIFAR-10, without early stopping, and measure the accuracy on `val` after each epoch. Those
that start from features get the same standardized numbers. Each contender is a separate process,
timed from start to end, as its user would wait for it; `training` is the time from the start of the
first trial to the end of the last one. Rounds are paired; memory is measured in the first one,
whose times are discarded. The tutorial's approach is so slow that it gets separate rounds,
`--repeats-tutorial` of them, none discarded. Packages that this project does not use are installed
into temporary environments.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch

from study.inputs import load_inputs
from study.study import resolve_study
from tests.benchmarks.paired import Spread, about, in_turn, ratio, show
from tests.benchmarks.peers.ours import study_config
from tests.benchmarks.peers.work import Answer, Work, choose_trials, read_answer
from tests.benchmarks.processes import cache_without_features, watch_memory
from tests.support import ROOT
from tests.support.environments import make_environment


@dataclass(frozen=True)
class Contender:
    """A way to run the trials."""

    module: str
    """Module of this package."""
    meaning: str
    """A phrase that describes it."""
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """Packages of its own environment; if empty, it runs in this one."""
    empty_cache: bool = False
    """Whether it must compute the features, rather than find them in the cache."""


OURS, COMPUTING, TUTORIAL = "ours", "ours-computing", "tutorial"

CONTENDERS = {
    OURS: Contender("ours", "this project's search, features from the cache"),
    COMPUTING: Contender(
        "ours", "this project's search, computing the features first", empty_cache=True
    ),
    TUTORIAL: Contender("tutorial", "Ray Tune, the frozen backbone runs in every epoch"),
    "optuna-1-thread": Contender(
        "optuna_loop", "Optuna and a PyTorch loop in one process, one thread", ("--threads", "1")
    ),
    "optuna": Contender("optuna_loop", "Optuna and a PyTorch loop in one process, all threads"),
    "keras": Contender(
        "keras_fit", "Keras' model.fit on TensorFlow", packages=("keras>=3.10", "tensorflow-cpu")
    ),
    "sklearn": Contender(
        "sklearn_mlp", "scikit-learn's MLP; no dropout, no decay", packages=("scikit-learn",)
    ),
    "sklearn-joblib": Contender(
        "sklearn_mlp",
        "the same MLP, a trial per core with joblib",
        ("--jobs", "-1"),
        ("scikit-learn",),
    ),
}


HEADS = (
    "",
    "seconds",
    "training",
    f"/ {OURS}",
    f"/ {COMPUTING}",
    "memory MB",
    "val % mean",
    "best",
    "runs",
)


@dataclass
class Runner:
    """Runs a contender repeatedly, and keeps its answers."""

    contender: Contender
    python: Path
    work: Work
    answers: list[Answer] = field(default_factory=list)
    memory: int = 0
    """Peak memory of all its processes together in its first run, in bytes."""

    def __call__(self) -> None:
        """Run it once.

        Raises:
            RuntimeError: It failed, or did not train every trial to the end.
        """
        with TemporaryDirectory(dir=self.work.folder) as folder:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            if self.contender.empty_cache:
                environment["XDG_CACHE_HOME"] = str(cache_without_features(Path(folder)))
            module = f"{__package__}.{self.contender.module}"
            output = Path(folder) / "output"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [self.python, "-m", module, self.work.path, *self.contender.arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                if not self.answers:
                    self.memory = watch_memory(process)
                status = process.wait()
            printed = output.read_text(errors="replace")
        if status:
            raise RuntimeError(f"{module} has failed:\n{printed}")
        answer = read_answer(printed)
        done = [len(epochs) for epochs in answer.val_accuracies]
        if done != [self.work.epochs] * len(self.work.trials):
            raise RuntimeError(f"{module} has trained for {done} epochs:\n{printed}")
        self.answers.append(answer)
        print(f"{module}: {answer.training:.1f} s of training", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeats-tutorial", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these, beside ours")
    options = parser.parse_args(arguments)
    print(about())

    wanted = [name for name in CONTENDERS if name in (options.only or CONTENDERS) or name == OURS]
    with TemporaryDirectory() as folder:
        work = prepare(options, Path(folder))
        train, val = (len(work.array(f"{part}_labels")) for part in ("train", "val"))
        print(
            f"{len(work.trials)} trials of {work.epochs} epochs; {train} train and {val} val images"
            f" at {work.image_size} px",
            flush=True,
        )
        runners, missing = find_runners(wanted, work, Path(folder))
        fast = {name: runner for name, runner in runners.items() if name != TUTORIAL}
        seconds = in_turn(fast, options.repeats)
        rows = {name: row(name, runner, seconds) for name, runner in fast.items()}
        if TUTORIAL in runners:
            slow = {n: r for n, r in runners.items() if n in (OURS, COMPUTING, TUTORIAL)}
            seconds = in_turn(slow, options.repeats_tutorial, warm_up=False)
            rows[TUTORIAL] = row(TUTORIAL, slow[TUTORIAL], seconds)
    for name, why in missing.items():
        rows[name] = [name, why, *[""] * (len(HEADS) - 2)]
    print(show(HEADS, [rows[name] for name in wanted]))
    for name in wanted:
        print(f"{name}: {CONTENDERS[name].meaning}{versions_of(runners.get(name))}")


def prepare(options: argparse.Namespace, folder: Path) -> Work:
    """Write the data to files; this also fills the cache of features."""
    trials = choose_trials(options.trials)
    work = Work(trials, options.epochs, options.images, options.image_size, str(folder))
    inputs, prepared = load_inputs(resolve_study(study_config(work, folder)), {}, None)
    split, standardisation = inputs.split, inputs.standardisation
    assert standardisation is not None
    for name, part, rows in (
        ("train", prepared.training.train, split.train),
        ("val", prepared.training.val, split.val),
    ):
        features = part.to(torch.device("cpu")).inputs.float().numpy()
        np.save(folder / f"{name}_features.npy", features)
        np.save(folder / f"{name}_labels.npy", part.labels)
        np.save(folder / f"{name}_images.npy", inputs.dataset.pixels[rows])
    np.save(folder / "mean.npy", standardisation.mean.numpy())
    np.save(folder / "std.npy", standardisation.std.numpy())
    work.write()
    return work


def find_runners(
    names: Sequence[str], work: Work, folder: Path
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Return the runner of each contender, and the reason for each that cannot run."""
    runners, missing = {}, {}
    pythons: dict[tuple[str, ...], Path] = {(): Path(sys.executable)}
    for name in names:
        contender = CONTENDERS[name]
        packages = contender.packages
        try:
            if packages not in pythons:
                pythons[packages] = make_environment(folder / contender.module, *packages)
            runners[name] = Runner(contender, pythons[packages], work)
        except (OSError, subprocess.SubprocessError) as error:
            missing[name] = f"{', '.join(packages)} cannot be installed"
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return runners, missing


def versions_of(runner: Runner | None) -> str:
    """Format the versions that a contender used, in parentheses."""
    return f" ({runner.answers[-1].versions})" if runner else ""


def row(name: str, runner: Runner, seconds: Mapping[str, Spread]) -> list[str]:
    """Return a contender's row of the table."""
    counted = runner.answers[-len(seconds[name].values) :]
    reached = [epochs[-1] for epochs in counted[-1].val_accuracies]
    ratios = [
        ratio(seconds[name], seconds[base]).shown() if base in seconds else ""
        for base in (OURS, COMPUTING)
    ]
    return [
        name,
        seconds[name].shown(1),
        Spread(tuple(answer.training for answer in counted)).shown(1),
        *ratios,
        f"{runner.memory / 1e6:,.0f}",
        f"{100 * fmean(reached):.2f}",
        f"{100 * max(reached):.2f}",
        str(len(counted)),
    ]


if __name__ == "__main__":
    main()
