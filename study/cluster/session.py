"""Ray for a study: one of its own, on this machine, or the cluster that it joins."""

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from ray._private import ray_constants

from study.cluster.machines import Machines, Node, check_address, check_reachable, cluster_address
from study.cluster.remote import live_nodes
from study.errors import UserError
from study.system.hardware import cpu_count, gpu_count

#: How many heaps a process that trains may have: one. Each trial has a thread of its own, glibc
#: gives threads heaps of their own, and those keep what a trial has freed: half a gigabyte after
#: some dozens of trials.
HEAPS = {"MALLOC_ARENA_MAX": "1"}


def find_machines(address: str | None, *, verbose: bool = False) -> Machines:
    """The machines as they are now; on a cluster, this process joins it.

    Args:
        address: Of the cluster, as the option gives it.
        verbose: Whether to show what Ray says.

    Raises:
        UserError: The cluster cannot be joined.
    """
    if cluster_address(address) is None:
        return Machines((Node("localhost", cpu_count(), gpu_count()),), is_cluster=False)
    _join_cluster(address, verbose=verbose)
    return Machines(tuple(live_nodes()), is_cluster=True)


@contextmanager
def ray_session(
    address: str | None, cores: int | None = None, *, verbose: bool = False
) -> Iterator[None]:
    """Run a block with Ray: the cluster's, or one of this machine's own cores and GPUs.

    Args:
        address: Of the cluster, as the option gives it.
        cores: How many of this machine's Ray gets; it starts a process for each, which takes
            0.4 GB once it has imported what runs need. None: all.
        verbose: Whether to show what Ray says.

    Raises:
        UserError: The cluster cannot be joined.
    """
    try:
        if cluster_address(address) is None:
            _start_here(cores or cpu_count(), verbose=verbose)
            _let_first_processes_serve_trials()
        else:
            _join_cluster(address, verbose=verbose)
        yield
    finally:
        ray.shutdown()


@contextmanager
def ray_ahead(cores: int, *, verbose: bool = False) -> Iterator[None]:
    """Start Ray ahead of a block whose imports take seconds; the block's `ray_session` finds it.

    Ray mostly waits for its processes to come up. Meanwhile a thread imports PyTorch, and once they
    are up, they import what runs need. A Ray that cannot be started is left to `ray_session`, which
    raises.

    Args:
        cores: How many of this machine's cores Ray gets.
        verbose: Whether to show what Ray says.
    """
    threading.Thread(target=_import_slow_packages).start()
    try:
        try:
            _start_here(cores, verbose=verbose)
        except Exception:  # `ray_session` tries again, and tells of it
            ray.shutdown()
        yield
    finally:
        ray.shutdown()


def _import_slow_packages() -> None:
    """Import packages that import nothing of Ray: two threads may wait for each other's imports."""
    for name in ("torch", "pandas", "optuna.storages", "alembic"):
        with contextlib.suppress(Exception):  # whoever needs it will say so
            importlib.import_module(name)


def _start_here(cores: int, *, verbose: bool) -> None:
    if ray.is_initialized():
        return
    _keep_to_loopback()
    _load_in_workers_at_once()
    os.environ.update(HEAPS | os.environ)
    # Ray reports its use to its makers and says so in a notice, which `start_ray` keeps off the
    # screen: nothing is reported that nobody was told of.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start_ray(verbose=verbose, address="local", num_cpus=cores, include_dashboard=False)


def start_ray(*, verbose: bool, **options: Any) -> None:
    """Call `ray.init` with Ray's own talk kept off the screen, unless it was asked for."""
    _quieten(verbose)
    with _own_sigterm():
        ray.init(
            configure_logging=verbose,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.CRITICAL,
            **options,
        )


def _join_cluster(wanted: str | None, *, verbose: bool) -> None:
    address = cluster_address(wanted)
    assert address is not None
    if ray.is_initialized():
        return
    option = "--address" if wanted else "RAY_ADDRESS"
    check_address(option, address)
    given = f"{option} {address}"
    check_reachable(given, address)
    join = partial(start_ray, verbose=verbose, address=address, runtime_env=_runtime_env())
    try:
        with _unheard():
            _join_with_token_if_need_be(join)
    except Exception as error:  # Ray raises its own, Python's and gRPC's errors
        raise UserError(f"{given}: {_why_not(error)}") from error


def _join_with_token_if_need_be(join: Callable[[], None]) -> None:
    # A cluster that wants none must not be shown a token: its workers could not answer.
    try:
        join()
    except ConnectionError:
        if not _use_token():
            raise
        join()


def _use_token() -> bool:
    """Show a token that is at hand from now on, unless RAY_AUTH_MODE says what to do; whether so.

    Where there is one, in ~/.ray since the first study, `ray start` lets nobody in without it; but
    a process that joins would not show it by itself.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return False
    try:
        from ray._private.authentication import authentication_token_setup
    except ImportError:  # before Ray 2.52 there are none
        return False
    return authentication_token_setup.maybe_enable_token_auth_if_token_available(
        warn_if_disabled=False
    )


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep off the screen what Ray's C++ code writes of its own accord while a block runs."""
    sys.stderr.flush()
    heard = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)


def _why_not(error: Exception) -> str:
    """Why a cluster could not be joined, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "find any running Ray" in text:
        return "no Ray runs on this machine; give host:port, or start one with `ray start --head`."
    if "Version mismatch" in text:
        return f"{text}. Install the same versions here as on the cluster."
    if "expects this IP address" in text or "node ip" in text.lower():
        return (
            "this machine is no node of that cluster. Run the command on one of its nodes, or"
            " submit it as a job: ray job submit --address http://HOST:8265 --working-dir . --"
            " python run_study.py ..."
        )
    if type(error).__name__ == "AuthenticationError" or "auth" in text.lower():
        return (
            "the cluster wants a token, and this process has not the right one: set"
            " RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    if "Failed to connect to Ray cluster" in text:
        return (
            "what answers there does not let this process in, or is no Ray. Where the cluster wants"
            " a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    return f"the cluster cannot be joined ({type(error).__name__}: {text[:300]})."


def _runtime_env() -> dict[str, Any]:
    """What lets every node import the project's packages, and has their processes save memory.

    A job that was submitted with a working directory, or with modules, has the packages already,
    and what else it has is its own affair.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if {"working_dir", "py_modules"} & (job.get("runtime_env") or {}).keys():
        return {}
    root = Path(__file__).parents[2]
    return {
        "py_modules": [str(root / name) for name in ("study", "search_spaces", "analysis")],
        "env_vars": HEAPS,
    }


def _load_in_workers_at_once() -> None:
    """Let a local Ray's processes, one per core, import what runs need as soon as they start."""
    os.environ.setdefault("RAY_preload_python_modules", "study.runs.worker")
    # Ray ends processes without work, five times a second. That caught every other search in the
    # moment between a core's being reserved for a trial and the trial.
    os.environ.setdefault("RAY_kill_idle_workers_interval_ms", "0")


def _let_first_processes_serve_trials() -> None:
    """Let trials run in the processes that Ray has started with itself.

    Ray Tune asks for environment variables (for PyTorch Lightning, and those of this process, which
    a local Ray hands on anyway), and Ray gives no work to a process that was started without them.
    """
    from ray.tune.execution import class_cache  # slow to import

    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


def _keep_to_loopback() -> None:
    """Let a local Ray listen on loopback only; Ray's default is all interfaces.

    The processes that Ray starts read the variable; this one has read it when it imported Ray.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


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
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", module="ray")
