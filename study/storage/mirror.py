"""A study that is kept in a store: its run directory on a disk is a working copy.

The driver's working copy holds the small files, and a thread carries each of them to the store, in
the order in which they were written, while the driver goes on. optuna.db and epochs.jsonl belong
together: they are carried as one snapshot, epochs.jsonl first, then the database, whose header
(`user_version`) says how long epochs.jsonl was, plus one. So a driver may die between any two
files: another one cuts epochs.jsonl to the length that the database knows.

A worker's states and weights go straight to the store, and are there before the run goes on.
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

#: Seconds between the attempts at an upload that fails; pyarrow itself has tried a few times.
PAUSES = (1.0, 3.0, 10.0)

#: Seconds between snapshots that nothing but the time asks for, at least; and so many times as long
#: as one takes to be carried over.
TICK, TICK_SHARE = 5.0, 10.0

#: Folders that another machine's driver can do without, or makes anew.
_LEFT_THERE = ("states/", "weights/", "search/", "report/", "best_model/")

#: Files that lie in a run directory and are nobody else's business.
_OWN = ("lease.json",)


@lru_cache(maxsize=8)
def worker_copy(remote: Remote) -> RunDir:
    """The run directory of a study as a worker process sees it: a folder of its own, made once."""
    folder = Path(tempfile.mkdtemp(prefix="dropout-study-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return RunDir(folder, WorkerMirror(folder, remote))


@dataclass(frozen=True)
class WorkerMirror:
    """Carries a worker's files to the store at once; what is saved is there."""

    path: Path
    """The folder whose files are carried; they do not stay there."""
    remote: Remote
    """The run directory in the store."""
    pauses: Sequence[float] = PAUSES
    """Seconds between the attempts at an upload."""

    def wrote(self, file: Path) -> None:
        """Upload a file, again where that fails, and let go of it here."""
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
        """Whether the store holds a file."""
        return self.remote.exists(self._name(file))

    def fetch(self, file: Path) -> None:
        """Download a file."""
        self.remote.download(self._name(file), file)

    def snapshot(self) -> None:
        """Nothing: a worker has no database."""

    def tick(self) -> None:
        """Nothing waits."""

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


@dataclass(frozen=True)
class _Snapshot:
    """optuna.db and epochs.jsonl as they were at one moment."""

    database: Path | None
    """A copy of the database; None where there is none yet."""
    epochs: int
    """Bytes of epochs.jsonl."""


@dataclass
class _Step:
    """Something to be carried over."""

    kind: Literal["put", "delete", "snapshot"]
    name: str = ""
    snapshot: _Snapshot | None = None


