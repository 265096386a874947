"""Read and write a run directory; `analysis.rundir` describes its files."""

import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.rundir.codec import from_csv, from_json, row_from_json, to_csv, to_json
from analysis.rundir.errors import RunDirError
from analysis.rundir.rows import ConfirmRow, EpochRow, PhaseRow, TrialRow

Row = TypeVar("Row", "EpochRow", "PhaseRow")

#: Version of the layout, stored in study.json under "format".
FORMAT = 1


class Mirror(Protocol):
    """A copy of a run directory elsewhere, kept in sync; see study/storage/mirror.py."""

    def wrote(self, file: Path) -> None:
        """Register that a file was written or rewritten."""

    def deleted(self, file: Path) -> None:
        """Register that a file was deleted or should not exist."""

    def has(self, file: Path) -> bool:
        """Return whether the copy contains a file."""

    def fetch(self, file: Path) -> None:
        """Fetch a file from the copy, if it is there."""

    def snapshot(self) -> None:
        """Save the current content of optuna.db and epochs.jsonl."""

    def tick(self) -> None:
        """Do whatever is due; called often."""


@dataclass(frozen=True)
class RunDir:
    """Reads and writes a run directory; folders are created on the first write to them.

    Attributes:
        path: The directory.
        mirror: A synced copy elsewhere, if any.
    """

    path: Path
    mirror: Mirror | None = field(default=None, compare=False, repr=False)

    @property
    def study_json(self) -> Path:
        """Configuration and provenance."""
        return self.path / "study.json"

    @property
    def optuna_db(self) -> Path:
        """Optuna's storage."""
        return self.path / "optuna.db"

    @property
    def search(self) -> Path:
        """Folder of Ray Tune's experiment directories."""
        return self.path / "search"

    @property
    def epochs(self) -> Path:
        """Rows of epochs, append-only."""
        return self.path / "epochs.jsonl"

    @property
    def phases(self) -> Path:
        """Rows of phases, append-only."""
        return self.path / "phases.jsonl"

    @property
    def trials(self) -> Path:
        """Rows of trials."""
        return self.path / "trials.csv"

    @property
    def confirm(self) -> Path:
        """Rows of confirmation runs."""
        return self.path / "confirm.csv"

    @property
    def confirm_dir(self) -> Path:
        """Folder of the confirmation runs' predictions."""
        return self.path / "confirm"

    def predictions(self, run_id: str) -> Path:
        """Logits and labels of a confirmation run, arrays as `write_confirmation` describes."""
        return self.confirm_dir / f"{run_id}.npz"

    def state(self, run_id: str) -> Path:
        """Latest checkpoint of a run in progress."""
        return self.path / "states" / f"{run_id}.safetensors"

    def weights(self, run_id: str) -> Path:
        """Weights of a run's best epoch, if they are kept."""
        return self.path / "weights" / f"{run_id}.safetensors"

    def failure(self, run_id: str, attempt: int) -> Path:
        """Reason why an attempt at a run failed."""
        return self.path / "failures" / f"{run_id}-{attempt}.txt"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def verdict(self) -> Path:
        """The verdict as data."""
        return self.report / "verdict.json"

    @property
    def best_model(self) -> Path:
        """Folder of the bundle."""
        return self.path / "best_model"

    @property
    def log(self) -> Path:
        """The study's screen output."""
        return self.path / "log.txt"

    def wrote(self, file: Path) -> None:
        """Tell the mirror about a file written to this directory by other code."""
        if self.mirror:
            self.mirror.wrote(file)

    def delete(self, file: Path) -> None:
        """Delete a file here and in the mirror; do nothing if it is missing."""
        file.unlink(missing_ok=True)
        if self.mirror:
            self.mirror.deleted(file)

    def has(self, file: Path) -> bool:
        """Return whether a file is here or in the mirror."""
        return file.exists() or (self.mirror is not None and self.mirror.has(file))

    def fetch(self, file: Path) -> None:
        """Fetch a file from the mirror unless it is already here."""
        if self.mirror and not file.exists():
            self.mirror.fetch(file)

    def snapshot(self) -> None:
        """Let the mirror save the current content of optuna.db and epochs.jsonl."""
        if self.mirror:
            self.mirror.snapshot()

    def tick(self) -> None:
        """Let the mirror do whatever is due."""
        if self.mirror:
            self.mirror.tick()

    def _write(self, file: Path, content: str | bytes) -> None:
        write_atomically(file, content)
        self.wrote(file)

    def _move(self, file: Path, to: Path) -> None:
        """Move a file if it exists; the mirror writes the new copy before deleting the old."""
        if file.exists():
            file.replace(to)
            self.wrote(to)
            self.delete(file)

    def write_study(self, record: Mapping[str, Any]) -> None:
        """Write study.json, adding the layout's version."""
        self._write(self.study_json, to_json({**record, "format": FORMAT}, indent=2))

    def read_study(self) -> dict[str, Any]:
        """Read study.json.

        Raises:
            RunDirError: It is missing or unreadable, or has another format.
        """
        if not self.path.is_dir():
            raise RunDirError(f"{self.path}: no such directory")
        if not self.study_json.is_file():
            raise RunDirError(f"{self.path} is not a run directory: it has no study.json")
        where = str(self.study_json)
        return check_format(from_json(self.study_json.read_bytes(), where), where)

    def delete_partial(self) -> None:
        """Delete partially written files and folders left by a crash."""
        for file in list(self.path.rglob(".*.part")):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    def append_epochs(self, rows: Iterable[EpochRow]) -> None:
        """Append rows in one write, and return once they are on disk."""
        _append(self.epochs, "".join(to_json(asdict(row)) for row in rows))
        self.wrote(self.epochs)

    def read_epochs(self) -> list[EpochRow]:
        """Read epochs.jsonl: each epoch of a run once, in the order they were written.

        A later attempt replaces earlier ones from its first epoch on: it continues them if it was
        resumed from a checkpoint, and supersedes them if it started over. An incomplete last line
        is skipped.

        Raises:
            RunDirError: A line is not a valid row.
        """
        return _last_attempts(_rows(EpochRow, self.epochs))

    def append_phase(self, row: PhaseRow) -> None:
        """Append a row, and return once it is on disk."""
        _append(self.phases, to_json(asdict(row)))
        self.wrote(self.phases)

    def read_phases(self) -> list[PhaseRow]:
        """Read phases.jsonl, without an incomplete last line; empty if there is no such file.

        Raises:
            RunDirError: A line is not a valid row.
        """
        return list(_rows(PhaseRow, self.phases))

    def write_failure(self, run_id: str, attempt: int, traceback: str) -> None:
        """Write why an attempt at a run failed."""
        self._write(self.failure(run_id, attempt), traceback.rstrip() + "\n")

    def write_trials(self, rows: Sequence[TrialRow]) -> None:
        """Write trials.csv."""
        self._write(self.trials, to_csv(TrialRow, rows))

    def read_trials(self) -> list[TrialRow]:
        """Read trials.csv; empty if there is no such file.

        Raises:
            RunDirError: A line is not a valid row.
        """
        if not self.trials.exists():
            return []
        return from_csv(TrialRow, self.trials.read_bytes(), str(self.trials))

    def write_confirm(self, rows: Sequence[ConfirmRow]) -> None:
        """Write confirm.csv."""
        self._write(self.confirm, to_csv(ConfirmRow, rows))

    def read_confirm(self) -> list[ConfirmRow]:
        """Read confirm.csv; empty if there is no such file.

        Raises:
            RunDirError: A line is not a valid row.
        """
        if not self.confirm.exists():
            return []
        return from_csv(ConfirmRow, self.confirm.read_bytes(), str(self.confirm))

    def write_confirmation(
        self,
        run_id: str,
        row: ConfirmRow,
        *,
        val_logits: NDArray[np.floating],
        test_logits: NDArray[np.floating],
        val_labels: NDArray[np.integer],
        test_labels: NDArray[np.integer],
    ) -> None:
        """Write a confirmation run's predictions, then its row, which marks the run as done.

        Args:
            run_id: Name of the run, as in `row`.
            row: Row of the run.
            val_logits: [images of val, classes], at the selected epoch; stored as float16.
            test_logits: [images of test, classes], at the selected epoch; stored as float16.
            val_labels: [images of val], class numbers from 0; stored as int64.
            test_labels: [images of test], class numbers from 0; stored as int64.
        """
        predictions = io.BytesIO()
        np.savez_compressed(
            predictions,
            val_logits=val_logits.astype(np.float16),
            test_logits=test_logits.astype(np.float16),
            val_labels=val_labels.astype(np.int64),
            test_labels=test_labels.astype(np.int64),
        )
        self._write(self.predictions(run_id), predictions.getvalue())
        self._write(self.confirm_dir / f"{run_id}.json", to_json(asdict(row), indent=2))

    def read_confirmations(self) -> list[ConfirmRow]:
        """Read the rows of the confirmation runs that are done, sorted by run ID.

        Raises:
            RunDirError: A file does not contain a valid row.
        """
        return [
            self.read_confirmation(path.stem) for path in sorted(self.confirm_dir.glob("*.json"))
        ]

    def read_confirmation(self, run_id: str) -> ConfirmRow:
        """Read the row of a confirmation run that is done.

        Raises:
            RunDirError: The file does not contain a valid row.
        """
        path = self.confirm_dir / f"{run_id}.json"
        return row_from_json(ConfirmRow, path.read_bytes(), str(path))

    def confirm_holds(self, rows: Sequence[ConfirmRow]) -> bool:
        """Return whether confirm.csv exists and contains exactly these rows."""
        content = to_csv(ConfirmRow, rows).encode()
        return self.confirm.exists() and self.confirm.read_bytes() == content

    def delete_confirmation(self, run_id: str) -> None:
        """Delete a confirmation run's row, then its predictions."""
        for file in (self.confirm_dir / f"{run_id}.json", self.predictions(run_id)):
            self.delete(file)

    def archive_confirmation(self, run_id: str) -> None:
        """Archive a confirmation run that the next look cannot use, and delete its weights."""
        archive = self.confirm_dir / f"before-look-{len(self.archived_confirms) + 1}"
        archive.mkdir(exist_ok=True)
        for file in (self.confirm_dir / f"{run_id}.json", self.predictions(run_id)):
            self._move(file, archive / file.name)
        self.delete(self.weights(run_id))

    @property
    def archived_confirms(self) -> list[Path]:
        """The confirm.csv of each earlier look at the test set, in order."""
        numbered = sorted(
            (len(file.name), file.name) for file in self.confirm_dir.glob("look-*.csv")
        )
        return [self.confirm_dir / name for _, name in numbered]

    def archive_confirm(self) -> None:
        """Archive confirm.csv before another look at the test set."""
        number = len(self.archived_confirms) + 1
        self._move(self.confirm, self.confirm_dir / f"look-{number}.csv")


