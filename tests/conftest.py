"""Fixtures: small data from this repository, real data and weights from the user's cache."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

from analysis.rundir import RunDir
from study.data.cifar10 import CLASSES
from study.data.dataset import Dataset
from study.data.load import load_dataset
from study.models.backbone import TORCHVISION
from study.models.preprocess import PREPROCESSES
from study.models.weights import Weights, check_state, digest, load_weights
from tests.support import FIXTURES
from tests.support.command import SMALL, STUDY, Finished, run
from tests.support.servers import s3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/integration/, except those marked `full`."""
    for item in items:
        if "integration" in item.path.parts and not item.get_closest_marker("full"):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """400 real images of CIFAR-10 (334 training, 66 test), without a download."""
    record = json.loads((FIXTURES / "cifar10-400.json").read_text())
    sheet = np.asarray(Image.open(FIXTURES / "cifar10-400.png"))
    tiles = sheet.reshape(20, 32, 20, 32, 3).transpose(0, 2, 1, 3, 4)
    return Dataset(
        name="cifar10",
        classes=CLASSES,
        pixels=np.ascontiguousarray(tiles.reshape(400, 32, 32, 3)),
        labels=np.array(record["labels"], np.int64),
        training_count=record["training_count"],
        source="tests/fixtures",
        source_key="path",
        sha256=record["sha256"],
    )


@pytest.fixture(scope="session")
def random_weights() -> Weights:
    """Random weights of the right shapes, with non-trivial BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = resnet50().state_dict()
        for name, value in state.items():
            if name.endswith(("running_mean", "bn3.weight", "bias")):
                value.normal_(0, 0.2)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    backbone = check_state(state)
    return Weights(
        name="path",
        source="random",
        sha256=digest(backbone),
        state=backbone,
        classifier={},
        architecture=TORCHVISION,
        preprocess=PREPROCESSES["imagenet"],
    )


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own cache directory, not created yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dropout-study"


@pytest.fixture(scope="session")
def cifar10() -> Dataset:
    """All of CIFAR-10, downloaded on first use."""
    return load_dataset("cifar10")


@pytest.fixture(scope="session")
def keras_weights() -> Weights:
    """Keras' ImageNet weights, downloaded on first use."""
    return load_weights("keras")


@pytest.fixture(scope="session")
def s3_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log of the S3 server, one line per request."""
    return tmp_path_factory.mktemp("s3") / "log"


@pytest.fixture(scope="session")
def s3_endpoint(s3_log: Path) -> Iterator[str]:
    """host:port of a local S3 server; sets the credentials that pyarrow needs."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3.ENVIRONMENT.items():
            environment.setenv(name, value)
        process, endpoint = s3.start_s3(s3_log)
        yield endpoint
        process.kill()
        process.wait()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    """URI of a folder in a new bucket."""
    return s3.new_bucket(s3_endpoint)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished small study of the default space, from images to best model; do not modify."""
    rundir = tmp_path_factory.mktemp("runs") / "small"
    done = run(f"{STUDY} {SMALL}", rundir)
    assert done.returncode == 0, done.stderr
    return Finished(RunDir(rundir), done.stdout)