class DriverMirror:
    """Carries the driver's files to the store, in a thread, so that the driver never waits.

    Where the store does not take them, the next call raises StorageError.
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
        """Begin with nothing to carry.

        Args:
            path: The working copy.
            remote: The run directory in the store.
            guard: Raises where this process is not to write to the store any more.
            pauses: Seconds between attempts at an upload.
            tick: Seconds between snapshots that nothing but the time asks for.
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
        self._kept = (0, 0)
        self._pushed: dict[str, tuple[int, int]] = {}
        """Files that the store has, by size and time of the local one."""
        self._listed: set[str] = set()
        """Files that were in the store when this start looked."""
        self._quiet = False
        """Whether no run has written to the store since then."""
        self._gone: set[str] = set()
        """Weights that are deleted for good."""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Ray Tune pickles whatever it is given; a copy elsewhere would be none, so it is None."""
        return type(None), ()

    # ---- what the run directory tells ----------------------------------------------------------

    def wrote(self, file: Path) -> None:
        """Let a file follow, after the epochs that it stands on."""
        self._raise_error()
        if file in (self._rundir.epochs, self._rundir.optuna_db, self._rundir.log):
            return
        self.snapshot()
        name = self._name(file)
        self._gone.discard(name)
        self._listed.add(name)
        self._add(_Step("put", name))

    def deleted(self, file: Path) -> None:
        """Let a file be deleted in the store too, after all that came before."""
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
        """Whether the store holds a file, once all that waits is carried over."""
        self.flush()
        return self.remote.exists(self._name(file))

    def fetch(self, file: Path) -> None:
        """Download a file."""
        self.flush()
        if self.remote.download(self._name(file), file):
            self._pushed[self._name(file)] = _stamp(file)

    def snapshot(self) -> None:
        """Let optuna.db and epochs.jsonl follow as they are now; nothing if they have not changed.

        One that still waits is replaced: what comes after it in the queue stands on less.
        """
        self._raise_error()
        state = self._state()
        if state == self._kept:
            return
        taken = self._take(state[0])
        self._kept = state
        with self._changed:
            waiting = next((step for step in self._steps if step.kind == "snapshot"), None)
            if waiting is None:
                self._steps.append(_Step("snapshot", snapshot=taken))
            else:
                _delete_copy(waiting.snapshot)
                waiting.snapshot = taken
            self._changed.notify_all()

    def tick(self) -> None:
        """Take a snapshot if something has changed, nothing waits, and it is time for one."""
        self._guard()
        self._raise_error()
        self._quiet = False
        with self._changed:
            idle = not self._steps and not self._busy
        if idle and time.monotonic() >= self._next_tick:
            self.snapshot()

    # ---- beginning and end ---------------------------------------------------------------------

    def pull(self) -> None:
        """Make the working copy from the store; what was there before is deleted.

        States and weights stay where they are, and so does what is made anew at the end.
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
            _cut_to_database(self._rundir)
            _finish_moving(self._rundir)
        except (OSError, sqlite3.Error) as error:
            raise storage_error(error, self.path) or error from error
        self._pushed = {
            name: _stamp(self.path / name) for name in wanted if (self.path / name).exists()
        }
        self._kept = self._state()
        self._quiet = True

    def flush(self) -> None:
        """Wait until the store has everything that it was to get."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._steps or self._busy))
        self._raise_error()

    def finish(self) -> None:
        """Bring the store to what lies here, report, bundle and Ray's folders included; wait."""
        self.snapshot()
        self.flush()
        self._guard()
        here = {
            self._name(file): file
            for file in self.path.rglob("*")
            if file.is_file() and not file.name.startswith(".")
        }
        taken_along = {self._name(self._rundir.epochs), self._name(self._rundir.optuna_db)}
        new = [
            name
            for name, file in here.items()
            if name not in taken_along and self._pushed.get(name) != _stamp(file)
        ]
        # A bundle or a run is whole where its .json stands, so these come last.
        for names in (
            [name for name in new if not name.endswith(".json")],
            [name for name in new if name.endswith(".json")],
        ):
            _in_parallel(self._put, names)
        made_anew = ("report/", "best_model/")
        stale = [name for name in self._listed if name.startswith(made_anew) and name not in here]
        _in_parallel(self.remote.delete, stale)
        self._listed.difference_update(stale)

    def close(self, wait: float = 10.0) -> None:
        """Take a last snapshot, give the thread some seconds to carry over what waits, and end it.

        Args:
            wait: Seconds; what is not carried over by then is lost with this machine.
        """
        with contextlib.suppress(Exception):  # there may be no disk, and no store
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

    # ---- the inside ----------------------------------------------------------------------------

    def _state(self) -> tuple[int, int]:
        """What tells one moment of epochs.jsonl and optuna.db from another."""
        epochs = self._rundir.epochs
        try:
            size = epochs.stat().st_size if epochs.exists() else 0
            if self._database is None and self._rundir.optuna_db.exists():
                uri = f"{self._rundir.optuna_db.resolve().as_uri()}?mode=ro"
                self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
            if self._database is None:
                return size, 0
            # It changes when another connection has written.
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
                copy.execute("PRAGMA synchronous = OFF")  # it is read once, by this process
                self._database.backup(copy)
                copy.execute(f"PRAGMA user_version = {epochs + 1}")  # 0: it does not say
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
                self._carry(step)
            except Exception as error:  # it is raised again, in the driver
                known = storage_error(error, self.path) if isinstance(error, OSError) else None
                with self._changed:
                    self._error = known or error
                    self._busy = False
                    self._changed.notify_all()
                return

    def _carry(self, step: _Step) -> None:
        """Do a step, and again where it fails."""
        for pause in (*self._pauses, None):
            self._guard()
            try:
                self._carry_once(step)
                break
            except StorageError:
                if pause is None or self._ending:
                    raise
                time.sleep(pause)
        _delete_copy(step.snapshot)

    def _carry_once(self, step: _Step) -> None:
        if step.kind == "put":
            self._put(step.name)
        elif step.kind == "delete":
            self.remote.delete(step.name)
        elif step.snapshot:
            # In this order: a database never knows of an epoch that epochs.jsonl lacks.
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
        except FileNotFoundError:  # deleted since, which comes next
            return
        self._pushed[name] = stamp

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


def _is_wanted(name: str) -> bool:
    return name == "report/verdict.json" or not (name.startswith(_LEFT_THERE) or name in _OWN)


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _delete_copy(snapshot: _Snapshot | None) -> None:
    if snapshot and snapshot.database:
        snapshot.database.unlink(missing_ok=True)


def _empty(path: Path) -> None:
    """Delete what a folder holds, but for the lock that this process may hold on it."""
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name != ".lock":
            file.unlink()


def _cut_to_database(rundir: RunDir) -> None:
    """Cut epochs.jsonl to the length that the database knows of."""
    if not rundir.optuna_db.exists() or not rundir.epochs.exists():
        return
    with contextlib.closing(sqlite3.connect(rundir.optuna_db)) as database:
        try:
            (length,) = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError:  # damaged; the study is refused for that later
            return
    if 0 < length <= rundir.epochs.stat().st_size:
        with rundir.epochs.open("r+b") as file:
            file.truncate(length - 1)


def _finish_moving(rundir: RunDir) -> None:
    """Finish what `put_confirm_away` was doing: for a moment the store holds the file twice."""
    if rundir.confirm.exists() and rundir.earlier_confirms:
        last = rundir.earlier_confirms[-1]
        if last.read_bytes() == rundir.confirm.read_bytes():
            rundir.confirm.unlink()


def _in_parallel(do: Callable[[str], object], names: Iterable[str]) -> None:
    """Do something with every name, several at once: a store answers late, but to many."""
    pool = ThreadPoolExecutor(8, thread_name_prefix="mirror")
    try:
        for _ in pool.map(do, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
