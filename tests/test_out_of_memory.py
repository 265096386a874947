"""Trials that run out of GPU memory, under a real Ray that believes to have a GPU."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from study.arrays import PartArrays, TrainingArrays
from study.config import StudyConfig, check
from study.packing import Resources
from study.screen import Screen
from study.search import search
from study.worker import RunSettings
from tests.faults import run_trial_short_of_memory


@pytest.fixture
def one_gpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
    yield
    ray.shutdown()


def made_up(rows: int) -> PartArrays:
    random = np.random.default_rng(rows)
    bits = random.normal(size=(rows, 16)).astype(np.float32).view(np.uint32) >> 16
    return PartArrays(bits.astype(np.uint16), np.arange(rows) % 10)


@pytest.mark.usefixtures("one_gpu")
def test_it_is_tried_again_alone_and_its_neighbours_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("study.search.run_trial", run_trial_short_of_memory)
    study = check(
        StudyConfig(
            trials=6, epochs=2, transfer="frozen", gpus_per_trial=0.5, storage=tmp_path, name="a"
        )
    )
    training = ray.put(TrainingArrays(made_up(300), made_up(50), made_up(51), 10))
    study.rundir.path.mkdir()
    settings = RunSettings(2, study.config.metric, 1, study.rundir, gpu_share=0.5)
    search(study, training, settings, Resources(1, 0.5, 2), Screen())

    trials = {row.run_id: row for row in study.rundir.read_trials()}
    states = {name: (row.state, row.attempts) for name, row in trials.items()}
    assert states == {
        "no-dropout-000": ("completed", 1),
        "no-dropout-001": ("failed", 2),
        "no-dropout-002": ("completed", 1),
        "dropout-000": ("completed", 1),
        "dropout-001": ("completed", 2),
        "dropout-002": ("completed", 1),
    }
    error = trials["no-dropout-001"].error
    assert error.startswith("without another run beside it, out of memory: CUDA out of memory")
    said = capsys.readouterr().out
    assert said.count("; it runs again at the end, alone") == 2
    assert [row.epoch for row in study.rundir.read_epochs() if row.run_id == "dropout-001"] == [
        1,
        2,
    ]
