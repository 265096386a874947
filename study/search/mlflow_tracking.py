"""Log trials and register the best model in MLflow (`--mlflow`).

MLflow is optional and slow to import: import this module only if needed, in the driver only.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import mlflow.onnx
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial

from analysis.rundir import EpochRow, TrialRow
from study.errors import UserError
from study.screen import Screen
from study.search.scheduler import SCORE
from study.search.searcher import StudySearch
from study.study import Study

# MLflow's messages would clutter the study's own output.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
for _logger in ("mlflow", "urllib3"):
    logging.getLogger(_logger).setLevel(logging.CRITICAL)

#: The metrics logged per epoch.
METRICS = (
    "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_balanced_accuracy", SCORE,
)  # fmt: skip

#: Request timeout (seconds) and number of retries. MLflow's defaults could block a study for
#: minutes. Environment variables set by the user take precedence.
_REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

#: Seconds without requests after the server has failed.
_PAUSE = 60.0

#: Tag with the final state of a trial. It is set last, so a run that has it is complete.
_STATE = "state"

#: Epochs per request; MLflow accepts at most 1,000 values.
_EPOCHS_AT_ONCE = 100


def check_server(uri: str, name: str, *, is_new: bool) -> None:
    """Check, before a study starts, that MLflow can track it.

    Args:
        uri: The value of `--mlflow`.
        name: Name of the study and of its experiment.
        is_new: Whether this is the first start of the study.

    Raises:
        UserError: The URI is invalid, the server does not respond, or the experiment cannot be
            used.
    """
    _check_uri(uri)
    try:
        with _request_limits():
            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name(name)
            deleted = experiment is not None and experiment.lifecycle_stage == "deleted"
            taken = (
                is_new
                and experiment is not None
                and not deleted
                and bool(client.search_runs([experiment.experiment_id], max_results=1))
            )
    except Exception as error:  # MLflow's, requests', SQLAlchemy's
        raise UserError(
            f"--mlflow {uri}: {_reason(error)}. Start the server (`mlflow server`), correct the"
            " address, or turn tracking off with `--mlflow None`."
        ) from error
    if deleted or taken:
        what = "was deleted there" if deleted else "holds runs of another study"
        remedy = "restore it" if deleted else "rename it"
        raise UserError(
            f"--mlflow {uri}: the experiment {name} {what}; {remedy}, or choose another --name."
        )


class TrialTracker(MLflowLoggerCallback):
    """A Ray Tune callback with one MLflow run per trial, however often the trial is resumed.

    A server failure does not affect the study: `catch_up` logs what the server has missed.
    """

    def __init__(self, study: Study, screen: Screen) -> None:
        """Prepare to log, without contacting the server yet.

        Args:
            study: The study to track; its config has the server's address.
            screen: Shows a message, once, if the server fails.
        """
        super().__init__(tracking_uri=study.config.mlflow, experiment_name=study.config.name)
        self._study, self._screen = study, screen
        self._searcher: StudySearch | None = None
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._ids: dict[str, str] = {}
        """MLflow run ids by run id of the study."""
        self._open: dict[str, _OpenRun] = {}
        self._paused_until = 0.0
        self._has_failed = False

    def following(self, searcher: StudySearch) -> "TrialTracker":
        """Return the tracker itself, set to ask this searcher how trials ended."""
        self._searcher = searcher
        return self

    def setup(self, *arguments: object, **info: object) -> None:
        """Do nothing: the first logging call connects."""

    def log_trial_start(self, trial: Trial) -> None:
        """Start or resume the trial's run."""
        self._log(lambda: self._open_run(trial.config))

    def log_trial_result(self, iteration: int, trial: Trial, result: Mapping[str, Any]) -> None:
        """Log an epoch."""
        self._log(lambda: self._log_epochs(self._open_run(trial.config), [result]))

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """End the trial's run, unless the trial will be resumed or epochs are missing."""
        assert self._searcher is not None
        end = self._searcher.end_of(trial.trial_id)
        reached = (trial.last_result or {}).get("epoch", 0)
        if end is None:
            return
        state, error = end

        def log_end() -> None:
            run = self._open_run(trial.config)
            if run.epochs >= set(range(1, reached + 1)):
                self._end_run(trial.config["run_id"], state, error, trial.config["attempt"])

        self._log(log_end)

    def interrupt(self) -> None:
        """Mark all open runs as killed, so that none appears to be still running."""

        def end_all() -> None:
            for run in self._open.values():
                self._connect().set_terminated(run.mlflow_id, "KILLED")

        self._log(end_all)

    def catch_up(self, ended: Iterable[TrialRow]) -> None:
        """Log the trials that are missing or incomplete on the server.

        Args:
            ended: The trials of the study that have ended; no trial is running.
        """
        self._paused_until = 0.0
        self._log(lambda: self._catch_up(ended))

    def _catch_up(self, ended: Iterable[TrialRow]) -> None:
        found = _find_runs(self._connect(), self._experiment)
        whole = {name for name, run in found.items() if _STATE in run.data.tags}
        lacking = [row for row in ended if row.run_id not in whole]
        rows = self._study.rundir.read_epochs() if lacking else []
        epochs: dict[str, list[EpochRow]] = {}
        for row in rows:
            epochs.setdefault(row.run_id, []).append(row)
        for trial in lacking:
            run = self._open_run(asdict(trial))
            self._log_epochs(run, [asdict(row) for row in epochs.get(trial.run_id, [])])
            self._end_run(trial.run_id, trial.state, trial.error, trial.attempts, trial.end)
        for name in found.keys() - whole - {trial.run_id for trial in lacking}:
            # Left by a driver that was killed; the trial has not been resumed.
            self._connect().set_terminated(found[name].info.run_id, "KILLED")

    def _log(self, what: Callable[[], object]) -> None:
        """Call `what`, unless the server failed recently; errors are shown, not raised."""
        if time.monotonic() < self._paused_until:
            return
        try:
            with _request_limits():
                what()
        except Exception as error:  # MLflow's, requests', SQLAlchemy's
            self._paused_until = time.monotonic() + _PAUSE
            if not self._has_failed:
                self._screen.print(
                    f"MLflow at {self.tracking_uri} failed: {_reason(error)}. The study continues"
                    " without it; missing data is logged at the end of the search or by --resume,"
                    " once the server responds again."
                )
            self._has_failed = True

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = MlflowClient(tracking_uri=self.tracking_uri)
            # By id: a name would be overridden by MLFLOW_EXPERIMENT_ID, if the user has set it.
            self._experiment = _experiment_id(client, str(self.experiment_name))
            self.mlflow_util.setup_mlflow(self.tracking_uri, experiment_id=self._experiment)
            found = _find_runs(client, self._experiment)
            self._ids = {name: run.info.run_id for name, run in found.items()}
            self._client = client
        return self._client

    def _open_run(self, trial: Mapping[str, Any]) -> "_OpenRun":
        """Return the MLflow run of a trial, given its config or its row of trials.csv."""
        name = trial["run_id"]
        if name in self._open:
            return self._open[name]
        client = self._connect()
        if name in self._ids:
            mlflow_id = self._ids[name]
            client.update_run(mlflow_id, status="RUNNING")
            history = client.get_metric_history(mlflow_id, "val_loss")
            run = _OpenRun(mlflow_id, {metric.step for metric in history})
        else:
            tags = {"phase": "search", "run_id": name, "arm": trial["arm"]}
            created = client.create_run(
                self._experiment,
                start_time=_milliseconds(trial.get("start")),
                tags=tags,
                run_name=name,
            )
            run = _OpenRun(created.info.run_id, set())
            self._ids[name] = run.mlflow_id
        # Logging them again to a resumed run changes nothing.
        values = {**trial["hyperparameters"], "seed": trial["seed"]}
        params = [Param(key, str(value)) for key, value in values.items()]
        client.log_batch(run.mlflow_id, params=params)
        self._open[name] = run
        return run

    def _log_epochs(self, run: "_OpenRun", epochs: Iterable[Mapping[str, Any]]) -> None:
        """Log the epochs that the server lacks; a resumed trial reports some twice."""
        new = [epoch for epoch in epochs if epoch["epoch"] not in run.epochs]
        for start in range(0, len(new), _EPOCHS_AT_ONCE):
            part = new[start : start + _EPOCHS_AT_ONCE]
            metrics = [metric for epoch in part for metric in epoch_metrics(epoch)]
            self._connect().log_batch(run.mlflow_id, metrics=metrics)
            run.epochs.update(epoch["epoch"] for epoch in part)

    def _end_run(
        self, name: str, state: str, error: str, attempts: int, end: float | None = None
    ) -> None:
        client, run = self._connect(), self._open[name]
        status = "FAILED" if state in ("diverged", "failed") else "FINISHED"
        client.set_terminated(run.mlflow_id, status, _milliseconds(end))
        tags = {"attempts": str(attempts), "error": error[:1000], _STATE: state}
        client.log_batch(run.mlflow_id, tags=[RunTag(k, v) for k, v in tags.items() if v])
        del self._open[name]


