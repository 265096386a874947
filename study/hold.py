"""A run directory while a process works on it: held against others, and kept up in its store."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from analysis.rundir import RunDir
from study.integrity import only_writer
from study.lease import hold
from study.mirror import DriverMirror
from study.screen import Screen
from study.study import Study


@contextmanager
def held(study: Study, screen: Screen) -> Iterator[Study]:
    """Hold a study while a block works on it; gives the study to work with.

    A study that is kept in a store is brought here first. What happens to its files then follows
    to the store, and when the block has come to its end, everything is there.

    Args:
        study: As `check` gives it.
        screen: Is told if another process's hold must be waited for.

    Raises:
        UserError: Another process works on it.
        StorageError: The place where it is kept cannot be read or written to.
    """
    with only_writer(study.rundir):
        if study.remote is None:
            yield study
            return
        with hold(study.remote, screen.print) as lease:
            mirror = DriverMirror(study.rundir.path, study.remote, guard=lease.check)
            try:
                mirror.pull()
                yield replace(study, rundir=RunDir(study.rundir.path, mirror))
                mirror.finish()
            finally:
                mirror.close()
