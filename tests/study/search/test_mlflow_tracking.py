"""Trials and the best model on a real MLflow server, and studies whose server is unavailable."""

import json
import math
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import numpy as np
import onnx
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run
from onnx import TensorProto, helper
from ray.tune.experiment import Trial

from analysis.rundir import TrialRow
from study.config import StudyConfig, as_arguments
from study.errors import UserError
from study.screen import Screen
from study.search.mlflow_tracking import TrialTracker, epoch_metrics, register_best_model
from study.search.tune import check_tracking
from study.study import Study, parse_config, resolve_study
from study.system import signals
from tests.support.faults import (
    import_nothing_of_mlflow,
    kill_the_worker,
    raise_or_diverge,
    trial_with,
)
from tests.support.servers.mlflow import install_mlflow, kill_mlflow, start_mlflow
from tests.support.tiny_study import EPOCHS, make_study, search_study, start_ray

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def server_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_mlflow(tmp_path_factory.mktemp("mlflow") / "venv")


@pytest.fixture(scope="module")
def server(server_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, uri = start_mlflow(server_python, tmp_path_factory.mktemp("mlflow"))
    yield uri
    kill_mlflow(process.pid)
    process.wait()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that injects a fault into trials."""

    def set_fault(what: Callable[[], None], **options: Any) -> None:
        monkeypatch.setattr("study.search.tune.run_trial", trial_with(what, **options))

    return set_fault


def tracked_study(folder: Path, uri: str, **options: Any) -> Study:
    """Return a tiny study with a unique name, since all tests share the server."""
    study = make_study(folder, **options)
    return replace(study, config=replace(study.config, mlflow=uri, name=folder.name))


def runs_of(study: Study) -> list[Run]:
    client = MlflowClient(tracking_uri=study.config.mlflow)
    experiment = client.get_experiment_by_name(str(study.config.name))
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def check_runs(study: Study) -> None:
    """Check that there is one run per trial and that it agrees with trials.csv and epochs.jsonl."""
    client = MlflowClient(tracking_uri=study.config.mlflow)
    trials = {row.run_id: row for row in study.rundir.read_trials()}
    runs = runs_of(study)
    assert sorted(run.info.run_name for run in runs) == sorted(trials)
    epochs = study.rundir.read_epochs()
    for run in runs:
        trial = trials[run.info.run_name]
        check_run(run, trial)
        rows = [row for row in epochs if row.run_id == trial.run_id]
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "score"):
            history = client.get_metric_history(run.info.run_id, name)
            logged = [(point.step, point.value) for point in history]
            assert logged == [(row.epoch, getattr(row, name)) for row in rows]


def check_run(run: Run, trial: TrialRow) -> None:
    broken = trial.state in ("diverged", "failed")
    assert run.info.status == ("FAILED" if broken else "FINISHED")
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    assert tags.pop("error", "") == trial.error
    assert tags == {
        "phase": "search",
        "run_id": trial.run_id,
        "arm": trial.arm,
        "state": trial.state,
        "attempts": str(trial.attempts),
    }
    values = {**trial.hyperparameters, "seed": trial.seed}
    assert run.data.params == {name: str(value) for name, value in values.items()}


def test_every_trial_has_a_run_with_its_final_state(
    tmp_path: Path, server: str, fault: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fault(raise_or_diverge, victim=".*-001")
    study = tracked_study(tmp_path, server, trials=12)
    trials = search_study(study)
    assert {state for state, _ in trials.values()} == {"completed", "pruned", "diverged", "failed"}
    check_runs(study)
    printed = capsys.readouterr()
    assert "MLflow" not in printed.out
    assert printed.err == ""


def test_a_trial_whose_process_dies_continues_in_the_same_run(
    tmp_path: Path,
    server: str,
    fault: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything is logged right away, not only by `catch_up` at the end of the search."""
    monkeypatch.setattr(TrialTracker, "catch_up", lambda *_: None)
    fault(kill_the_worker)
    study = tracked_study(tmp_path, server)
    assert search_study(study)["dropout-001"][1] == 2
    check_runs(study)


def test_an_interrupted_study_continues_in_the_same_runs(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tracked_study(tmp_path, server)

    def interrupt_in_the_middle() -> None:
        if len(study.rundir.read_epochs()) > EPOCHS:
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(signals, "raise_if_received", interrupt_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            search_study(study)
    started = runs_of(study)
    unfinished = [run for run in started if "state" not in run.data.tags]
    assert unfinished
    assert {run.info.status for run in unfinished} == {"KILLED"}
    # As a killed driver leaves them.
    client = MlflowClient(tracking_uri=server)
    client.update_run(unfinished[0].info.run_id, status="RUNNING")
    # The command would shut down Ray, and with it any running trial.
    ray.shutdown()
    start_ray()
    search_study(study)
    check_runs(study)
    assert {run.info.run_id for run in started} <= {run.info.run_id for run in runs_of(study)}


def test_a_server_that_dies_does_not_affect_the_study_and_is_caught_up(
    tmp_path: Path,
    server_python: Path,
    fault: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process, uri = start_mlflow(server_python, tmp_path)
    pid = process.pid
    try:
        fault(lambda: kill_mlflow(pid))
        study = tracked_study(tmp_path, uri)
        trials = search_study(study)
        process.wait()
        printed = capsys.readouterr().out
        assert len(trials) == 6
        assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
        assert printed.count(f"MLflow at {uri} failed: the server does not respond (Conn") == 1
        assert "MLflow" not in printed.replace(f"MLflow at {uri} failed", "")
        process, _ = start_mlflow(server_python, tmp_path, int(uri.rpartition(":")[2]))
        assert any("state" not in run.data.tags for run in runs_of(study))
        search_study(study)
        check_runs(study)
    finally:
        kill_mlflow(process.pid)
        process.wait()


def test_a_server_that_comes_back_is_used_again(
    tmp_path: Path, server: str, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missed epochs stay missing until the end of the search. Workers never import MLflow."""
    fault(import_nothing_of_mlflow, victim=".*")
    monkeypatch.setattr("study.search.mlflow_tracking._PAUSE", 0.0)
    log_batch = MlflowClient.log_batch
    failed: list[object] = []

    def fail_once(client: MlflowClient, *arguments: Any, **options: Any) -> None:
        if not failed and [metric.step for metric in options.get("metrics", [])][:1] == [2]:
            failed.append(arguments)
            raise ConnectionError("a hiccup")
        log_batch(client, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_once)
    study = tracked_study(tmp_path, server)
    with monkeypatch.context() as incomplete:
        incomplete.setattr(TrialTracker, "catch_up", lambda *_: None)
        trials = search_study(study)
    assert {state for state, _ in trials.values()} <= {"completed", "pruned"}
    assert {"state" in run.data.tags for run in runs_of(study)} == {True, False}
    search_study(study)
    check_runs(study)


def test_a_repeated_epoch_is_logged_once(tmp_path: Path, server: str) -> None:
    """This happens if a trial's last checkpoint is older than its last epoch."""
    study = tracked_study(tmp_path, server)
    config = {"run_id": "dropout-000", "arm": "dropout", "attempt": 1, "seed": 1}
    trial = cast(Trial, SimpleNamespace(config={**config, "hyperparameters": {"dropout": 0.3}}))
    for start in (10.0, 20.0):
        tracker = TrialTracker(study, Screen())
        for epoch in (1, 2):
            result = {"epoch": epoch, "end": start + epoch, "val_loss": 0.5}
            tracker.log_trial_result(epoch, trial, result)
    (run,) = runs_of(study)
    history = MlflowClient(tracking_uri=server).get_metric_history(run.info.run_id, "val_loss")
    assert [(point.step, point.timestamp) for point in history] == [(1, 11_000), (2, 12_000)]


def test_non_finite_values_are_omitted() -> None:
    epoch = {"epoch": 3, "end": 1.5, "train_loss": math.inf, "val_loss": math.nan, "score": 0.5}
    (metric,) = epoch_metrics(epoch)
    assert (metric.key, metric.value, metric.step, metric.timestamp) == ("score", 0.5, 3, 1500)


def refused(folder: Path, uri: str, **options: Any) -> str:
    """Check that a study is refused without writing anything; return the message."""
    before = list(folder.rglob("*"))
    config = StudyConfig(transfer="frozen", storage=str(folder), mlflow=uri, **options)
    with pytest.raises(UserError) as error:
        check_tracking(resolve_study(config))
    assert list(folder.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "not a valid address"),
        ("http://", "not a valid address"),
        ("localhost:5000", "MLflow does not support this address; use http://HOST:PORT"),
        ("nowhere://host", "MLflow does not support this address; use http://HOST:PORT"),
        ("http://nowhere.invalid:5000", "http://nowhere.invalid:5000: the server does not respond"),
        ("http://me:secret@127.0.0.1:5000", "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_an_invalid_address_is_refused(tmp_path: Path, uri: str, reason: str) -> None:
    message = refused(tmp_path, uri)
    assert message.startswith("--mlflow")
    assert reason in message
    assert "secret" not in message


def test_a_server_that_is_down_or_silent_is_refused(
    tmp_path: Path,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"{uri}: the server does not respond (Connection refused)" in refused(tmp_path, uri)
        silent.listen()
        assert f"{uri}: the server does not respond in time" in refused(tmp_path, uri)


def test_an_experiment_of_another_study_is_refused(tmp_path: Path, server: str) -> None:
    name = f"of-{tmp_path.name}"
    client = MlflowClient(tracking_uri=server)
    experiment_id = client.create_experiment(name)
    place = StudyConfig(transfer="frozen", storage=str(tmp_path), mlflow=server, name=name)
    check_tracking(resolve_study(place))
    client.create_run(experiment_id)
    assert f"the experiment {name} holds runs of another" in refused(tmp_path, server, name=name)
    # The same experiment is accepted if the study already exists.
    study = make_study(tmp_path)
    study.rundir.path.rename(tmp_path / name)
    check_tracking(resolve_study(replace(place, space="tests.support.spaces:TINY", resume=True)))
    shutil.rmtree(tmp_path / name)
    client.delete_experiment(experiment_id)
    message = refused(tmp_path, server, name=name)
    assert f"the experiment {name} was deleted there; restore it" in message


def test_a_missing_package_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "study.search.mlflow_tracking")
    assert "pip install -e .[mlflow]" in refused(tmp_path, "http://127.0.0.1:5000")


def test_the_address_is_remembered_and_can_be_removed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    record = study.rundir.read_study()
    record["config"]["mlflow"] = "http://127.0.0.1:5000"
    study.rundir.write_study(record)
    words = ["--resume", "--storage", str(tmp_path), "--name", "study"]
    assert parse_config(words).mlflow == "http://127.0.0.1:5000"
    assert parse_config([*words, "--mlflow", "None"]).mlflow is None
    assert "--mlflow=http://127.0.0.1:5000" in as_arguments(record["config"])


def stand_in_bundle(folder: Path, classes: int = 3) -> None:
    """Write a stand-in for best_model/ whose logits are the means of the channels."""
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, ["batch", "height", "width", 3]
    )
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        for name in ("logits", "probabilities")
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(nodes, "stand-in", [images], outputs, [axes])
    opset = helper.make_opsetid("", 18)
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "model.onnx")
    config = {
        "run_id": "dropout-recipe-dropout-2",
        "chosen_by": "val_accuracy on val",
        "label_names": ["red", "green", "blue"],
        "hyperparameters": {"dropout": 0.3},
        "test": {
            "images": 66,
            "loss": 0.5,
            "accuracy": 0.8,
            "how": "from the images, in fp32",
            "accuracy_when_confirmed": None,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("A stand-in.\n")


def test_the_best_model_is_registered_once_and_predicts(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tracked_study(tmp_path, server)
    name = str(study.config.name)
    stand_in_bundle(study.rundir.best_model)
    for _ in range(2):
        register_best_model(study, Screen())
        printed = capsys.readouterr()
        expected = f"MLflow at {server}: the best model is registered as {name}, version 1.\n"
        assert printed.out == expected
        assert printed.err == ""
    (run,) = runs_of(study)
    assert (run.info.run_name, run.info.status) == ("best-model", "FINISHED")
    assert run.data.metrics == {"test_images": 66, "test_loss": 0.5, "test_accuracy": 0.8}
    assert run.data.params == {"dropout": "0.3"}
    assert run.data.tags["run_id"] == "dropout-recipe-dropout-2"
    client = MlflowClient(tracking_uri=server)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "README.md"} <= files

    mlflow.set_tracking_uri(server)
    model = mlflow.pyfunc.load_model(f"models:/{name}/1")
    assert model.metadata.signature.to_dict() == {
        "inputs": json.dumps([tensor("images", "uint8", [-1, -1, -1, 3])]),
        "outputs": json.dumps(
            [tensor("logits", "float32", [-1, 3]), tensor("probabilities", "float32", [-1, 3])]
        ),
        "params": None,
    }
    assert model.metadata.metadata == {"label_names": ["red", "green", "blue"]}
    for shape in ((2, 5, 4, 3), (1, 32, 32, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        predicted = model.predict({"images": images})
        assert predicted.keys() == {"logits", "probabilities"}
        np.testing.assert_allclose(predicted["logits"], images.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(predicted["probabilities"].sum(1), 1, rtol=1e-5)
    assert mlflow.onnx.load_model(f"models:/{name}/1").graph.name == "stand-in"


def tensor(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    """Return a tensor spec in MLflow's format."""
    return {"name": name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}


def test_a_new_best_model_is_a_new_version(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """This happens when a study is extended."""
    study = tracked_study(tmp_path, server)
    stand_in_bundle(study.rundir.best_model)
    register_best_model(study, Screen())
    model = onnx.load(study.rundir.best_model / "model.onnx")
    model.doc_string = "another"
    onnx.save(model, study.rundir.best_model / "model.onnx")
    register_best_model(study, Screen())
    assert ", version 2." in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["server", "file"])
def test_a_failed_registration_is_reported_in_one_line(
    tmp_path: Path, server: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "http://127.0.0.1:1" if missing == "server" else server
    study = tracked_study(tmp_path, uri)
    stand_in_bundle(study.rundir.best_model)
    if missing == "file":
        (study.rundir.best_model / "model.onnx").unlink()
    register_best_model(study, Screen())
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    file = study.rundir.best_model / "model.onnx"
    reason = f"{file}: No such file" if missing == "file" else "the server does not respond (Conn"
    assert printed.startswith(f"MLflow at {uri}: the best model was not registered: {reason}")
    assert "--resume registers it" in printed