@dataclass(frozen=True)
class _OpenRun:
    """A run that is being logged."""

    mlflow_id: str
    epochs: set[int]
    """Epochs that the server already has."""


def epoch_metrics(epoch: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics to log for an epoch, with the epoch as step and its end as timestamp.

    Args:
        epoch: A reported result, or a row of epochs.jsonl. Values that are not finite are omitted,
            since not every MLflow backend accepts them.
    """
    when = int(1000 * epoch["end"])
    values = {name: epoch.get(name, math.nan) for name in METRICS}
    return [
        Metric(name, value, when, epoch["epoch"])
        for name, value in values.items()
        if math.isfinite(value)
    ]


def register_best_model(study: Study, screen: Screen) -> None:
    """Register best_model/ in MLflow's model registry under the study's name.

    Errors are only shown on the screen, since the model is already in the run directory.
    """
    uri, name = str(study.config.mlflow), str(study.config.name)
    try:
        number = log_best_model(uri, name, study.rundir.best_model)
    except Exception as error:  # MLflow's, requests', SQLAlchemy's, a file's
        screen.print(
            f"MLflow at {uri}: the best model was not registered: {_reason(error)}. It is saved in"
            f" {study.rundir.best_model}; fix the problem, then --resume registers it."
        )
        return
    screen.print(f"MLflow at {uri}: the best model is registered as {name}, version {number}.")


def log_best_model(uri: str, name: str, folder: Path) -> str:
    """Log an exported model as a run of the study's experiment, and register it.

    If the same model is already registered, do nothing.

    Args:
        uri: URI of the tracking server.
        name: Name of the study, the experiment and the registered model.
        folder: Folder with model.onnx and config.json.

    Returns:
        The version under which the model is registered.

    Raises:
        Exception: Any error from MLflow or the file system.
    """
    config = json.loads((folder / "config.json").read_text())
    content = (folder / "model.onnx").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(tracking_uri=uri)
    with _request_limits():
        experiment_id = _experiment_id(client, name)
        for run in client.search_runs([experiment_id], f"tags.sha256 = '{digest}'"):
            if "version" in run.data.tags:
                return str(run.data.tags["version"])
    tags = {
        "phase": "export",
        "sha256": digest,
        **{key: str(config[key]) for key in ("run_id", "chosen_by") if key in config},
    }
    created = client.create_run(experiment_id, tags=tags, run_name="best-model")
    run_id = created.info.run_id
    try:
        number = _log_model(client, run_id, name, folder, config)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_tag(run_id, "version", number)
    client.set_terminated(run_id, "FINISHED")
    return number


def _log_model(
    client: MlflowClient, run_id: str, name: str, folder: Path, config: Mapping[str, Any]
) -> str:
    """Log the best model to its run, register it and return the version."""
    now = int(time.time() * 1000)
    measured = {k: v for k, v in config.get("test", {}).items() if isinstance(v, int | float)}
    metrics = [Metric(f"test_{key}", value, now, 0) for key, value in measured.items()]
    params = [Param(key, str(value)) for key, value in config.get("hyperparameters", {}).items()]
    client.log_batch(run_id, metrics=metrics, params=params)
    for file in (folder / "config.json", folder / "README.md"):
        if file.exists():
            client.log_artifact(run_id, str(file))
    # MLflow reports the registration on stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        logged = mlflow.onnx.log_model(
            onnx.load(folder / "model.onnx"),
            name="model",
            run_id=run_id,
            registered_model_name=name,
            signature=signature(len(config["label_names"])),
            metadata={"label_names": config["label_names"]},
            # Otherwise MLflow loads the model in a separate process to infer these.
            pip_requirements=[
                f"{package}=={version(package)}" for package in ("numpy", "onnx", "onnxruntime")
            ],
            # Otherwise ONNX Runtime is asked for CUDA and warns on machines without it.
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    return str(logged.registered_model_version)


def signature(classes: int) -> ModelSignature:
    """Return the input and output schema of the exported model."""
    probabilities = (-1, classes)
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3), "images")]),
        outputs=Schema(
            [
                TensorSpec(np.dtype("float32"), probabilities, "logits"),
                TensorSpec(np.dtype("float32"), probabilities, "probabilities"),
            ]
        ),
    )


def _find_runs(client: MlflowClient, experiment_id: str) -> dict[str, Run]:
    """Return the trial runs found in MLflow, by run id of the study."""
    found: dict[str, Run] = {}
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], "tags.phase = 'search'", max_results=1000, page_token=token
        )
        found |= {run.data.tags["run_id"]: run for run in page}
        token = page.token
        if not token:
            return found


def _experiment_id(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


@contextlib.contextmanager
def _request_limits() -> Iterator[None]:
    """Apply `_REQUEST_LIMITS` within a block."""
    ours = [name for name in _REQUEST_LIMITS if name not in os.environ]
    os.environ.update({name: _REQUEST_LIMITS[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _check_uri(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        is_valid = bool(uri) and not (parts.scheme in ("http", "https") and not parts.hostname)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(
            f"--mlflow {uri}: not a valid address; use one such as http://127.0.0.1:5000 or"
            " sqlite:///FILE."
        )
    if parts.username or parts.password:
        raise UserError(
            "--mlflow: remove user and password from the address, which is recorded; set"
            " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead."
        )


def _reason(error: Exception) -> str:
    """Describe an error in a phrase."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if "unsupported URI" in text:
        return "MLflow does not support this address; use http://HOST:PORT or sqlite:///FILE"
    if "Max retries exceeded" in text:
        found = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
        return f"the server does not respond {f'({found[1]})' if found else 'in time'}"
    return f"{type(error).__name__}: {text[:300].rstrip('.')}"


def _milliseconds(seconds: float | None) -> int | None:
    """Convert a time for MLflow; None, which MLflow takes as now, if it is unknown."""
    return None if seconds is None or math.isnan(seconds) else int(1000 * seconds)
