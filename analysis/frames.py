"""The run directory as pandas frames, the basis of every table and figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd

from analysis.rundir import ConfirmRow, EpochRow, PhaseRow, RunDir, RunDirError, TrialRow
from analysis.rundir.metric import mode
from analysis.words import count

Row = TypeVar("Row")

#: Runs that settings are compared by: confirmation runs, or the champions if there are none yet.
Evidence = Literal["confirmation", "champions"]


@dataclass(frozen=True)
class StudyFrames:
    """Everything a study has written so far; `analysis.rundir` describes the columns.

    Attributes:
        path: The run directory.
        record: Content of study.json.
        epochs: A row per epoch of every run, from its last attempt.
        trials: A row per trial; empty until the search has finished.
        confirm: A row per confirmation run; empty until all have finished.
        hyperparameters: Names of the columns of trials and confirm that are hyperparameters.
        problems: One sentence for each file that is unreadable or not written yet.
        phases: A row per phase of each start; empty if phases.jsonl does not exist.
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
        """The metric of the scores: `val_accuracy`, `val_loss` or `val_balanced_accuracy`."""
        return str(self.record.get("config", {}).get("metric", "val_accuracy"))

    @property
    def own_images(self) -> bool:
        """True if the images are the user's own, so the article's figures do not apply."""
        return bool(self.record.get("data", {}).get("source_key") == "folder")

    @property
    def accuracy(self) -> str:
        """The accuracy that settings are compared by, as it follows the split in column names."""
        return "balanced_accuracy" if self.metric == "val_balanced_accuracy" else "accuracy"

    @property
    def test_accuracy_words(self) -> str:
        """That accuracy on the test set, in words."""
        return f"{'balanced ' * (self.accuracy != 'accuracy')}test accuracy"


@dataclass(frozen=True)
class ComparedRuns:
    """The runs that the settings of the factor are compared by.

    Attributes:
        evidence: The kind of runs.
        runs: Rows of `confirm` or `trials`, with a column `setting`.
        settings: The values of that column, in the study's order.
    """

    evidence: Evidence
    runs: pd.DataFrame
    settings: tuple[str, ...]


def load_frames(run_dir: Path) -> StudyFrames:
    """Read a run directory.

    Raises:
        RunDirError: Not a run directory, or a file in it is unreadable.
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
    """Read a run directory that may be damaged or unfinished, and list what is missing.

    Raises:
        RunDirError: Not a run directory, or one of another format.
    """
    directory, problems = RunDir(run_dir), list[str]()

    def read(file: Path, rows: Callable[[], list[Row]], missing: str) -> list[Row]:
        if not file.exists():
            problems.append(missing)
            return []
        try:
            return rows()
        except RunDirError as error:
            problems.append(f"Skipped a damaged file: {error}.")
            return []

    record = directory.read_study()
    epochs = read(directory.epochs, directory.read_epochs, "No epoch has finished yet.")
    trials: list[TrialRow] = []
    if directory.trials.exists() or _searches(record):
        missing = "trials.csv is missing: the search has not finished."
        trials = read(directory.trials, directory.read_trials, missing)
    done = len(list(directory.confirm_dir.glob("*.json")))
    confirm = read(
        directory.confirm,
        directory.read_confirm,
        f"confirm.csv is missing: {count(done, 'confirmation run')} done so far; they are compared"
        " once all have finished.",
    )
    phases: list[PhaseRow] = []
    if directory.phases.exists():
        phases = read(directory.phases, directory.read_phases, "")
    frames = _frames(directory, record, epochs, trials, confirm, phases)
    return replace(frames, problems=tuple(problems))


def _searches(record: Mapping[str, Any]) -> bool:
    """Return whether the study has anything to search; assume so if no arms are recorded."""
    arms = record.get("arms")
    return not arms or any(arm.get("trials", 1) for arm in arms.values())


def compute_champions(frames: StudyFrames) -> pd.DataFrame:
    """Return the champions' rows: each arm's best-scoring trial that reached the last epoch."""
    completed = frames.trials[frames.trials["state"] == "completed"]
    ascending = mode(frames.metric) == "min"
    best_first = completed.sort_values("score", ascending=ascending, kind="stable")
    return best_first.drop_duplicates("arm").sort_index()


def settings_in_order(confirm: pd.DataFrame) -> tuple[str, ...]:
    """Return the factor's settings in the study's order, even if some confirmation runs failed.

    Each seed's runs are in that order; the seed with the most runs shows the most of it.
    """
    if confirm.empty:
        return ()
    fullest = confirm["seed"].value_counts(sort=False).idxmax()
    in_order = confirm.loc[confirm["seed"] == fullest, "setting"]
    return tuple(dict.fromkeys([*in_order, *confirm["setting"]]))


def compute_compared_runs(frames: StudyFrames) -> ComparedRuns:
    """Return the confirmation runs if there are any, else the champions of the search."""
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
