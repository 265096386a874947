"""Sync a run directory with an object store; the local run directory is a working copy.

The driver's working copy holds the small files. A thread uploads them in the order in which they
were written, while the driver continues. optuna.db and epochs.jsonl belong together and are
uploaded as one snapshot: epochs.jsonl first, then the database, whose header (`user_version`)
stores the length of epochs.jsonl plus one. The driver may therefore die between any two files:
the next one truncates epochs.jsonl to the length stored in the database.

A worker uploads checkpoints and weights directly, before the run continues.
"""

import atexit
import contextlib
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal

from analysis.rundir import RunDir
from study.errors import StorageError, storage_error
from study.storage.object_store import Remote

#: Seconds between attempts at a failing upload, in addition to pyarrow's own retries.
PAUSES = (1.0, 3.0, 10.0)

#: Minimum interval between periodic snapshots: this many seconds, and at least this many times the
#: duration of the last upload.
TICK, TICK_SHARE = 5.0, 10.0

#: Folders that the driver's working copy does not need, or that are regenerated.
_NOT_DOWNLOADED = ("states/", "weights/", "search/", "report/", "best_model/")

#: Files used only in the store.
_INTERNAL = ("lease.json",)


@lru_cache(maxsize=8)
def worker_copy(remote: Remote) -> RunDir:
    """Return a worker process's run directory: its own temporary folder, created once."""
    folder = Path(tempfile.mkdtemp(prefix="dropout-study-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return RunDir(folder, WorkerMirror(folder, remote))


@dataclass(frozen=True)
class WorkerMirror:
    """Uploads a worker's files synchronously: once saved, a file is in the store."""

    path: Path
    """The folder whose files are uploaded; they are then deleted from it."""
    remote: Remote
    """The run directory in the store."""
    pauses: Sequence[float] = PAUSES
    """Seconds between attempts at an upload."""

    def wrote(self, file: Path) -> None:
        """Upload a file, with retries, and delete the local one."""
        for pause in (*self.pauses, None):
            try:
                self.remote.upload(file, self._name(file))
                break
            except StorageError:
                if pause is None:
                    raise
                time.sleep(pause)
        file.unlink(missing_ok=True)

    def deleted(self, file: Path) -> None:
        """Delete a file in the store."""
        self.remote.delete(self._name(file))

    def has(self, file: Path) -> bool:
        """Return whether a file exists in the store."""
        return self.remote.exists(self._name(file))

    def fetch(self, file: Path) -> None:
        """Download a file."""
        self.remote.download(self._name(file), file)

    def snapshot(self) -> None:
        """Do nothing: a worker has no database."""

    def tick(self) -> None:
        """Do nothing: uploads are synchronous."""

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


@dataclass(frozen=True)
class _Snapshot:
    """optuna.db and epochs.jsonl at one point in time."""

    database: Path | None
    """A copy of the database; None if there is none yet."""
    epochs: int
    """Size of epochs.jsonl in bytes."""


@dataclass
class _Step:
    """A queued change of the store."""

    kind: Literal["put", "delete", "snapshot"]
    name: str = ""
    snapshot: _Snapshot | None = None


class DriverMirror:
    """Uploads the driver's files in a thread, so that the driver never waits.

    After a failed upload, the next call raises StorageError.
    """

    def __init__(
        self,
        path: Path,
        remote: Remote,
        *,
        guard: Callable[[], None] = lambda: None,
        pauses: Sequence[float] = PAUSES,
        tick: float = TICK,
    ) -> None:
        """Start with an empty queue.

        Args:
            path: The working copy.
            remote: The run directory in the store.
            guard: Raises if this process may no longer write to the store.
            pauses: Seconds between attempts at an upload.
            tick: Minimum seconds between periodic snapshots.
        """
        self.path = path
        self.remote = remote
        self._guard = guard
        self._pauses = pauses
        self._tick = tick
        self._next_tick = 0.0
        self._rundir = RunDir(path)
        self._steps: deque[_Step] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._ending = False
        self._error: Exception | None = None
        self._numbers = count(1)
        self._database: sqlite3.Connection | None = None
        self._last_state = (0, 0)
        self._pushed: dict[str, tuple[int, int]] = {}
        """Uploaded files, with the size and time of the local file."""
        self._listed: set[str] = set()
        """Files known to be in the store, from the listing at startup."""
        self._quiet = False
        """True while the listing is complete: no run has started writing to the store."""
        self._gone: set[str] = set()
        """Deleted weights, whose deletion is not repeated."""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None: Ray Tune pickles everything it is given, but a copy would not work."""
        return type(None), ()

    # ---- calls from the run directory ----------------------------------------------------------

    def wrote(self, file: Path) -> None:
        """Queue the upload of a file, after a snapshot of the epochs it depends on."""
        self._raise_error()
        if file in (self._rundir.epochs, self._rundir.optuna_db, self._rundir.log):
            return
        self.snapshot()
        name = self._name(file)
        self._gone.discard(name)
        self._listed.add(name)
        self._add(_Step("put", name))

    def deleted(self, file: Path) -> None:
        """Queue the deletion of a file in the store, after all earlier changes."""
        self._raise_error()
        name = self._name(file)
        if name in self._gone:
            return
        if name.startswith("weights/"):
            self._gone.add(name)
        if self._quiet and name not in self._listed:
            return
        self.snapshot()
        self._listed.discard(name)
        self._add(_Step("delete", name))

    def has(self, file: Path) -> bool:
        """Return whether a file exists in the store, after flushing the queue."""
        self.flush()
        return self.remote.exists(self._name(file))

    def fetch(self, file: Path) -> None:
        """Download a file."""
        self.flush()
        if self.remote.download(self._name(file), file):
            self._pushed[self._name(file)] = _stamp(file)

    def snapshot(self) -> None:
        """Queue a snapshot of optuna.db and epochs.jsonl if they have changed.

        It replaces a snapshot still in the queue, since it also covers the steps queued after that.
        """
        self._raise_error()
        state = self._state()
        if state == self._last_state:
            return
        taken = self._take(state[0])
        self._last_state = state
        with self._changed:
            waiting = next((step for step in self._steps if step.kind == "snapshot"), None)
            if waiting is None:
                self._steps.append(_Step("snapshot", snapshot=taken))
            else:
                _delete_copy(waiting.snapshot)
                waiting.snapshot = taken
            self._changed.notify_all()

    def tick(self) -> None:
        """Take a periodic snapshot if it is due, something has changed and the queue is empty."""
        self._guard()
        self._raise_error()
        self._quiet = False
        with self._changed:
            idle = not self._steps and not self._busy
        if idle and time.monotonic() >= self._next_tick:
            self.snapshot()

    # ---- start and end -------------------------------------------------------------------------

    def pull(self) -> None:
        """Replace the working copy with the content of the store.

        Checkpoints, weights and files that are regenerated at the end are not downloaded.
        """
        try:
            _empty(self.path)
            listed = self.remote.files()
            self._listed = {entry.name for entry in listed}
            wanted = [name for name in sorted(self._listed) if _is_wanted(name)]
            _in_parallel(lambda name: self.remote.download(name, self.path / name), wanted)
            for name in self._listed:
                if name.startswith("search/"):  # so that the next part gets another number
                    (self.path / Path(*Path(name).parts[:2])).mkdir(parents=True, exist_ok=True)
            _truncate_to_database(self._rundir)
            _finish_archiving(self._rundir)
        except (OSError, sqlite3.Error) as error:
            raise storage_error(error, self.path) or error from error
        self._pushed = {
            name: _stamp(self.path / name) for name in wanted if (self.path / name).exists()
        }
        self._last_state = self._state()
        self._quiet = True

    def flush(self) -> None:
        """Wait until all queued changes are in the store."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._steps or self._busy))
        self._raise_error()

    def finish(self) -> None:
        """Upload everything that has changed, including report, bundle and Ray's folders; wait."""
        self.snapshot()
        self.flush()
        self._guard()
        here = {
            self._name(file): file
            for file in self.path.rglob("*")
            if file.is_file() and not file.name.startswith(".")
        }
        in_snapshots = {self._name(self._rundir.epochs), self._name(self._rundir.optuna_db)}
        new = [
            name
            for name, file in here.items()
            if name not in in_snapshots and self._pushed.get(name) != _stamp(file)
        ]
        # The .json marks a bundle or a run as complete, so these come last.
        for names in (
            [name for name in new if not name.endswith(".json")],
            [name for name in new if name.endswith(".json")],
        ):
            _in_parallel(self._put, names)
        rebuilt = ("report/", "best_model/")
        stale = [name for name in self._listed if name.startswith(rebuilt) and name not in here]
        _in_parallel(self.remote.delete, stale)
        self._listed.difference_update(stale)

    def close(self, wait: float = 10.0) -> None:
        """Take a last snapshot, give the thread some time to empty the queue, and end it.

        Args:
            wait: Seconds; changes not uploaded by then exist only on this machine.
        """
        with contextlib.suppress(Exception):  # the disk or the store may have failed
            self.snapshot()
            self._add(_Step("put", self._rundir.log.name))
        end = time.monotonic() + wait
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._steps or self._busy), wait)
            self._ending = True
            self._steps.clear()
            self._changed.notify_all()
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._database is not None:
            self._database.close()
            self._database = None
        for copy in self.path.glob(".snapshot-*"):
            copy.unlink(missing_ok=True)

    # ---- internals -----------------------------------------------------------------------------

    def _state(self) -> tuple[int, int]:
        """Return values that change whenever epochs.jsonl or optuna.db does."""
        epochs = self._rundir.epochs
        try:
            size = epochs.stat().st_size if epochs.exists() else 0
            if self._database is None and self._rundir.optuna_db.exists():
                uri = f"{self._rundir.optuna_db.resolve().as_uri()}?mode=ro"
                self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
            if self._database is None:
                return size, 0
            # This changes when another connection has written.
            (version,) = self._database.execute("PRAGMA data_version").fetchone()
            return size, version
        except (OSError, sqlite3.Error) as error:
            raise storage_error(error, self.path) or error from error

    def _take(self, epochs: int) -> _Snapshot:
        if self._database is None:
            return _Snapshot(None, epochs)
        file = self.path / f".snapshot-{next(self._numbers)}.db"
        try:
            with contextlib.closing(sqlite3.connect(file)) as copy:
                copy.execute("PRAGMA synchronous = OFF")  # the copy is read once, by this process
                self._database.backup(copy)
                copy.execute(f"PRAGMA user_version = {epochs + 1}")  # 0 means unknown
                copy.commit()
        except (OSError, sqlite3.Error) as error:
            raise storage_error(error, self.path) or error from error
        return _Snapshot(file, epochs)

    def _add(self, step: _Step) -> None:
        with self._changed:
            self._steps.append(step)
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._steps or self._ending)
                if self._ending:
                    return
                step = self._steps.popleft()
                self._busy = True
            try:
                self._apply(step)
            except Exception as error:  # raised again in the driver
                known = storage_error(error, self.path) if isinstance(error, OSError) else None
                with self._changed:
                    self._error = known or error
                    self._busy = False
                    self._changed.notify_all()
                return

    def _apply(self, step: _Step) -> None:
        """Carry out a step, with retries."""
        for pause in (*self._pauses, None):
            self._guard()
            try:
                self._apply_once(step)
                break
            except StorageError:
                if pause is None or self._ending:
                    raise
                time.sleep(pause)
        _delete_copy(step.snapshot)

    def _apply_once(self, step: _Step) -> None:
        if step.kind == "put":
            self._put(step.name)
        elif step.kind == "delete":
            self.remote.delete(step.name)
        elif step.snapshot:
            # In this order, the database never knows of an epoch that epochs.jsonl lacks.
            rundir, start = self._rundir, time.monotonic()
            if step.snapshot.epochs:
                with rundir.epochs.open("rb") as file:
                    self.remote.write(rundir.epochs.name, file.read(step.snapshot.epochs))
            if step.snapshot.database:
                self.remote.upload(step.snapshot.database, rundir.optuna_db.name)
            if rundir.log.exists() and self._pushed.get("log.txt") != _stamp(rundir.log):
                self._put("log.txt")
            end = time.monotonic()
            self._next_tick = end + max(self._tick, TICK_SHARE * (end - start))

    def _put(self, name: str) -> None:
        file = self.path / name
        try:
            stamp = _stamp(file)
            self.remote.upload(file, name)
        except FileNotFoundError:  # deleted since; its deletion is queued
            return
        self._pushed[name] = stamp

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


