"""Kill studies at random moments, and check that they end as if uninterrupted.

    python -m tests.support.crash --kills 100 --seed 1

Each study is the real command on 3,000 real images, restarted with `--resume` after each kill. It
is killed a few times, each time after a random delay, by SIGKILL, SIGTERM or Ctrl-C, and then left
to finish. Its run directory must pass `check_ended`, and its runs must have the same results as
when they are trained without an interruption.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import optuna
import torch

from analysis.rundir import ConfirmRow, RunDir, TrialRow
from study.data.load import load_dataset
from study.data.split import make_split
from study.export.bundle import load
from study.features.extract import load_features
from study.inputs import choose_preprocess
from study.models.weights import load_weights
from study.search.searcher import state_of
from study.study import parse_config, resolve_study
from study.training.data import TrainingData
from study.training.loop import EpochMetrics, train
from study.training.prepare import prepare_features
from tests.support import ROOT
from tests.support.tiny_study import one_thread

TRIALS, EPOCHS, SEEDS = 8, 6, 2
ARMS = ("no-dropout", "dropout")

OPTIONS = (
    f"--trials {TRIALS} --epochs {EPOCHS} --seeds {SEEDS} --images 3000 --image-size 32"
    " --transfer frozen"
)

#: Latest kill, in seconds after a start; about as long as an uninterrupted study takes.
LATEST = 30.0

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Kill:
    """A start of a study, and the kill that ended it."""

    after: float
    """Seconds from the start to the kill."""
    signal: signal.Signals
    phase: Literal["start", "search", "confirmation", "export and report", "none: it had ended"]
    status: int
    dying: float
    """Seconds from the signal to the exit of the process."""


def run_killed(
    rundir: RunDir, kills: int, stream: random.Random, latest: float = LATEST
) -> list[Kill]:
    """Run a study to its end, killing it a few times on the way.

    Args:
        rundir: Run directory of the study, not created yet.
        kills: Maximum number of kills; a study that has ended is not killed any more.
        stream: Source of random moments and signals.
        latest: Seconds from a start to the latest kill.
    """
    done: list[Kill] = []
    for _ in range(kills):
        done.append(_kill_once(rundir, stream.uniform(0.5, latest), stream.choice(SIGNALS)))
        if done[-1].phase == "none: it had ended":
            break
    process = _start(rundir)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, f"{stdout.decode()[-2000:]}\n{stderr.decode()}"
    return done


def _kill_once(rundir: RunDir, after: float, number: signal.Signals) -> Kill:
    process = _start(rundir)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        phase = _phase(rundir)
        process.send_signal(number)
        start = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
        dying = time.monotonic() - start
        expected = -number if number == signal.SIGKILL else 128 + number
        # Once the report is written, it may end by itself before the signal arrives.
        ends = (expected, 0) if phase == "export and report" else (expected,)
        output = stdout.decode() + stderr.decode()
        assert process.returncode in ends, f"{process.returncode}\n{output}"
        return Kill(after, number, phase, process.returncode, dying)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, f"{stdout.decode()}\n{stderr.decode()}"
    return Kill(after, number, "none: it had ended", 0, 0.0)


def _start(rundir: RunDir) -> "subprocess.Popen[bytes]":
    place = ["--storage", str(rundir.path.parent), "--name", rundir.path.name]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_study.py"), "--resume", *OPTIONS.split(), *place],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _phase(rundir: RunDir) -> Literal["start", "search", "confirmation", "export and report"]:
    if rundir.confirm.exists():
        return "export and report"
    if rundir.trials.exists():
        return "confirmation"
    return "search" if rundir.optuna_db.exists() else "start"


def check_ended(rundir: RunDir) -> None:
    """Check that a study has ended like one that was never interrupted."""
    trials = rundir.read_trials()
    numbers = {arm: [row.run_id for row in trials if row.arm == arm] for arm in ARMS}
    expected = {arm: [f"{arm}-{i:03d}" for i in range(TRIALS // 2)] for arm in ARMS}
    assert numbers == expected, "a trial was lost or ran twice"
    assert {row.state for row in trials} <= {"completed", "pruned"}
    assert len({json.dumps(dict(row.hyperparameters)) for row in trials}) == TRIALS

    rows = rundir.read_epochs()
    for trial in trials:
        epochs = [row for row in rows if row.run_id == trial.run_id]
        assert [row.epoch for row in epochs] == list(range(1, trial.epochs + 1))
        full = trial.state == "completed"
        assert trial.epochs == (EPOCHS if full else 3)
        rung = {row.epoch: row.rung for row in epochs if row.rung}
        assert rung == {3: "continue" if full else "stop"}
    for arm in ARMS:
        ot_study = optuna.load_study(study_name=arm, storage=f"sqlite:///{rundir.optuna_db}")
        for ot_trial, trial in zip(
            ot_study.trials, [row for row in trials if row.arm == arm], strict=True
        ):
            assert state_of(ot_trial) == trial.state
            scores = {row.epoch: row.score for row in rows if row.run_id == trial.run_id}
            assert ot_trial.intermediate_values == scores

    confirmed = rundir.read_confirm()
    assert Counter((row.recipe, row.setting) for row in confirmed) == {
        (a, b): SEEDS for a in ARMS for b in ARMS
    }
    assert sorted(map(str, confirmed)) == sorted(map(str, rundir.read_confirmations()))
    for run in confirmed:
        epochs = [row for row in rows if row.run_id == run.run_id]
        assert [row.epoch for row in epochs] == list(range(1, EPOCHS + 1))
    epochs_of_trials = sum(row.epochs for row in trials)
    assert len(rows) == epochs_of_trials + sum(row.epochs for row in confirmed)

    full_trials = sorted((r for r in trials if r.state == "completed"), key=lambda r: -r.score)
    kept = {row.run_id for row in confirmed}
    kept |= {r.run_id for arm in ARMS for r in [r for r in full_trials if r.arm == arm][:3]}
    assert {file.stem for file in rundir.weights("any").parent.iterdir()} == kept
    assert list(rundir.state("any").parent.iterdir()) == [], "a checkpoint was left behind"
    assert not list(rundir.path.rglob("*.part")), "a partial file was left behind"
    assert json.loads(rundir.verdict.read_text())["look"] == 1
    assert (rundir.report / "index.html").stat().st_size > 10_000
    load(rundir.best_model)


def check_results(rundir: RunDir, *, runs: int) -> None:
    """Check that runs have the same results, bit for bit, as training without an interruption.

    Args:
        rundir: Run directory of a study that has ended.
        runs: Number of runs to retrain; those with the most attempts come first.
    """
    rows = rundir.read_epochs()
    attempts = {row.run_id: row.attempt for row in rows}
    runs_of_both: list[TrialRow | ConfirmRow] = [*rundir.read_trials(), *rundir.read_confirm()]
    known = {row.run_id: row for row in runs_of_both}
    chosen = sorted(known, key=lambda run_id: attempts[run_id], reverse=True)[:runs]
    for run_id in chosen:
        with one_thread():
            again = train(
                known[run_id].hyperparameters,
                training_data(),
                seed=known[run_id].seed,
                epochs=known[run_id].epochs,
                metric="val_accuracy",
            )
        stored = [asdict(row) for row in rows if row.run_id == run_id]
        for epoch, row in zip(again.epochs, stored, strict=True):
            assert outcome(epoch) == {name: row[name] for name in outcome(epoch)}, run_id


def outcome(epoch: EpochMetrics) -> dict[str, float]:
    names = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "score")
    return {name: getattr(epoch, name) for name in names}


@lru_cache(maxsize=1)
def training_data() -> TrainingData:
    """Return the data that the study's trials train on."""
    study = resolve_study(parse_config(OPTIONS.split()))
    dataset = load_dataset("cifar10", study.config.images)
    weights = load_weights(study.weights)
    features = load_features(
        dataset, weights, choose_preprocess(weights, study.config.preprocess, study.image_size)
    )
    prepared, _ = prepare_features(dataset, make_split(dataset), features)
    return prepared.training.to(torch.device("cpu"))


