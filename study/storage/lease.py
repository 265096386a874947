"""A lease on a study in an object store, so that only one driver works on it.

The holder renews the lease every few seconds; after a minute without renewal it has expired, and
another driver may take over. Its age is measured by the store's clock, since the clocks of two
machines may differ. Stores offer no "create only if absent", so two drivers that arrive at the same
moment both write, wait and read back: the last writer wins, and the other one gives up.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from study.errors import StorageError, StudyStoppedError, UserError
from study.storage.object_store import Remote

#: The lease file.
LEASE = "lease.json"


@dataclass(frozen=True)
class Holder:
    """The holder of a lease."""

    owner: str
    """Unique ID of each start."""
    host: str
    pid: int


@dataclass(frozen=True)
class LeaseTiming:
    """Durations in seconds."""

    expires: float = 60.0
    """A lease that has not been renewed for this long has expired."""
    renew: float = 10.0
    """Interval between renewals."""
    settle: float = 2.0
    """Wait before reading back; longer than another driver takes from reading to writing."""
    look: float = 1.0
    """Interval between reads of a lease that may expire."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, remote: Remote, me: Holder, times: LeaseTiming) -> None:
        """Create the lease; it is not yet written."""
        self._remote, self._me, self._times = remote, me, times
        self._lost: StudyStoppedError | None = None
        self._renewed = _now()
        self._renewals = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def write(self) -> None:
        """Write the lease, overwriting any other."""
        start = _now()
        # The counter makes a renewal visible even if the store's times are in whole seconds.
        content = {**asdict(self._me), "renewals": self._renewals}
        self._remote.write(LEASE, (json.dumps(content) + "\n").encode())
        self._renewals += 1
        self._renewed = start

    def check(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            StudyStoppedError: Another process holds it.
            StorageError: It has not been renewed for so long that another process may hold it.
        """
        if self._lost is None and _now() - self._renewed > self._times.expires:
            # The store was unreachable, or this machine was asleep.
            self._renew()
        if self._lost is not None:
            raise self._lost

    def renew_until_released(self) -> None:
        """Renew the lease periodically until it is lost or released."""
        while not self._ended.wait(self._times.renew) and self._lost is None:
            with contextlib.suppress(StorageError):  # `check` retries, and reports it
                self._renew()

    def release(self) -> None:
        """Release the lease; if the store cannot be reached, it expires."""
        self._ended.set()
        with self._lock, contextlib.suppress(StorageError):
            if _holder(self._remote.read(LEASE)) == self._me:
                self._remote.delete(LEASE)

    def _renew(self) -> None:
        with self._lock:
            if self._ended.is_set() or self._lost is not None:
                return
            holder = _holder(self._remote.read(LEASE))
            if holder is not None and holder != self._me:
                self._lost = StudyStoppedError(
                    f"{self._remote.uri} has been taken over by {holder.host} (pid {holder.pid}):"
                    " this process failed to renew its lease in time. Wait for that process to"
                    " finish, or stop it, before you resume."
                )
                return
            self.write()


@contextmanager
def hold_lease(
    remote: Remote, notify: Callable[[str], None] = print, times: LeaseTiming | None = None
) -> Iterator[Lease]:
    """Hold the lease on a study while a block runs.

    Args:
        remote: The run directory in the store.
        notify: Called once with a message while waiting for another process's lease.
        times: Override for tests.

    Raises:
        UserError: Another process is working on the study.
        StorageError: The store fails.
    """
    times = times or LeaseTiming()
    me = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid())
    takes_over = _wait_for_others(remote, notify, times)
    lease = Lease(remote, me, times)
    try:
        lease.write()
        # A process that was suspended may still renew an expired lease. It reads before it writes,
        # and will have seen this lease by then.
        time.sleep(times.settle + (times.renew if takes_over else 0.0))
        holder = _holder(remote.read(LEASE))
        if holder != me:
            raise _refused(remote, holder)
        threading.Thread(target=lease.renew_until_released, name="lease", daemon=True).start()
        yield lease
    finally:
        lease.release()


def _wait_for_others(remote: Remote, notify: Callable[[str], None], times: LeaseTiming) -> bool:
    """Wait until there is no lease or it has expired; return whether there was one."""
    first: bytes | None = None
    while True:
        entry, content = remote.find(LEASE), remote.read(LEASE)
        if entry is None or content is None:
            return first is not None
        holder = _holder(content)
        if first is not None and content != first:
            raise _refused(remote, holder)
        left = times.expires - (_store_time(remote) - entry.mtime)
        if left <= 0:
            return True
        if first is None:
            where = f"{holder.host} (pid {holder.pid})" if holder else "another machine"
            notify(
                f"{remote.uri}: {where} was working on this study a moment ago; waiting up to"
                f" {max(1, round(left))} s to see whether it still is."
            )
        first = content
        time.sleep(min(times.look, left + 0.01))


def _refused(remote: Remote, holder: Holder | None) -> UserError:
    where = f" on {holder.host} (pid {holder.pid})" if holder else ""
    return UserError(
        f"{remote.uri}: another process{where} is working on this study; wait for it to finish,"
        " stop it, or give another --name."
    )


def _store_time(remote: Remote) -> float:
    """Return the time of the store's clock, read from the mtime of a temporary file."""
    name = f".clock-{uuid.uuid4().hex}"
    remote.write(name, b"-")
    try:
        entry = remote.find(name)
    finally:
        remote.delete(name)
    if entry is None:
        raise StorageError(f"{remote.uri}: a file that was just written is missing; try again.")
    return entry.mtime


def _holder(content: bytes | None) -> Holder | None:
    """Return the holder of the lease; None if there is none or the lease is invalid."""
    try:
        found = None if content is None else json.loads(content)
        return found and Holder(found["owner"], found["host"], found["pid"])
    except (ValueError, TypeError, KeyError):
        return None


def _now() -> float:
    """Return seconds on a clock that keeps running while the machine sleeps."""
    return (
        time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()
    )
