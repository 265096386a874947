"""Untrusted prediction files: damaged, malicious, or with unexpected content."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.rundir import RunDirError
from analysis.rundir.damage import find_damage
from analysis.rundir.predictions import read_predictions

LOGITS = np.zeros((6, 10), np.float16)
LABELS = np.arange(6)


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def refused(file: Path) -> str:
    with pytest.raises(RunDirError) as error:
        read_predictions(file)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{file} cannot be read: ")
    return str(error.value).removeprefix(f"{file} cannot be read: ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "confirm").mkdir()
    return tmp_path / "confirm" / "run-1.npz"


def test_object_array_is_not_loaded(tmp_path: Path, file: Path) -> None:
    """Even if only the labels are an object array."""
    victim = tmp_path / "victim"
    np.savez(file, test_logits=LOGITS, test_labels=np.array([Attack(victim)], object))
    reason = refused(file)
    assert reason == "Object arrays cannot be loaded when allow_pickle=False"
    assert find_damage(tmp_path) == (f"Skipped a damaged file: {file} cannot be read: {reason}.",)
    assert not victim.exists()


def test_pickle_is_not_loaded(tmp_path: Path, file: Path) -> None:
    file.write_bytes(pickle.dumps(Attack(tmp_path / "victim")))
    assert refused(file) == "File is not a zip file"
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        (LOGITS[0], LABELS, "test_logits is float16 [10], not float [images, classes]"),
        (LOGITS.astype(str), LABELS, "not float [images, classes]"),
        (LOGITS[:0], LABELS[:0], "test_logits is float16 [0, 10], not float [images, classes]"),
        (LOGITS, LABELS[:5], "test_labels is int64 [5], not int [images]"),
        (LOGITS, LABELS.astype(float), "test_labels is float64 [6], not int [images]"),
        (LOGITS, LABELS - 1, "test_labels are not all between 0 and 9"),
        (LOGITS, LABELS + 5, "test_labels are not all between 0 and 9"),
    ],
)
def test_arrays_that_do_not_match_are_refused(
    file: Path, logits: np.ndarray, labels: np.ndarray, reason: str
) -> None:
    np.savez(file, test_logits=logits, test_labels=labels)
    assert refused(file).endswith(reason)


def test_missing_array_is_reported(file: Path) -> None:
    np.savez(file, test_logits=LOGITS)
    assert "test_labels is not a file in the archive" in refused(file)


def test_array_larger_than_memory_is_refused(file: Path) -> None:
    """Only the header claims that size; the file contains hardly any data."""
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({10**13}, 10)}}\n".encode()
    with zipfile.ZipFile(file, "w") as archive:
        length = len(header).to_bytes(2, "little")
        archive.writestr("test_logits.npy", b"\x93NUMPY\x01\x00" + length + header)
    assert "allocate" in refused(file)


def test_zip_bomb_is_refused_before_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(file, test_logits=np.zeros((100_000, 10)), test_labels=LABELS)
    monkeypatch.setattr("analysis.rundir.predictions.LARGEST", 1_000_000)
    monkeypatch.setattr(np, "load", None)
    assert refused(file) == "it unpacks to 8,000,304 bytes; the limit is 1,000,000"


def test_corrupted_file_gives_predictions_or_a_run_dir_error(file: Path) -> None:
    np.savez_compressed(file, test_logits=LOGITS, test_labels=LABELS)
    content, chance = file.read_bytes(), np.random.default_rng(0)
    damaged = 0
    for number in range(400):
        altered = bytearray(content)
        altered[chance.integers(len(content))] = chance.integers(256)
        file.write_bytes(altered[: chance.integers(len(content))] if number % 4 == 0 else altered)
        try:
            predictions = read_predictions(file)
        except RunDirError:
            damaged += 1
        else:
            assert predictions.logits.shape == LOGITS.shape
    assert 200 < damaged < 400
