"""The command and the function that predict the classes of image files."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from study.data.dataset import Dataset
from study.errors import UserError
from study.export import bundle
from study.export.model import ModelParts
from study.features.standardise import no_standardisation
from study.models.head import build_head
from study.models.weights import Weights
from study.predict import find_images, predict
from tests.support.command import run_module

VALUES: dict[str, Any] = {"head": "16", "dropout": 0.5}


@pytest.fixture(scope="module")
def model(
    random_weights: Weights, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with dropout and random weights."""
    folder = tmp_path_factory.mktemp("bundle") / "best_model"
    content = ModelParts(
        classes=small_dataset.classes,
        preprocess=replace(random_weights.preprocess, image_size=96),
        side=32,
        architecture=random_weights.architecture,
        hyperparameters=VALUES,
        backbone=random_weights.state,
        standardisation=no_standardisation(),
        heads=(build_head(VALUES, 2048, 10, seed=1).state_dict(),),
    )
    bundle.save(folder, content)
    bundle.save_config(folder, content, {})
    return folder


@pytest.fixture
def photos(small_dataset: Dataset, tmp_path: Path) -> Path:
    """70 images at two depths, more than a batch, and a file that is not an image."""
    for row in range(70):
        file = tmp_path / "photos" / ("deep/er" if row % 2 else "") / f"{row:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small_dataset.pixels[row]).save(file)
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


def expected(model: Path, dataset: Dataset, rows: list[int]) -> np.ndarray:
    return bundle.predict_pixels(model, dataset.pixels[rows])


def test_python_api_predicts_files_and_folders(
    model: Path, photos: Path, small_dataset: Dataset
) -> None:
    answers = predict(model, [photos / "02.png", photos])
    assert len(answers.files) == 71
    assert answers.files[0] == answers.files[2] == str(photos / "02.png")
    rows = [int(Path(file).stem) for file in answers.files]
    found = expected(model, small_dataset, rows)
    np.testing.assert_allclose(answers.probabilities, found, atol=1e-5)
    name, probability = answers.top(0, 1)[0]
    assert name == small_dataset.classes[found[0].argmax()]
    assert probability == pytest.approx(found[0].max(), abs=1e-5)
    assert answers.unreadable == ()
    assert answers.entropy is None


def test_unreadable_files_are_reported_and_the_others_predicted(model: Path, photos: Path) -> None:
    (photos / "50.png").write_bytes(b"\x89PNG")
    done = run_module("study.predict", model, photos)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{photos}/50.png: cannot be read: not an image that Pillow can read"
    ]
    assert len(done.stdout.splitlines()) == 69
    answers = predict(model, [photos])
    assert answers.unreadable == ((f"{photos}/50.png", "not an image that Pillow can read"),)


def test_the_table_lists_classes_with_percentages(model: Path, photos: Path) -> None:
    done = run_module("study.predict", model, photos / "02.png", "--top", "2")
    assert done.returncode == 0, done.stderr
    (name, probability), (second, _) = predict(model, [photos / "02.png"]).top(0, 2)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{photos}/02.png   {name} {100 * probability:5.1f} %   {second} ")


def test_json_and_csv_contain_the_same_predictions(model: Path, photos: Path) -> None:
    done = run_module("study.predict", model, photos, "--json", "--top", "10")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == list(predict(model, [photos]).files)
    for line in lines:
        probabilities = [entry["probability"] for entry in line["classes"]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
    done = run_module("study.predict", model, photos, "--csv", "--top", "10")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 700
    flat = [(n["file"], e["label"]) for n in lines for e in n["classes"]]
    assert [(row["file"], row["label"]) for row in rows] == flat
    assert [row["rank"] for row in rows[:10]] == [str(rank) for rank in range(1, 11)]


def test_mc_dropout_gives_the_mean_and_its_uncertainty(
    model: Path, photos: Path, small_dataset: Dataset
) -> None:
    answers = predict(model, [photos], mc_dropout=30)
    again = predict(model, [photos], mc_dropout=30)
    np.testing.assert_array_equal(answers.probabilities, again.probabilities)
    loaded = bundle.load(model)
    batch = loaded.batch_size
    assert batch < len(answers.files)
    pixels = torch.from_numpy(
        small_dataset.pixels[[int(Path(f).stem) for f in answers.files[:batch]]]
    )
    with torch.inference_mode():
        drawn = loaded.sample(pixels, 30, seed=0)
    mean = drawn.mean(dim=0)
    entropy = -(mean * mean.log()).sum(dim=1)
    of_each = -(drawn * drawn.log()).sum(dim=2).mean(dim=0)
    assert answers.entropy is not None
    assert answers.mutual_information is not None
    np.testing.assert_allclose(answers.probabilities[:batch], mean, atol=1e-5)
    np.testing.assert_allclose(answers.entropy[:batch], entropy, atol=1e-5)
    np.testing.assert_allclose(answers.mutual_information[:batch], entropy - of_each, atol=1e-5)
    assert answers.mutual_information.max() > 0.001

    done = run_module("study.predict", model, photos / "02.png", "--mc-dropout", "30", "--json")
    line = json.loads(done.stdout)
    one = predict(model, [photos / "02.png"], mc_dropout=30)
    assert one.entropy is not None
    assert line["entropy"] == pytest.approx(float(one.entropy[0]), abs=1e-5)


def test_invalid_mc_dropout_is_refused(
    model: Path, photos: Path, random_weights: Weights, tmp_path: Path
) -> None:
    values = {**VALUES, "dropout": 0.0}
    content = ModelParts(
        ("a", "b"), random_weights.preprocess, 32, random_weights.architecture, values,
        random_weights.state, no_standardisation(), (build_head(values, 2048, 2, 1).state_dict(),),
    )  # fmt: skip
    bundle.save(tmp_path / "model", content)
    bundle.save_config(tmp_path / "model", content, {})
    with pytest.raises(UserError, match=r"--mc-dropout: the model in .* has no dropout"):
        predict(tmp_path / "model", [photos], mc_dropout=10)
    with pytest.raises(UserError, match="--mc-dropout 1: must be 2 or more"):
        predict(model, [photos], mc_dropout=1)


def test_paths_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        find_images([tmp_path / "empty"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_images([tmp_path / "nowhere.png"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_images([Path("x" * 5000)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{model}", "no images given"),
        ("{tmp} {photo}", "no config.json here; give the best_model/ folder"),
        ("{model} {photo} --top 0", "--top 0: must be 1 or more"),
        ("{model} {photo} --json --csv", "--json and --csv: give only one of them"),
        ("{model} {tmp}/nowhere.jpg", "no such file or folder"),
        ("{model} {photo} --mc-dropuot 3", "did you mean --mc-dropout?"),
        ("{model} {model}/config.json", "none of the files could be read"),
    ],
)
def test_a_user_error_is_one_line(
    words: str, message: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    words = words.format(model=model, photo=photos / "02.png", tmp=tmp_path)
    done = run_module("study.predict", *words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_predicting_does_not_import_ray(model: Path, photos: Path) -> None:
    code = (
        "import sys; from study.predict import predict;"
        f"predict({str(model)!r}, [{str(photos / '02.png')!r}]);"
        "assert not {'ray', 'optuna', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
