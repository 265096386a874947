"""A study's run directory while a process works on it."""

from contextlib import contextmanager

from study.integrity import only_writer


@contextmanager
def held(study, screen):
    with only_writer(study.rundir):
        yield study
