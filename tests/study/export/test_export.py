"""The bundle of a real study: its formats, its card, and the command that exports another model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from analysis.rundir import ConfirmRow, RunDir
from analysis.rundir.predictions import read_predictions
from study.data.dataset import Dataset
from study.data.load import load_dataset
from study.data.split import make_split
from study.errors import StudyStoppedError
from study.export import standalone, verify
from study.export.command import main
from tests.support.command import SMALL, STUDY, Finished, run, run_module
from tests.support.environments import make_environment

FILES = {
    "README.md", "SHA256SUMS", "config.json", "model.onnx", "model.pt2", "model.safetensors",
    "requirements.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Dataset:
    """The images of the study."""
    return load_dataset("cifar10", 3000)


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> RunDir:
    """A copy of the study to export from."""
    path = tmp_path / "runs" / finished.rundir.path.name
    shutil.copytree(finished.rundir.path, path)
    return RunDir(path)


def best_row(rows: list[ConfirmRow]) -> ConfirmRow:
    return max(rows, key=lambda row: row.score)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_the_bundle_is_complete(finished: Finished) -> None:
    folder = finished.rundir.best_model
    assert {file.name for file in folder.iterdir()} == FILES
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == len(FILES) - 1
    assert not list(folder.parent.glob(".*.part"))


def test_every_format_agrees_with_the_model(finished: Finished) -> None:
    config = config_of(finished.rundir.best_model)
    assert config["test"]["images"] == 500
    assert config["verified"].keys() == {"model.onnx", "model.pt2"}
    for found in config["verified"].values():
        assert found["images"] == 500
        assert found["same_answers"] >= 0.999
        assert found["largest_difference"] <= 1e-3
        assert found["accuracy"] == pytest.approx(config["test"]["accuracy"], abs=0.001)
    assert "model.onnx and model.pt2 predict the same class for 100.00 %" in finished.output


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with onnxruntime, numpy and Pillow, and no other dependency of this project."""
    wanted = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime", "pillow")]
    python = make_environment(tmp_path_factory.mktemp("bare") / "venv", *wanted)
    done = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False)
    assert done.returncode != 0
    return python


def test_onnx_has_the_recorded_accuracy_without_this_project(
    finished: Finished, bare_python: Path, images: Dataset
) -> None:
    folder, test = finished.rundir.best_model, make_split(images).test
    command = [str(bare_python), "-I", standalone.__file__, str(folder / "model.onnx")]
    done = subprocess.run(
        [*command, "32", "32", "128"],
        input=images.pixels[test].tobytes(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    found = np.frombuffer(done.stdout, np.float32).reshape(-1, 10)
    accuracy = (found.argmax(axis=1) == images.labels[test]).mean()
    assert accuracy == pytest.approx(config_of(folder)["test"]["accuracy"], abs=0.001)


@pytest.mark.integration
def test_the_code_in_the_card_runs_unchanged(
    finished: Finished, bare_python: Path, images: Dataset, tmp_path: Path
) -> None:
    from PIL import Image

    card = (finished.rundir.best_model / "README.md").read_text()
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    (onnx_code,) = (block for block in blocks if "onnxruntime" in block)
    (torch_code,) = (block for block in blocks if "torch.export" in block)
    row = int(make_split(images).test[0])
    Image.fromarray(images.pixels[row]).save(tmp_path / "photo.jpg", quality=100)
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).symlink_to(finished.rundir.best_model / name)
    printed = run_code(bare_python, onnx_code, tmp_path)
    predicted = run_module(
        "study.predict", finished.rundir.best_model, tmp_path / "photo.jpg", "--top", "1", "--json"
    )
    answer = json.loads(predicted.stdout)["classes"][0]
    assert printed == answer["label"]
    load = (
        "import numpy\nfrom PIL import Image\nimages = numpy.array(Image.open('photo.jpg'))[None]\n"
    )
    code = f"{load}{torch_code}print(float(probabilities.max()))"
    printed = run_code(Path(sys.executable), code, tmp_path)
    assert float(printed) == pytest.approx(answer["probability"], abs=1e-4)


def run_code(python: Path, code: str, folder: Path) -> str:
    """Run Python code and return what it prints."""
    command = [str(python), "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_onnx_has_a_current_opset_and_describes_inputs_and_outputs(finished: Finished) -> None:
    model = onnx.load(finished.rundir.best_model / "model.onnx")
    onnx.checker.check_model(model)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    assert opset >= 23
    (pixels,) = model.graph.input
    assert pixels.name == "images"
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = pixels.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "height", "width", 3]
    assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["label_names"])[0] == "airplane"


