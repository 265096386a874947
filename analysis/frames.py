"""The run directory as pandas frames: what every table and figure starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd

from analysis.rundir import ConfirmRow, EpochRow, PhaseRow, RunDir, RunDirError, TrialRow
from analysis.rundir.metric import mode
from analysis.words import count

Row = TypeVar("Row")

#: Whether settings are compared by confirmation runs, or for want of them by the champions.
Evidence = Literal["confirmation", "champions"]


@dataclass(frozen=True)
class StudyFrames:
    """What a study has written so far; columns as `analysis.rundir` describes them.

    Attributes:
        path: The run directory.
        record: study.json.
        epochs: A row per epoch of every run, its last attempt.
        trials: A row per trial; empty before the search has ended.
        confirm: A row per confirmation run; empty before all have ended.
        hyperparameters: Names of the hyperparameters among the columns of trials and confirm.
        problems: What could not be read, or is not there yet; a sentence each.
        phases: A row per phase of each start; empty where that is not written down.
    """

    path: Path
    record: dict[str, Any]
    epochs: pd.DataFrame
    trials: pd.DataFrame
    confirm: pd.DataFrame
    hyperparameters: tuple[str, ...]
    problems: tuple[str, ...] = ()
    phases: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def metric(self) -> str:
        """What scores measure: `val_accuracy`, `val_loss` or `val_balanced_accuracy`."""
        return str(self.record.get("config", {}).get("metric", "val_accuracy"))

    @property
    def own_images(self) -> bool:
        """Whether the images are the user's own, which the article's figures say nothing about."""
        return bool(self.record.get("data", {}).get("source_key") == "folder")

    @property
    def accuracy(self) -> str:
        """By which accuracy settings are compared, as columns name it after the part."""
        return "balanced_accuracy" if self.metric == "val_balanced_accuracy" else "accuracy"

    @property
    def test_accuracy_words(self) -> str:
        """The same in words."""
        return f"{'balanced ' * (self.accuracy != 'accuracy')}test accuracy"


@dataclass(frozen=True)
class ComparedRuns:
    """The runs by which the settings of the factor are compared.

    Attributes:
        evidence: What kind of runs they are.
        runs: A row each, of `confirm` or of `trials`, with the column `setting`.
        settings: The values of that column, in the study's order.
    """

    evidence: Evidence
    runs: pd.DataFrame
    settings: tuple[str, ...]


def load_frames(run_dir: Path) -> StudyFrames:
    """Read a run directory.

    Raises:
        RunDirError: It is none, or a file in it cannot be read.
    """
    directory = RunDir(run_dir)
    return _frames(
        directory,
        directory.read_study(),
        directory.read_epochs(),
        directory.read_trials(),
        directory.read_confirm(),
        directory.read_phases(),
    )


def load_readable_frames(run_dir: Path) -> StudyFrames:
    """Read a run directory that may be damaged or half finished, and say what is missing.

    Raises:
        RunDirError: It is no run directory, or one of another format.
    """
    directory, problems = RunDir(run_dir), list[str]()

    def read(file: Path, rows: Callable[[], list[Row]], missing: str) -> list[Row]:
        if not file.exists():
            problems.append(missing)
            return []
        try:
            return rows()
        except RunDirError as error:
            problems.append(f"Damaged, and left out: {error}.")
            return []

    record = directory.read_study()
    epochs = read(directory.epochs, directory.read_epochs, "No epoch has ended yet.")
    trials: list[TrialRow] = []
    if directory.trials.exists() or _searches(record):
        missing = "There is no trials.csv: the search has not ended."
        trials = read(directory.trials, directory.read_trials, missing)
    done = len(list(directory.confirm_dir.glob("*.json")))
    confirm = read(
        directory.confirm,
        directory.read_confirm,
        f"There is no confirm.csv: {count(done, 'confirmation run')} done; they are compared when"
        " all have ended.",
    )
    phases: list[PhaseRow] = []
    if directory.phases.exists():
        phases = read(directory.phases, directory.read_phases, "")
    frames = _frames(directory, record, epochs, trials, confirm, phases)
    return replace(frames, problems=tuple(problems))


def _searches(record: Mapping[str, Any]) -> bool:
    """Whether the study has anything to search; also where it has not written that down."""
    arms = record.get("arms")
    return not arms or any(arm.get("trials", 1) for arm in arms.values())


def compute_champions(frames: StudyFrames) -> pd.DataFrame:
    """The rows of the champions: per arm the best score among the trials that reached the end."""
    completed = frames.trials[frames.trials["state"] == "completed"]
    ascending = mode(frames.metric) == "min"
    best_first = completed.sort_values("score", ascending=ascending, kind="stable")
    return best_first.drop_duplicates("arm").sort_index()


def settings_in_order(confirm: pd.DataFrame) -> tuple[str, ...]:
    """The settings of the factor in the study's order, whichever confirmation runs failed.

    Every seed's runs stand in that order; the one with the most runs shows most of it.
    """
    if confirm.empty:
        return ()
    fullest = confirm["seed"].value_counts(sort=False).idxmax()
    in_order = confirm.loc[confirm["seed"] == fullest, "setting"]
    return tuple(dict.fromkeys([*in_order, *confirm["setting"]]))


def compute_compared_runs(frames: StudyFrames) -> ComparedRuns:
    """The confirmation runs where there are any, else the champions of the search."""
    if len(frames.confirm):
        evidence: Evidence = "confirmation"
        runs, settings = frames.confirm, settings_in_order(frames.confirm)
    else:
        evidence = "champions"
        runs = compute_champions(frames).assign(setting=lambda champions: champions["arm"])
        settings = tuple(runs["setting"].unique())
    return ComparedRuns(evidence, runs, settings)


def _frames(
    directory: RunDir,
    record: dict[str, Any],
    epochs: list[EpochRow],
    trials: list[TrialRow],
    confirm: list[ConfirmRow],
    phases: list[PhaseRow],
) -> StudyFrames:
    runs: list[TrialRow | ConfirmRow] = [*trials, *confirm]
    names = dict.fromkeys(name for row in runs for name in row.hyperparameters)
    return StudyFrames(
        path=directory.path,
        record=record,
        epochs=_frame(EpochRow, epochs),
        trials=_frame(TrialRow, trials),
        confirm=_frame(ConfirmRow, confirm),
        hyperparameters=tuple(names),
        phases=_frame(PhaseRow, phases),
    )


def _frame(
    kind: type[EpochRow] | type[TrialRow] | type[ConfirmRow] | type[PhaseRow],
    rows: Sequence[EpochRow] | Sequence[TrialRow] | Sequence[ConfirmRow] | Sequence[PhaseRow],
) -> pd.DataFrame:
    columns = [column.name for column in fields(kind) if column.name != "hyperparameters"]
    flat = [asdict(row) for row in rows]
    for row in flat:
        row.update(row.pop("hyperparameters", {}))
    return pd.DataFrame(flat) if flat else pd.DataFrame(columns=columns)
