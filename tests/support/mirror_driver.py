"""A driver for tests to kill: the search of a tiny study in an object store.

python -m tests.support.mirror_driver URI FOLDER TRIALS
"""

import sys
from pathlib import Path

import ray

from tests.support.tiny_study import in_store, make_study, search_study


def main() -> None:
    """Run the whole search."""
    uri, folder, trials = sys.argv[1:]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    study, mirror = in_store(make_study(Path(folder), trials=int(trials)), uri, tick=0.2)
    search_study(study)
    mirror.finish()


if __name__ == "__main__":
    main()