def test_the_program_accepts_any_number_and_size_of_images(finished: Finished) -> None:
    folder = finished.rundir.best_model
    program = torch.export.load(folder / "model.pt2").module()
    for shape in ((1, 32, 32, 3), (5, 50, 40, 3), (2, 200, 300, 3)):
        logits, probabilities = program(torch.randint(0, 255, shape, dtype=torch.uint8))
        assert logits.shape == probabilities.shape == (shape[0], 10)
        assert probabilities.sum(dim=1) == pytest.approx(1, abs=1e-5)


def test_hugging_face_reads_the_card(finished: Finished) -> None:
    folder = finished.rundir.best_model
    card = ModelCard((folder / "README.md").read_text())
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.license == "mit"  # the licence of the weights used in tests
    assert data.pipeline_tag == "image-classification"
    results = {found.metric_type: found.metric_value for found in data.eval_results or []}
    test = config_of(folder)["test"]
    assert results["accuracy"] == pytest.approx(test["accuracy"], abs=1e-6)
    assert results["ece"] == pytest.approx(test["calibration_error"] / 100, abs=1e-6)
    low, high = test["accuracy_interval"]
    assert f"95 % Wilson interval {100 * low:.2f} % to {100 * high:.2f} %" in card.text
    assert "Too few pairs for a verdict: 2 seeds" in card.text
    assert "| airplane |" in card.text
    assert str(finished.rundir.path) not in card.content


@pytest.mark.integration
def test_another_arm_is_exported_after_the_study(copy: RunDir, tmp_path: Path) -> None:
    # The arm that the study itself did not export.
    (arm,) = {"no-dropout", "dropout"} - {best_row(copy.read_confirm()).setting}
    before = (copy.best_model / "config.json").read_bytes()
    done = run_module("study.export", copy.path, "--arm", arm, "--to", tmp_path / "shipped")
    assert done.returncode == 0, done.stderr
    config = config_of(tmp_path / "shipped")
    best = best_row([row for row in copy.read_confirm() if row.setting == arm])
    assert config["run_id"] == best.run_id
    assert config["hyperparameters"]["dropout"] == best.hyperparameters["dropout"]
    assert {file.name for file in (tmp_path / "shipped").iterdir()} == FILES
    assert (copy.best_model / "config.json").read_bytes() == before


@pytest.mark.integration
def test_an_ensemble_is_selected_on_val(copy: RunDir) -> None:
    done = run_module("study.export", copy.path, "--arm", "ensemble")
    assert done.returncode == 0, done.stderr
    config = config_of(copy.best_model)

    def together(part: Literal["val", "test"], ids: list[str]) -> float:
        stored = [read_predictions(copy.predictions(run_id), part) for run_id in ids]
        mean = np.mean([p.probabilities for p in stored], axis=0)
        return float((mean.argmax(axis=1) == stored[0].labels).mean())

    cells: dict[tuple[str, str], list[str]] = {}
    for row in copy.read_confirm():
        cells.setdefault((row.recipe, row.setting), []).append(row.run_id)
    scores = {tuple(ids): together("val", ids) for ids in cells.values()}
    assert config["val_accuracy"] == pytest.approx(max(scores.values()))
    assert scores[tuple(config["run_id"])] == pytest.approx(max(scores.values()))
    best_single = max(row.score for row in copy.read_confirm())
    assert config["ensemble"] == {
        "best_single_on_val": best_single,
        "beats_best_single": max(scores.values()) > best_single,
    }
    outcome = "is better" if config["ensemble"]["beats_best_single"] else "is not better"
    assert "On val, the ensemble of 2 heads has val accuracy" in done.stdout
    assert f": the ensemble {outcome}." in done.stdout
    # On test it matches its runs together, up to bf16 features.
    assert config["test"]["accuracy"] == pytest.approx(together("test", config["run_id"]), abs=0.01)
    assert config["head"]["ensemble"] == 2


