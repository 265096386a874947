"""The run directory as pandas frames: what every table and figure starts from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.rundir import ConfirmRow, EpochRow, RunDir, TrialRow

#: Whether settings are compared by confirmation runs, or for want of them by the champions.
Evidence = Literal["confirmation", "champions"]


@dataclass(frozen=True)
class StudyFrames:
    """What a study has written so far; columns as `analysis.rundir` describes them.

    Attributes:
        record: study.json.
        epochs: A row per epoch of every run, its last attempt.
        trials: A row per trial; empty before the search has ended.
        confirm: A row per confirmation run; empty before all have ended.
        hyperparameters: Names of the hyperparameters among the columns of trials and confirm.
    """

    record: dict[str, Any]
    epochs: pd.DataFrame
    trials: pd.DataFrame
    confirm: pd.DataFrame
    hyperparameters: tuple[str, ...]

    @property
    def metric(self) -> str:
        """What scores measure: `val_accuracy` or `val_loss`."""
        return str(self.record.get("config", {}).get("metric", "val_accuracy"))


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
    record = directory.read_study()
    trials, confirm = directory.read_trials(), directory.read_confirm()
    runs: list[TrialRow | ConfirmRow] = [*trials, *confirm]
    names = dict.fromkeys(name for row in runs for name in row.hyperparameters)
    return StudyFrames(
        record=record,
        epochs=_frame(EpochRow, directory.read_epochs()),
        trials=_frame(TrialRow, trials),
        confirm=_frame(ConfirmRow, confirm),
        hyperparameters=tuple(names),
    )


def compute_champions(frames: StudyFrames) -> pd.DataFrame:
    """The rows of the champions: per arm the best score among the trials that reached the end."""
    completed = frames.trials[frames.trials["state"] == "completed"]
    ascending = frames.metric == "val_loss"
    best_first = completed.sort_values("score", ascending=ascending, kind="stable")
    return best_first.drop_duplicates("arm").sort_index()


def compute_compared_runs(frames: StudyFrames) -> ComparedRuns:
    """The confirmation runs where there are any, else the champions of the search."""
    if len(frames.confirm):
        evidence: Evidence = "confirmation"
        runs = frames.confirm
    else:
        evidence = "champions"
        runs = compute_champions(frames).assign(setting=lambda champions: champions["arm"])
    return ComparedRuns(evidence, runs, tuple(runs["setting"].unique()))


def _frame(
    kind: type[EpochRow] | type[TrialRow] | type[ConfirmRow],
    rows: Sequence[EpochRow] | Sequence[TrialRow] | Sequence[ConfirmRow],
) -> pd.DataFrame:
    columns = [field.name for field in fields(kind) if field.name != "hyperparameters"]
    flat = [asdict(row) for row in rows]
    for row in flat:
        row.update(row.pop("hyperparameters", {}))
    return pd.DataFrame(flat) if flat else pd.DataFrame(columns=columns)