def check_format(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the content of a study.json if this version can read it.

    Raises:
        RunDirError: The record has another format.
    """
    if record.get("format") != FORMAT:
        raise RunDirError(
            f"{where} has format {record.get('format')}; this version of the project reads format"
            f" {FORMAT}: use the version that wrote it"
        )
    return record


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers, even after a crash, find either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _append(path: Path, lines: str) -> None:
    """Append lines in one write after the last complete one; return once they are on disk."""
    with path.open("a+b") as file:
        _cut_torn_line(file)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def _rows(kind: type[Row], path: Path) -> Iterator[Row]:
    """Yield the rows of an append-only file, without a last line that a crash cut short."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        yield row_from_json(kind, line, f"{path}, line {number}")


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off an incomplete last line, so that the next row does not run into it."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _last_attempts(rows: Iterable[EpochRow]) -> list[EpochRow]:
    kept: dict[tuple[str, int], EpochRow] = {}
    newest: dict[str, int] = {}
    epochs: dict[str, set[int]] = {}
    for row in rows:
        of_run = epochs.setdefault(row.run_id, set())
        if row.attempt > newest.get(row.run_id, 0):
            newest[row.run_id] = row.attempt
            for stale in [epoch for epoch in of_run if epoch >= row.epoch]:
                of_run.remove(stale)
                del kept[row.run_id, stale]
        if row.attempt >= newest.get(row.run_id, 0):
            kept[row.run_id, row.epoch] = row
            of_run.add(row.epoch)
    return list(kept.values())
