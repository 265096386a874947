"""The bundle: what is written can be loaded elsewhere and predicts the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from study import bundle
from study.backbone import build_backbone
from study.bundle import Bundle
from study.dataset import Dataset
from study.errors import UserError
from study.head import build_head
from study.prepare import Standardisation
from study.weights import Weights

VALUES: dict[str, Any] = {"head": "16-8", "dropout": 0.5}


@pytest.fixture
def content(random_weights: Weights, small_dataset: Dataset) -> Bundle:
    random = torch.Generator().manual_seed(0)
    head = build_head(VALUES, 2048, 10, seed=1)
    return Bundle(
        classes=small_dataset.classes,
        preprocess=random_weights.preprocess,
        architecture=random_weights.architecture,
        hyperparameters=VALUES,
        backbone=random_weights.state,
        standardisation=Standardisation(
            torch.randn(2048, generator=random), torch.rand(2048, generator=random) + 0.5
        ),
        head=head.state_dict(),
    )


def test_a_new_process_predicts_what_the_parts_give(
    content: Bundle, small_dataset: Dataset, tmp_path: Path
) -> None:
    pixels = small_dataset.pixels[:6]
    backbone = build_backbone(content.backbone, content.architecture)
    head = build_head(VALUES, 2048, 10, seed=1).eval()
    with torch.inference_mode():
        features = backbone(content.preprocess(torch.from_numpy(pixels)))
        standardised = (features - content.standardisation.mean) / content.standardisation.std
        expected = head(standardised).softmax(dim=1).numpy()

    bundle.save(tmp_path / "best_model", content, {"run_id": "x"})
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys, numpy as np; from study.bundle import predict; folder = sys.argv[1];"
        "images = np.load(folder + '/pixels.npy');"
        "np.save(folder + '/out.npy', predict(folder + '/best_model', images))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (6, 10)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_config_says_how_to_build_and_feed_it(content: Bundle, tmp_path: Path) -> None:
    bundle.save(tmp_path, content, {"run_id": "x"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hyperparameters"] == VALUES
    assert config["preprocess"]["image_size"] == 224
    assert config["classes"][0] == "airplane"
    assert config["run_id"] == "x"


def test_what_is_no_bundle_is_refused_in_one_line(content: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json here"):
        bundle.load(tmp_path)
    bundle.save(tmp_path, content, {})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        bundle.load(tmp_path)