def _is_wanted(name: str) -> bool:
    return name == "report/verdict.json" or not (
        name.startswith(_NOT_DOWNLOADED) or name in _INTERNAL
    )


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _delete_copy(snapshot: _Snapshot | None) -> None:
    if snapshot and snapshot.database:
        snapshot.database.unlink(missing_ok=True)


def _empty(path: Path) -> None:
    """Delete the content of a folder, except a lock that this process may hold on it."""
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != ".lock":
            file.unlink()


def _truncate_to_database(rundir: RunDir) -> None:
    """Truncate epochs.jsonl to the length stored in the database."""
    if not rundir.optuna_db.exists() or not rundir.epochs.exists():
        return
    with contextlib.closing(sqlite3.connect(rundir.optuna_db)) as database:
        try:
            (length,) = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError:  # damaged; a later check refuses the study
            return
    if 0 < length <= rundir.epochs.stat().st_size:
        with rundir.epochs.open("r+b") as file:
            file.truncate(length - 1)


def _finish_archiving(rundir: RunDir) -> None:
    """Finish an interrupted `archive_confirm`, which leaves the file in the store twice."""
    if rundir.confirm.exists() and rundir.archived_confirms:
        last = rundir.archived_confirms[-1]
        if last.read_bytes() == rundir.confirm.read_bytes():
            rundir.confirm.unlink()


def _in_parallel(do: Callable[[str], object], names: Iterable[str]) -> None:
    """Call a function with every name, in parallel, since a store has high latency."""
    pool = ThreadPoolExecutor(8, thread_name_prefix="mirror")
    try:
        for _ in pool.map(do, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
