"""A local Ray, started for a study and stopped with it."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from study.config import StudyConfig
from study.hardware import cpu_count


@contextmanager
def local_ray(config: StudyConfig) -> Iterator[None]:
    """Run a block with a Ray of this machine's own cores and GPUs."""
    _quieten(config.verbose)
    try:
        with _own_sigterm():
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                include_dashboard=False,
                configure_logging=config.verbose,
                log_to_driver=config.verbose,
                logging_level=logging.INFO if config.verbose else logging.CRITICAL,
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does on SIGTERM: `ray.init` sets a handler that ends it at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler was quicker
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _quieten(verbose: bool) -> None:
    """Keep Ray's and Optuna's own talk off the screen unless it was asked for."""
    if verbose:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "1000")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", module="ray")
