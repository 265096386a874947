"""A study of the user's own images, from a folder of PNG files to predictions for files."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from analysis.rundir import RunDir
from study.export.bundle import load
from tests.support.command import run, run_module
from tests.support.folders import FASHION, FASHION_CLASSES, write_fashion

pytestmark = pytest.mark.skipif(
    not FASHION.exists(), reason="needs Debian's package dataset-fashion-mnist"
)

OPTIONS = (
    "--transfer frozen --image-size 32 --trials 4 --epochs 4 --seeds 2"
    " --metric val_balanced_accuracy --val-fraction 0.2 --export ensemble"
)


@dataclass(frozen=True)
class OwnStudy:
    images: Path
    rundir: RunDir
    output: str


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnStudy:
    """Fashion-MNIST with few bags, a truncated file, and a copy of a test image in train."""
    folder = tmp_path_factory.mktemp("own")
    images = folder / "fashion"
    write_fashion(images, training=1500, test=300)
    for file in sorted((images / "train" / "bag").iterdir())[30:]:
        file.unlink()
    whole = sorted((images / "train" / "coat").iterdir())[0]
    (images / "train" / "coat" / "cut.png").write_bytes(whole.read_bytes()[:100])
    leaked = sorted((images / "test" / "sandal").iterdir())[0]
    (images / "train" / "sandal" / "again.png").write_bytes(leaked.read_bytes())
    done = run(f"--data {images} {OPTIONS}", folder / "runs" / "own")
    assert done.returncode == 0, done.stderr
    return OwnStudy(images, RunDir(folder / "runs" / "own"), done.stdout)


def test_problems_with_the_images_are_shown_on_the_screen(own: OwnStudy) -> None:
    printed = " ".join(own.output.split())
    assert "skipped unreadable files: train/coat/cut.png" in printed
    assert "look like one of another split" in printed
    # The metric already weights all classes equally.
    assert "Classes are imbalanced" not in printed


def test_study_json_lists_classes_files_and_duplicates(own: OwnStudy) -> None:
    data = own.rundir.read_study()["data"]
    assert data["classes"] == sorted(FASHION_CLASSES)
    bags = data["classes"].index("bag")
    counts = {part: of[bags] for part, of in data["images_per_class"].items()}
    assert (counts["train"], counts["val"]) == (24, 6)
    assert [entry.split(":")[0] for entry in data["unreadable"]] == ["train/coat/cut.png"]
    assert any(pair["like"] == "train/sandal/again.png" for pair in data["duplicates"])


def test_class_names_are_in_figures_report_and_bundle(own: OwnStudy) -> None:
    page = (own.rundir.report / "index.html").read_text()
    assert "near-duplicate images across splits" in page
    assert "train/sandal/again.png" in page
    assert ", 24 of bag" in page
    assert '<td class="short">bag</td><td class="short">24</td>' in page
    figure = (own.rundir.report / "figures" / "classes.svg").read_text()
    assert all(name in figure for name in FASHION_CLASSES)
    config = json.loads((own.rundir.best_model / "config.json").read_text())
    assert config["label_names"] == sorted(FASHION_CLASSES)
    assert config["image_files"]["size"] == 32
    card = (own.rundir.best_model / "README.md").read_text()
    assert "| sneaker |" in card
    assert "a folder of images (fashion)" in card
    assert str(own.images) not in card


def test_search_and_verdict_use_balanced_accuracy(own: OwnStudy) -> None:
    assert "points of balanced test accuracy" in " ".join(own.output.split())
    # The article's numbers are for other images.
    table = (own.rundir.report / "tables" / "article.md").read_text()
    assert "Balanced testing accuracy (test)" in table
    assert "78.76" not in table
    assert "article" not in own.output
    epochs = own.rundir.read_epochs()
    for trial in own.rundir.read_trials():
        curve = [row.val_balanced_accuracy for row in epochs if row.run_id == trial.run_id]
        assert trial.score == max(curve)
    for row in own.rundir.read_confirm():
        assert row.score == row.val_balanced_accuracy
        with np.load(own.rundir.predictions(row.run_id)) as stored:
            labels, right = stored["test_labels"], stored["test_logits"].argmax(axis=1)
        by_class = [(right[labels == c] == c).mean() for c in range(10)]
        assert row.test_balanced_accuracy == pytest.approx(np.mean(by_class), abs=0.01)


def test_the_model_is_an_ensemble_and_predicts_the_files(own: OwnStudy) -> None:
    model = load(own.rundir.best_model)
    assert len(model.heads) == 2
    done = run_module(
        "study.predict", own.rundir.best_model, own.images / "test", "--csv", "--top", "1"
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(",") for line in done.stdout.splitlines()[1:]]
    assert len(lines) == 300
    right = [Path(file).parent.name == label for file, _, label, _ in lines]
    config = json.loads((own.rundir.best_model / "config.json").read_text())
    # The files are read as the study read them, so the accuracy is the recorded one.
    assert np.mean(right) == pytest.approx(config["test"]["accuracy"], abs=1e-9)
    assert config["test"]["accuracy"] > 0.5


def test_a_study_resumes_with_moved_files_but_not_with_changed_ones(
    own: OwnStudy, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", str(own.images), str(tmp_path / "fashion")], check=True)
    moved = run(f"--resume --data {tmp_path}/fashion", own.rundir.path)
    assert moved.returncode == 0, moved.stderr
    next((tmp_path / "fashion" / "train" / "coat").iterdir()).unlink()
    other = run(f"--resume --data {tmp_path}/fashion", own.rundir.path)
    assert other.returncode == 2
    assert "the data changed since this study started" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data {own} --test-fraction 0.2", "has a test/ folder, which is used as test"),
        ("--data {own} --images 5000", "--images 5,000 is out of range"),
        ("--data {empty}", "no class folders in"),
        ("--test-fraction 0.2", "--test-fraction: CIFAR-10 comes with test images"),
        ("--val-fraction 1", "--val-fraction 1: must be between 0 and 1"),
        ("--export dropuot", "--export dropuot: give best, ensemble, or one of"),
        (
            "--export ensemble --seeds 0",
            "--export ensemble: an ensemble is made of confirmation runs",
        ),
    ],
)
def test_an_invalid_option_gives_one_line_and_writes_nothing(
    options: str, message: str, own: OwnStudy, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = options.format(own=own.images, empty=tmp_path / "empty")
    done = run(f"--transfer frozen {options}", tmp_path / "runs" / "x")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "runs" / "x").exists()
