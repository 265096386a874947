"""A driver to be killed: the search of a tiny study that is kept in a store.

python -m tests.mirror_driver URI FOLDER TRIALS
"""

import sys
from dataclasses import replace
from pathlib import Path

import ray

from analysis.rundir import RunDir
from study.mirror import DriverMirror
from study.storage import Remote
from tests.tiny import make_study, run_search


def main() -> None:
    """Search until the end."""
    uri, folder, trials = sys.argv[1:]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    study = make_study(Path(folder), trials=int(trials))
    remote = Remote(uri)
    mirror = DriverMirror(study.rundir.path, remote, tick=0.2)
    study = replace(study, rundir=RunDir(study.rundir.path, mirror))
    study.rundir.write_study(study.rundir.read_study())
    run_search(study, remote=remote)
    mirror.finish()


if __name__ == "__main__":
    main()