@pytest.mark.integration
def test_an_existing_export_is_reused_unless_damaged(finished: Finished, copy: RunDir) -> None:
    before = (copy.best_model / "model.onnx").stat().st_mtime_ns
    partial = copy.path / ".best_model.part" / "new"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    again = run(f"{STUDY} {SMALL} --resume", copy.path)
    assert again.returncode == 0, again.stderr
    assert (copy.best_model / "model.onnx").stat().st_mtime_ns == before
    assert (
        again.stdout.splitlines()[-1].split("(")[1]
        == finished.output.splitlines()[-1].split("(")[1]
    )
    # A damaged file is exported again.
    (copy.best_model / "model.onnx").write_bytes(b"")
    done = run_module("study.export", copy.path)
    assert done.returncode == 0, done.stderr
    assert "Checking model.onnx" in done.stdout
    subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy.best_model, check=True
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{run} --arm dropuot", "--arm dropuot: give best, ensemble, or one of this study's"),
        ("{tmp}", "no study here; give a run directory"),
        ("{run} --to {run}", "contains other files; give a new or empty folder, or one"),
        ("{run} --amr best", "did you mean --arm?"),
        ("", "required"),
    ],
)
def test_a_user_error_is_one_line_and_writes_nothing(
    words: str, message: str, finished: Finished, tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rundir.path.rglob("*")}
    words = words.format(run=finished.rundir.path, tmp=tmp_path)
    done = run_module("study.export", *words.split())
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert {file: file.stat().st_mtime_ns for file in finished.rundir.path.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_named_by_the_command_s_own_option(
    copy: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = copy.read_confirm()
    copy.write_confirm([row for row in rows if row.setting != rows[0].setting])
    arm = rows[0].setting
    assert main([str(copy.path), "--arm", arm, "--to", str(tmp_path / "shipped")]) == 2
    error = capsys.readouterr().err
    assert f"--arm {arm}: no confirmation run" in error
    assert "--export" not in error


def test_an_ensemble_of_whole_networks_is_refused(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = finished.rundir.read_study()
    record["config"] |= {"transfer": "finetune", "space": "finetune", "augment": "flip"}
    RunDir(tmp_path / "run").write_study(record)
    assert main([str(tmp_path / "run"), "--arm", "ensemble"]) == 2
    assert "--arm ensemble: with --transfer finetune each run" in capsys.readouterr().err


def broken(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Return a copy of model.onnx with its last bias changed."""
    model = onnx.load(folder / "model.onnx")
    (bias,) = (t for t in model.graph.initializer if list(t.dims) == [10])
    values = change(onnx.numpy_helper.to_array(bias).copy())
    bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), bias.name))
    onnx.save(model, folder / "broken.onnx")
    return folder / "broken.onnx"


def test_a_file_that_disagrees_with_the_model_is_not_exported(
    copy: RunDir, images: Dataset
) -> None:
    rows = make_split(images).test
    labels = images.labels[rows]
    with verify.start_exported(copy.best_model / "model.onnx", 32, 32, 128) as whole:
        expected = verify.compute_probabilities(whole, images.pixels, rows, 10)

    def try_file(file: Path) -> None:
        with verify.start_exported(file, 32, 32, 128) as running:
            verify.check_agreement(running, images.pixels, rows, labels, expected)

    def try_with(change: Callable[[np.ndarray], np.ndarray]) -> None:
        try_file(broken(copy.best_model, change))

    try_with(lambda bias: bias)
    with pytest.raises(StudyStoppedError, match=r"broken\.onnx disagrees with the model"):
        try_with(lambda bias: bias + 0.02 * (np.arange(10) == 3))
    (copy.best_model / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(StudyStoppedError, match="cannot be run outside this project"):
        try_file(copy.best_model / "broken.onnx")


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
def test_the_check_runs_without_this_project(file: str, finished: Finished) -> None:
    names = ["ray", "study", "analysis", "search_spaces", "torchvision", "safetensors"]
    names += ["torch"] if file.endswith(".onnx") else []
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({standalone.__file__!r}, run_name='__main__')\n"
        "loaded = {name.split('.')[0] for name, module in sys.modules.items() if module}\n"
        f"assert not loaded & set({names}), loaded"
    )
    command = [sys.executable, "-I", "-c", code, str(finished.rundir.best_model / file)]
    command += ["32", "32", "2"]
    done = subprocess.run(command, input=bytes(3 * 32 * 32 * 3), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout) == 3 * 10 * 4
