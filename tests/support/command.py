"""Run the real command in a subprocess."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import optuna

from analysis.rundir import RunDir
from tests.support import ROOT

SMALL = "--images 3000 --image-size 32 --transfer frozen"


def command(options: str, rundir: Path | None = None) -> list[str]:
    """Return the command line with these options and this run directory."""
    place = ["--storage", str(rundir.parent), "--name", rundir.name] if rundir else []
    return [sys.executable, str(ROOT / "run_study.py"), *options.split(), *place]


def run_module(module: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE WORDS...`."""
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False
    )


def run(options: str, rundir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(options, rundir),
        capture_output=True,
        text=True,
        timeout=3000,
        cwd=ROOT,
        check=False,
    )


def start(options: str, rundir: Path) -> subprocess.Popen[bytes]:
    """Start the command; it receives Ctrl-C even if the tests run in the background."""
    return subprocess.Popen(
        command(options, rundir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


ARMS = ("no-dropout", "dropout")

#: Options of the study behind the `finished` fixture.
STUDY = "--trials 7 --epochs 4 --seeds 2"


@dataclass(frozen=True)
class Finished:
    rundir: RunDir
    output: str


def optuna_trials(rundir: RunDir, arm: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=arm, storage=f"sqlite:///{rundir.optuna_db}").trials
