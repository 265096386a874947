"""Signals end a study wherever they arrive."""

import subprocess
import sys

#: Python cannot propagate exceptions raised in a destructor; it prints them instead.
LOST = """
import os, signal, sys
from study.system import signals

class Destroyed:
    def __del__(self):
        {in_destructor}

signals.install_handlers()
Destroyed()
print("went on")
try:
    signals.raise_if_received()
except KeyboardInterrupt:
    sys.exit(signals.exit_status())
"""


def run(in_destructor: str) -> "subprocess.CompletedProcess[str]":
    code = LOST.format(in_destructor=in_destructor)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_signal_swallowed_by_a_destructor_ends_the_study_without_a_traceback() -> None:
    done = run("os.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout, done.stderr) == (143, "went on\n", "")


def test_other_errors_in_a_destructor_are_still_reported() -> None:
    done = run("1 / 0")
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert "ZeroDivisionError" in done.stderr
