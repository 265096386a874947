"""Ray sessions: a local Ray, or an existing cluster."""

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

#: Environment of workers: one malloc arena. Each trial runs in a new thread; glibc would give each
#: its own arena, which retains freed memory: half a gigabyte after dozens of trials.
WORKER_ENV = {"MALLOC_ARENA_MAX": "1"}


def find_machines(address: str | None, *, verbose: bool = False) -> Machines:
    """Return the machines currently available; for a cluster, this process joins it.

    Args:
        address: Value of --address.
        verbose: Whether to show Ray's output.

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
    """Run a block with Ray: an existing cluster, or a local Ray on this machine.

    Args:
        address: Value of --address.
        cores: Cores of a local Ray; it starts a worker for each, which takes 0.4 GB once it has
            imported what runs need. None: all.
        verbose: Whether to show Ray's output.

    Raises:
        UserError: The cluster cannot be joined.
    """
    try:
        if cluster_address(address) is None:
            _start_local(cores or cpu_count(), verbose=verbose)
            _run_trials_in_first_workers()
        else:
            _join_cluster(address, verbose=verbose)
        yield
    finally:
        ray.shutdown()


@contextmanager
def ray_started_early(cores: int, *, verbose: bool = False) -> Iterator[None]:
    """Start Ray before a block with slow imports; `ray_session` in the block reuses it.

    Starting Ray is mostly waiting for its processes. Meanwhile a thread imports PyTorch, and once
    the workers are up, they import what runs need. If Ray cannot be started, `ray_session` tries
    again and raises.

    Args:
        cores: Cores for Ray.
        verbose: Whether to show Ray's output.
    """
    threading.Thread(target=_import_slow_packages).start()
    try:
        try:
            _start_local(cores, verbose=verbose)
        except Exception:  # `ray_session` tries again and raises
            ray.shutdown()
        yield
    finally:
        ray.shutdown()


def _import_slow_packages() -> None:
    """Import slow packages that do not import Ray: import locks of two threads may deadlock."""
    for name in ("torch", "pandas", "optuna.storages", "alembic"):
        with contextlib.suppress(Exception):  # raised again where it is needed
            importlib.import_module(name)


def _start_local(cores: int, *, verbose: bool) -> None:
    if ray.is_initialized():
        return
    _listen_on_loopback_only()
    _preload_in_workers()
    os.environ.update(WORKER_ENV | os.environ)
    # `start_ray` hides Ray's notice that it reports usage statistics, so they are off by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start_ray(verbose=verbose, address="local", num_cpus=cores, include_dashboard=False)


def start_ray(*, verbose: bool, **options: Any) -> None:
    """Call `ray.init`, hiding Ray's output unless verbose."""
    _silence(verbose)
    with _kept_sigterm_handler():
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
        with _silenced_stderr():
            _join_with_token_if_needed(join)
    except Exception as error:  # Ray raises its own, Python's and gRPC's errors
        raise UserError(f"{given}: {_explain_join_error(error)}") from error


def _join_with_token_if_needed(join: Callable[[], None]) -> None:
    # Try without a token first: if a cluster without authentication gets one, its workers fail.
    try:
        join()
    except ConnectionError:
        if not _use_token():
            raise
        join()


def _use_token() -> bool:
    """Use an available token from now on unless RAY_AUTH_MODE is set; return whether one is used.

    If there is one in ~/.ray, `ray start` requires it, but a joining process does not send it by
    default.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return False
    try:
        from ray._private.authentication import authentication_token_setup
    except ImportError:  # Ray before 2.52 has no tokens
        return False
    return authentication_token_setup.maybe_enable_token_auth_if_token_available(
        warn_if_disabled=False
    )


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Discard what Ray's C++ code writes to stderr while a block runs."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _explain_join_error(error: Exception) -> str:
    """Explain why a cluster could not be joined, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "find any running Ray" in text:
        return "no Ray runs on this machine; give host:port, or start Ray with `ray start --head`."
    if "Version mismatch" in text:
        return f"{text}. Install the same versions here as on the cluster."
    if "expects this IP address" in text or "node ip" in text.lower():
        return (
            "this machine is not a node of that cluster. Run the command on one of its nodes, or"
            " submit a job: ray job submit --address http://HOST:8265 --working-dir . --"
            " python run_study.py ..."
        )
    if type(error).__name__ == "AuthenticationError" or "auth" in text.lower():
        return (
            "the cluster requires a token that this process does not have: set"
            " RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    if "Failed to connect to Ray cluster" in text:
        return (
            "the server there refuses this process, or is not Ray. If the cluster requires a"
            " token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    return f"the cluster cannot be joined ({type(error).__name__}: {text[:300]})."


def _runtime_env() -> dict[str, Any]:
    """Return the runtime environment: the project's packages, and WORKER_ENV to save memory.

    Empty for a job submitted with a working directory or modules, which has the packages already.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if {"working_dir", "py_modules"} & (job.get("runtime_env") or {}).keys():
        return {}
    root = Path(__file__).parents[2]
    return {
        "py_modules": [str(root / name) for name in ("study", "search_spaces", "analysis")],
        "env_vars": WORKER_ENV,
    }


def _preload_in_workers() -> None:
    """Make a local Ray's workers, one per core, import what runs need as soon as they start."""
    os.environ.setdefault("RAY_preload_python_modules", "study.runs.worker")
    # Ray looks for idle workers to kill five times a second. In every other search it killed one
    # between the reservation of its core and the start of its trial.
    os.environ.setdefault("RAY_kill_idle_workers_interval_ms", "0")


def _run_trials_in_first_workers() -> None:
    """Run trials in the workers that Ray starts with.

    Ray Tune requests environment variables (for PyTorch Lightning, and those of this process, which
    a local Ray passes on anyway), and Ray gives no work to a worker started without them.
    """
    from ray.tune.execution import class_cache  # slow to import

    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


def _listen_on_loopback_only() -> None:
    """Make a local Ray listen on loopback only; Ray's default is all interfaces.

    Ray's processes read the variable; this process has already read it when importing Ray.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def _kept_sigterm_handler() -> Iterator[None]:
    """Keep this process's SIGTERM handler: `ray.init` sets one that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler ran first
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def _silence(verbose: bool) -> None:
    """Hide the output of Ray and Optuna unless verbose."""
    if verbose:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "1000")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", module="ray")