def trained_twice(rundir: RunDir) -> int:
    """Return how many epochs of trials were trained more than once."""
    lines = map(json.loads, rundir.epochs.read_text().splitlines())
    written = Counter((row["run_id"], row["epoch"]) for row in lines if row["phase"] == "search")
    return sum(written.values()) - len(written)


def main() -> None:
    """Kill and check studies, and print a line per kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-study", type=int, default=5)
    parser.add_argument("--latest", type=float, default=LATEST, help="latest kill, in s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stream = random.Random(options.seed)
    phases: Counter[str] = Counter()
    slowest, studies, again, left = 0.0, 0, 0, options.kills
    print(f"run_study.py {OPTIONS}\nkills up to {options.latest:g} s after a start", flush=True)
    while left > 0:
        folder = Path(tempfile.mkdtemp())
        rundir = RunDir(folder / "killed")
        studies += 1
        done = run_killed(rundir, min(left, options.per_study), stream, options.latest)
        hits = [kill for kill in done if kill.phase != "none: it had ended"]
        for kill in hits:
            phases[kill.phase] += 1
            print(
                f"study {studies:3}  {kill.signal.name:7}  after {kill.after:4.1f} s  in:"
                f" {kill.phase:17}  ended within {kill.dying:.1f} s",
                flush=True,
            )
            if kill.signal != signal.SIGKILL:
                slowest = max(slowest, kill.dying)
        check_ended(rundir)
        check_results(rundir, runs=4)
        redone = trained_twice(rundir)
        print(f"study {studies:3}  ended as it should; epochs trained twice: {redone}", flush=True)
        left, again = left - len(hits), again + redone
        shutil.rmtree(folder)
    where = ", ".join(f"{number} in {phase}" for phase, number in phases.items())
    print(
        f"{options.kills} kills in {studies} studies ({where}): every study ended as it should."
        f" Epochs of trials trained twice: {again}. Slowest end after SIGTERM or Ctrl-C:"
        f" {slowest:.1f} s."
    )


if __name__ == "__main__":
    main()
