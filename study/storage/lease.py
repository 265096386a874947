"""A lease on a study in a store, so that two drivers do not work on it.

The one that holds it renews it every few seconds; one that has not been renewed for a minute has
expired, and another driver takes over. How old it is, is told by the store's own clock, since the
clocks of two machines may differ. A store cannot write a file on condition that it is not there, so
two that come at the same moment both write, wait, and look: the last one's stands, and the other
gives way.
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

#: The file by which a driver holds a study.
LEASE = "lease.json"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    owner: str
    """Another one with every start."""
    host: str
    pid: int


@dataclass(frozen=True)
class LeaseTiming:
    """How long things take, in seconds."""

    expires: float = 60.0
    """A lease that has not been renewed for so long has expired."""
    renew: float = 10.0
    """Between renewals."""
    settle: float = 2.0
    """Longer than it takes another one from looking to writing."""
    look: float = 1.0
    """Between looks at a lease that may expire."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, remote: Remote, me: Holder, times: LeaseTiming) -> None:
        """Begin with one that is still to be written."""
        self._remote, self._me, self._times = remote, me, times
        self._lost: StudyStoppedError | None = None
        self._renewed = _now()
        self._renewals = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def write(self) -> None:
        """Write the lease, whoever's there is."""
        start = _now()
        # The number tells a renewal where the store's times are in whole seconds.
        content = {**asdict(self._me), "renewals": self._renewals}
        self._remote.write(LEASE, (json.dumps(content) + "\n").encode())
        self._renewals += 1
        self._renewed = start

    def check(self) -> None:
        """Make sure that this process still holds the lease.

        Raises:
            StudyStoppedError: Another one has it.
            StorageError: It could not be renewed for so long that another one may have it.
        """
        if self._lost is None and _now() - self._renewed > self._times.expires:
            # The store was out of reach, or this machine asleep.
            self._renew()
        if self._lost is not None:
            raise self._lost

    def renew_for_ever(self) -> None:
        """Renew the lease now and then, until it is lost or released."""
        while not self._ended.wait(self._times.renew) and self._lost is None:
            with contextlib.suppress(StorageError):  # `check` tries again, and says it
                self._renew()

    def release(self) -> None:
        """Let go of the lease; where the store cannot be reached, it expires."""
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
                    " this process had not renewed its lease in time."
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
        notify: Is told once if another's lease must be waited for.
        times: For tests.

    Raises:
        UserError: Another process works on the study.
        StorageError: The store does not do its part.
    """
    times = times or LeaseTiming()
    me = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid())
    takes_over = _wait_for_others(remote, notify, times)
    lease = Lease(remote, me, times)
    try:
        lease.write()
        # One that has expired may be renewed all the same, by a process that was held up: it looks
        # before it writes, and will have seen this one by then.
        time.sleep(times.settle + (times.renew if takes_over else 0.0))
        holder = _holder(remote.read(LEASE))
        if holder != me:
            raise _refused(remote, holder)
        threading.Thread(target=lease.renew_for_ever, name="lease", daemon=True).start()
        yield lease
    finally:
        lease.release()


def _wait_for_others(remote: Remote, notify: Callable[[str], None], times: LeaseTiming) -> bool:
    """Return where there is no lease, or an expired one; whether there was one."""
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
                f"{remote.uri}: {where} worked on this study a moment ago; waiting for up to"
                f" {max(1, round(left))} s to see whether it still does."
            )
        first = content
        time.sleep(min(times.look, left + 0.01))


def _refused(remote: Remote, holder: Holder | None) -> UserError:
    where = f" on {holder.host} (pid {holder.pid})" if holder else ""
    return UserError(
        f"{remote.uri}: another process works on this study{where}; wait for its end, stop it, or"
        " give another --name."
    )


def _store_time(remote: Remote) -> float:
    """What the store's clock shows, by the time of a file that is written for that."""
    name = f".clock-{uuid.uuid4().hex}"
    remote.write(name, b"-")
    try:
        entry = remote.find(name)
    finally:
        remote.delete(name)
    if entry is None:
        raise StorageError(f"{remote.uri}: a file that was just written is not there; try again.")
    return entry.mtime


def _holder(content: bytes | None) -> Holder | None:
    """Who holds the lease; None where nobody does, or where it makes no sense."""
    try:
        found = None if content is None else json.loads(content)
        return found and Holder(found["owner"], found["host"], found["pid"])
    except (ValueError, TypeError, KeyError):
        return None


def _now() -> float:
    """Seconds that go on while a machine sleeps."""
    return (
        time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()
    )
