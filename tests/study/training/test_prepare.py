"""Training data from features or images."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

from study.data.dataset import Dataset
from study.data.split import make_split
from study.features.extract import Features, FeaturesName
from study.features.standardise import Standardisation, fit_standardisation
from study.models.network import Pretrained
from study.models.weights import Weights
from study.training.data import PartArrays
from study.training.prepare import Prepared, prepare_features, prepare_images, stratified_rows


@pytest.fixture
def features(small_dataset: Dataset) -> Features:
    """Synthetic features, each with its own scale and mean; the last one is constant."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(len(small_dataset.labels), 8, generator=random)
    values = values * torch.arange(1, 9) + 5 * torch.arange(8)
    values[:, 7] = 3.0
    return Features(values.bfloat16(), FeaturesName("key", "fp32"), 0.0, cached=False)


@pytest.fixture
def both(small_dataset: Dataset, features: Features) -> tuple[Prepared, Standardisation]:
    return prepare_features(small_dataset, make_split(small_dataset), features)


@pytest.fixture
def prepared(both: tuple[Prepared, Standardisation]) -> Prepared:
    return both[0]


@pytest.fixture
def standardisation(both: tuple[Prepared, Standardisation]) -> Standardisation:
    return both[1]


def test_images_are_divided_by_the_split(small_dataset: Dataset, random_weights: Weights) -> None:
    split = make_split(small_dataset)
    weights = random_weights
    pretrained = Pretrained(weights.state, weights.architecture, weights.preprocess)
    prepared = prepare_images(small_dataset, split, pretrained, "flip")
    data = prepared.training.to(torch.device("cpu"))
    assert torch.equal(data.val.inputs, torch.from_numpy(small_dataset.pixels[split.val]))
    assert data.train.labels.tolist() == small_dataset.labels[split.train].tolist()
    assert prepared.test.inputs.dtype == np.uint8
    assert len(data.monitor.labels) == len(data.val.labels)
    assert (data.augment, data.pretrained is not None) == ("flip", True)


def test_train_is_standardised(prepared: Prepared) -> None:
    train = prepared.training.train.to(torch.device("cpu")).inputs.float()
    assert train.mean(dim=0).abs().max() < 0.01
    assert (train.std(dim=0, correction=0)[:7] - 1).abs().max() < 0.01
    assert (train[:, 7] == 0).all()


def test_means_and_deviations_match_double_precision() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3000, 8, generator=random) * 2.0 ** torch.arange(-4, 4) + 50
    rows = torch.randperm(3000, generator=random)[:2000]
    found, exact = fit_standardisation(values, rows), values[rows].double()
    torch.testing.assert_close(found.mean.double(), exact.mean(dim=0), rtol=1e-6, atol=0)
    std = exact.std(dim=0, correction=0)
    torch.testing.assert_close(found.std.double(), std, rtol=1e-5, atol=0)


def test_val_and_test_do_not_affect_the_standardisation(
    prepared: Prepared,
    standardisation: Standardisation,
    small_dataset: Dataset,
    features: Features,
) -> None:
    split = make_split(small_dataset)
    spoilt = features.values.clone()
    spoilt[split.test] = 1e4
    spoilt[split.val] = -1e4
    again, fitted = prepare_features(small_dataset, split, replace(features, values=spoilt))
    assert torch.equal(fitted.mean, standardisation.mean)
    assert np.array_equal(again.training.train.inputs, prepared.training.train.inputs)


def test_rows_and_labels_stay_together(
    prepared: Prepared,
    standardisation: Standardisation,
    small_dataset: Dataset,
    features: Features,
) -> None:
    split = make_split(small_dataset)
    part = prepared.test.to(torch.device("cpu"))
    assert part.labels.tolist() == small_dataset.labels[split.test].tolist()
    expected = standardisation(features.values[split.test[3]])
    assert torch.equal(part.inputs[3], expected)


def test_monitor_is_a_stratified_subset_of_train_as_large_as_val(prepared: Prepared) -> None:
    data = prepared.training
    train = {row.tobytes() for row in data.train.inputs}
    assert len(data.monitor.inputs) == len(data.val.inputs)
    assert all(row.tobytes() in train for row in data.monitor.inputs)
    counts = np.bincount(data.monitor.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_workers_read_the_arrays_without_a_copy() -> None:
    arrays = PartArrays(np.zeros((4, 3), np.uint16), np.zeros(4, np.int64))
    part = arrays.to(torch.device("cpu"))
    assert part.inputs.data_ptr() == arrays.inputs.ctypes.data
    assert part.inputs.dtype == torch.bfloat16


def test_stratified_rows_keep_the_proportions() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    rows = stratified_rows(labels, 50)
    assert np.bincount(labels[rows]).tolist() == [30, 15, 5]
    assert np.array_equal(rows, stratified_rows(labels, 50))
    assert len(set(rows.tolist())) == 50


def test_features_are_not_in_memory_in_fp32() -> None:
    """All of them in fp32 would take twice the memory of bf16, and each step as much again."""
    code = """
        import resource
        import numpy as np
        import torch
        from study.data.dataset import Dataset
        from study.data.split import Split
        from study.features.extract import Features, FeaturesName
        from study.training.prepare import prepare_features

        n = 40_000
        labels = np.arange(n) % 10
        dataset = Dataset("", ("",) * 10, np.zeros((n, 1, 1, 3), np.uint8), labels, n, "", "", "")
        split = Split(*np.split(np.arange(n), [30_000, 34_000]), "")
        features = FeaturesName("", "fp32")
        values = torch.ones(n, 2048, dtype=torch.bfloat16)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kept = prepare_features(dataset, split, Features(values, features, 0.0, True))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((after - before) * 1024 / values.nbytes)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 3
