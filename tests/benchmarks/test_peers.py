"""The benchmark against other tools: each contender trains every trial, in one tiny round.

Most contenders run only with `pytest -m full tests/benchmarks/test_peers.py`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.peers import __main__ as peers
from tests.benchmarks.peers.__main__ import COMPUTING, CONTENDERS, OURS, TUTORIAL, Runner
from tests.benchmarks.peers.work import TRIALS, Answer, Work, choose_trials, read_work

PYTHON = Path(sys.executable)
TRIALS_WANTED = 2
TINY = argparse.Namespace(images=200, image_size=32, trials=TRIALS_WANTED, epochs=1)
#: Takes too long to install for a test.
LEFT_OUT = "keras"
QUICK = (OURS, "optuna-1-thread")
NAMES = [name for name in CONTENDERS if name != LEFT_OUT]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return peers.prepare(TINY, tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def runners(work: Work, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runner]:
    found, missing = peers.find_runners(NAMES, work, tmp_path_factory.mktemp("environments"))
    assert missing == {}
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.integration if name in QUICK else pytest.mark.full)
        for name in NAMES
    ],
)
def test_contender_trains_every_trial_to_the_end(
    runners: dict[str, Runner], work: Work, name: str
) -> None:
    runners[name]()
    (answer,) = runners[name].answers
    assert [len(epochs) for epochs in answer.val_accuracies] == [work.epochs] * TRIALS_WANTED
    assert all(0 <= accuracy <= 1 for epochs in answer.val_accuracies for accuracy in epochs)
    assert answer.training > 0
    assert runners[name].memory > 50e6


def test_work_round_trips(work: Work) -> None:
    assert read_work(str(work.path)) == work


def test_trials_repeat_with_other_seeds() -> None:
    trials = choose_trials(len(TRIALS) + 1)
    assert [trial.seed for trial in trials] == list(range(len(trials)))
    assert (trials[-1].head, trials[-1].dropout) == (trials[0].head, trials[0].dropout)


def test_table_has_a_row_for_each_contender(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Path:
        raise subprocess.CalledProcessError(1, "uv")

    def answer(runner: Runner) -> None:
        runner.answers.append(Answer(((0.25,), (0.75,)), 1.0, "numpy 2"))

    monkeypatch.setattr(peers, "make_environment", fail)
    monkeypatch.setattr(Runner, "__call__", answer)
    peers.main(["--images=200", "--trials=2", "--epochs=1", "--repeats=2"])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table[2:]}
    assert list(rows) == list(CONTENDERS)
    assert rows["keras"][0] == "keras>=3.10, tensorflow-cpu cannot be installed"
    assert rows[OURS][2] == "1.00 (1.00 to 1.00)"
    assert {row[-3:-1] == ["50.00", "75.00"] for row in rows.values() if row[-1]} == {True}
    runs = {name: row[-1] for name, row in rows.items() if row[-1]}
    assert runs == {OURS: "2", COMPUTING: "2", "optuna-1-thread": "2", "optuna": "2", TUTORIAL: "1"}


def test_failed_contender_reports_the_reason(work: Work) -> None:
    runner = Runner(peers.Contender("optuna_loop", "", ("--no-such-option",)), PYTHON, work)
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"):
        runner()
