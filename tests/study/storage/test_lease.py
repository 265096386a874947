"""Leases: two drivers, each its own process, compete for a study."""

import multiprocessing
import os
import re
import signal
import socket
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from study.errors import StorageError, StudyStoppedError, UserError
from study.storage.lease import LEASE, LeaseTiming, hold_lease
from study.storage.object_store import Remote

SPAWN = multiprocessing.get_context("spawn")

#: S3 reports times in whole seconds.
QUICK = LeaseTiming(expires=4.0, renew=0.5, settle=1.0, look=0.2)


@pytest.fixture
def remote(bucket: str) -> Remote:
    return Remote(bucket).child("study")


def contend(
    remote: Remote, start: "Barrier", ended: "Event", outcomes: "Queue[tuple[int, str]]"
) -> None:
    start.wait(60)
    try:
        with hold_lease(remote, times=QUICK) as lease:
            outcomes.put((os.getpid(), "holds it"))
            ended.wait(60)
            lease.check()
    except UserError as error:
        outcomes.put((os.getpid(), str(error)))


def test_only_one_of_two_simultaneous_drivers_gets_the_lease(remote: Remote) -> None:
    start, ended, outcomes = SPAWN.Barrier(2), SPAWN.Event(), SPAWN.Queue()
    arguments = (remote, start, ended, outcomes)
    both = [SPAWN.Process(target=contend, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    try:
        found = dict(outcomes.get(timeout=60) for _ in range(2))
        (winner,) = [pid for pid, outcome in found.items() if outcome == "holds it"]
        (refusal,) = [outcome for outcome in found.values() if outcome != "holds it"]
        host = socket.gethostname()
        assert f"another process on {host} (pid {winner}) is working on this study; wait" in refusal
        ended.set()
        for process in both:
            process.join(60)
            assert process.exitcode == 0
        assert remote.files() == [], "the lease was not released"
    finally:
        for process in both:
            process.kill()


@pytest.mark.integration
def test_live_lease_is_respected_and_dead_one_is_taken_over(
    remote: Remote,
) -> None:
    start, ended, outcomes = SPAWN.Barrier(1), SPAWN.Event(), SPAWN.Queue()
    process = SPAWN.Process(target=contend, args=(remote, start, ended, outcomes))
    process.start()
    try:
        assert outcomes.get(timeout=60)[1] == "holds it"
        notices: list[str] = []
        with (
            pytest.raises(
                UserError, match=rf"process on .* \(pid {process.pid}\) is working on this study"
            ),
            hold_lease(remote, notices.append, QUICK),
        ):
            pass
        assert len(notices) == 1
        assert "waiting up to" in notices[0]
        assert remote.exists(LEASE)
        process.kill()
        process.join()
        before = time.monotonic()
        with hold_lease(remote, notices.append, QUICK) as lease:
            assert time.monotonic() - before > 1, "the old lease was not waited for"
            lease.check()
        assert len(notices) == 2
        assert not remote.exists(LEASE)
    finally:
        process.kill()


@pytest.mark.parametrize("hours", [-1, 1])
def test_lease_tolerates_wrong_machine_clocks(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The age of a lease is measured by the store's clock."""
    clock = time.time
    with hold_lease(remote, times=QUICK):
        monkeypatch.setattr("time.time", lambda: clock() + 3600 * hours)
        notices: list[str] = []
        with (
            pytest.raises(UserError, match=r"another process .* is working on this study"),
            hold_lease(remote, notices.append, QUICK),
        ):
            pass
        assert re.search(r"waiting up to [1-5] s", notices[0])


@pytest.mark.integration
def test_suspended_process_detects_that_it_lost_the_lease(remote: Remote) -> None:
    """For example a laptop that slept; it must not overwrite the other driver's work."""
    start, ended, outcomes = SPAWN.Barrier(1), SPAWN.Event(), SPAWN.Queue()
    process = SPAWN.Process(target=contend, args=(remote, start, ended, outcomes))
    process.start()
    try:
        assert outcomes.get(timeout=60)[1] == "holds it"
        assert process.pid
        os.kill(process.pid, signal.SIGSTOP)
        with hold_lease(remote, lambda _: None, QUICK) as lease:
            # In this order, since setting an event waits for its waiters.
            os.kill(process.pid, signal.SIGCONT)
            ended.set()
            outcome = outcomes.get(timeout=60)[1]
            host = socket.gethostname()
            assert f"has been taken over by {host} (pid {os.getpid()})" in outcome
            process.join(60)
            lease.check()
            assert remote.exists(LEASE), "the loser released the winner's lease"
    finally:
        process.kill()


def test_lease_that_cannot_be_renewed_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote((tmp_path / "store").as_uri())
    times = LeaseTiming(expires=0.6, renew=0.1, settle=0.0, look=0.1)

    def failing(*_: object) -> None:
        raise StorageError("it cannot be reached.")

    with hold_lease(remote, times=times) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "write", failing)
            lease.check()
            time.sleep(1)
            with pytest.raises(StorageError, match="cannot be reached"):
                lease.check()
        lease.check()
        remote.write(LEASE, b'{"owner": "x", "host": "elsewhere", "pid": 7}')
        time.sleep(0.5)
        with pytest.raises(StudyStoppedError, match=r"taken over by elsewhere \(pid 7\)"):
            lease.check()
    assert remote.exists(LEASE)


def test_lease_is_released_on_any_exception(tmp_path: Path) -> None:
    remote = Remote((tmp_path / "store").as_uri())
    times = LeaseTiming(settle=0.0)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), hold_lease(remote, times=times):
            raise error
        assert not remote.exists(LEASE)
