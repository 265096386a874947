"""Features: the fast path against the plain one, and the cache."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from study.data.dataset import Dataset
from study.errors import UserError
from study.features.extract import (
    CPU_BATCH,
    CPU_PIXELS,
    VERSION,
    Precision,
    batch_size_for,
    cache_key,
    compute_features,
    load_features,
)
from study.models.backbone import KERAS, build_backbone
from study.models.head import FEATURES
from study.models.preprocess import PREPROCESSES, Preprocess
from study.models.weights import Weights
from tests.support import ROOT
from tests.support.disks import small_disk

CPU = torch.device("cpu")
SMALL = replace(PREPROCESSES["imagenet"], image_size=32)


def part(dataset: Dataset, images: int) -> Dataset:
    """The first images of a dataset, under their own hash."""
    return replace(
        dataset,
        pixels=dataset.pixels[:images],
        labels=dataset.labels[:images],
        sha256=f"first {images}",
    )


def reference(weights: Weights, pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
    """The plain path: the unmodified backbone in fp32, in one batch."""
    with torch.inference_mode():
        backbone = build_backbone(weights.state, weights.architecture)
        values: Tensor = backbone(preprocess(torch.from_numpy(pixels)))
    return values


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected values."""
    return float((values.float() - expected).norm() / expected.norm())


# --- fast path --------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("size", [32, 96])
def test_fast_path_matches_the_plain_one(
    keras_weights: Weights,
    small_dataset: Dataset,
    precision: Precision,
    tolerance: float,
    size: int,
) -> None:
    """bf16 keeps 8 bits of each value, and its errors add up to about 2 % over 53 layers."""
    preprocess = replace(keras_weights.preprocess, image_size=size)
    pixels = small_dataset.pixels[:130]  # at 96 px more than a batch
    backbone = build_backbone(keras_weights.state, keras_weights.architecture)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    values = compute_features(
        backbone, pixels, preprocess, precision=precision, device=CPU, dtype=torch.float32
    )
    assert relative_error(values, reference(keras_weights, pixels, preprocess)) < tolerance
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_fast_path_with_torchvisions_architecture(
    random_weights: Weights, small_dataset: Dataset
) -> None:
    backbone = build_backbone(random_weights.state, random_weights.architecture)
    pixels = small_dataset.pixels[:16]
    values = compute_features(
        backbone, pixels, SMALL, precision="fp32", device=CPU, dtype=torch.float32
    )
    assert relative_error(values, reference(random_weights, pixels, SMALL)) < 1e-5


@pytest.mark.parametrize("size", [32, 64, 96, 224, 384, 1024])
def test_batches_of_large_images_are_small(size: int) -> None:
    """Larger batches could exceed the machine's memory."""
    images = batch_size_for("cpu", size)
    assert 1 <= images <= CPU_BATCH
    assert images == 1 or images * size**2 <= CPU_PIXELS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fast_path_on_a_gpu(random_weights: Weights, small_dataset: Dataset) -> None:
    backbone = build_backbone(random_weights.state, random_weights.architecture)
    values = compute_features(
        backbone, small_dataset.pixels, SMALL, precision="bf16", device=torch.device("cuda")
    )
    expected = reference(random_weights, small_dataset.pixels, SMALL)
    assert values.device == CPU
    assert relative_error(values, expected) < 0.03


# --- cache ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_cache")
def test_second_load_comes_from_the_cache(keras_weights: Weights, small_dataset: Dataset) -> None:
    dataset = part(small_dataset, 32)
    preprocess = replace(keras_weights.preprocess, image_size=32)
    first = load_features(dataset, keras_weights, preprocess, CPU)
    second = load_features(dataset, keras_weights, preprocess, CPU)
    assert (first.cached, second.cached, second.seconds) == (False, True, 0.0)
    assert first.seconds > 0
    assert first.name == second.name
    assert torch.equal(first.values, second.values)
    assert (second.values.shape, second.values.dtype) == ((32, FEATURES), torch.bfloat16)
    assert (
        relative_error(second.values, reference(keras_weights, dataset.pixels, preprocess)) < 0.03
    )


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte is missing": lambda content: content[:-1],
    "one bit differs": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another file": lambda _: b"text",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_recomputed(
    random_weights: Weights,
    small_dataset: Dataset,
    empty_cache: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    dataset = part(small_dataset, 4)
    first = load_features(dataset, random_weights, SMALL, CPU)
    path = empty_cache / "features" / f"{first.name.key}.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    second = load_features(dataset, random_weights, SMALL, CPU)
    assert not second.cached
    assert torch.equal(first.values, second.values)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Features: {path} is damaged, recomputing them"
    assert load_features(dataset, random_weights, SMALL, CPU).cached


def test_full_disk_is_a_user_error(
    random_weights: Weights,
    small_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with small_disk(tmp_path / "disk", "40k"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "disk"))
        with pytest.raises(UserError, match=r"cannot be written to .*No space left.*free some"):
            load_features(part(small_dataset, 16), random_weights, SMALL, CPU)
        assert not [
            file for file in (tmp_path / "disk").rglob("*.safetensors*") if file.stat().st_size
        ]


def test_key_depends_on_everything(
    random_weights: Weights, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        dataset: Dataset = small_dataset,
        weights: Weights = random_weights,
        preprocess: Preprocess = SMALL,
        precision: Precision = "fp32",
    ) -> str:
        return cache_key(dataset, weights, preprocess, precision)

    keys = [
        key(),
        key(dataset=replace(small_dataset, sha256="other")),
        key(weights=replace(random_weights, sha256="other")),
        key(weights=replace(random_weights, architecture=KERAS)),
        key(preprocess=replace(SMALL, image_size=64)),
        key(preprocess=replace(PREPROCESSES["raw"], image_size=32)),
        key(precision="bf16"),
    ]
    monkeypatch.setitem(VERSION, "fp32", 0)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(dataset=replace(small_dataset, source="elsewhere")) == key()


#: Script of a process that loads the features of a few images.
LOAD = """
import torch
from tests.study.features.test_extract import SMALL, CPU, load_features, part
from tests import conftest
dataset = part(conftest.small_dataset.__wrapped__(), 400)
weights = conftest.random_weights.__wrapped__()
print("ready", flush=True)
features = load_features(dataset, weights, SMALL, CPU)
print(features.cached, features.name.key)
"""


def test_two_processes_compute_once(empty_cache: Path) -> None:
    command = [sys.executable, "-c", LOAD]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert sorted(output.splitlines()[-1].split()[0] for output in outputs) == ["False", "True"]
    assert sum(output.count("Computing features: done") for output in outputs) == 1
    assert len(list((empty_cache / "features").glob("*.safetensors"))) == 1
