"""The bundle: its files, and the libraries that read them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet50

from study.data.dataset import Dataset
from study.errors import UserError
from study.export import bundle
from study.export.model import Model, ModelParts, predict_logits
from study.features.standardise import Standardisation
from study.models.backbone import KERAS, build_backbone
from study.models.head import build_head
from study.models.preprocess import PREPROCESSES
from study.models.weights import Weights

VALUES: dict[str, Any] = {"head": "16-8", "dropout": 0.5}


@pytest.fixture
def content(random_weights: Weights, small_dataset: Dataset) -> ModelParts:
    random = torch.Generator().manual_seed(0)
    return ModelParts(
        classes=small_dataset.classes,
        preprocess=replace(random_weights.preprocess, image_size=64),
        side=32,
        architecture=random_weights.architecture,
        hyperparameters=VALUES,
        backbone=random_weights.state,
        standardisation=Standardisation(
            torch.randn(2048, generator=random), torch.rand(2048, generator=random) + 0.5
        ),
        heads=(build_head(VALUES, 2048, 10, seed=1).state_dict(),),
    )


def write(folder: Path, content: ModelParts) -> Path:
    bundle.save(folder, content)
    bundle.save_config(folder, content, {"run_id": "x"})
    return folder


def logits_of_the_parts(content: ModelParts, pixels: np.ndarray, head: int = 0) -> Tensor:
    """Return the logits of one head, computed from the parts of the bundle."""
    backbone = build_backbone(content.backbone, content.architecture)
    network = build_head(VALUES, 2048, 10, seed=1).eval()
    network.load_state_dict(content.heads[head])
    with torch.inference_mode():
        features = backbone(content.preprocess(torch.from_numpy(pixels)))
        standardised = (features - content.standardisation.mean) / content.standardisation.std
        logits: Tensor = network(standardised)
    return logits


def test_large_images_are_predicted_in_small_batches(
    content: ModelParts, small_dataset: Dataset
) -> None:
    """Larger batches could exceed the memory of the machine."""
    preprocess = replace(content.preprocess, image_size=384)
    model = Model(replace(content, preprocess=preprocess))
    seen: list[int] = []
    model.heads[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    predict_logits(model, small_dataset.pixels[:6])
    assert seen == [3, 3]


def test_a_new_process_predicts_the_same_as_the_parts(
    content: ModelParts, small_dataset: Dataset, tmp_path: Path
) -> None:
    pixels = small_dataset.pixels[:6]
    write(tmp_path / "best_model", content)
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys, numpy as np; from study.export.bundle import predict_pixels;"
        "folder = sys.argv[1]; images = np.load(folder + '/pixels.npy');"
        "np.save(folder + '/out.npy', predict_pixels(folder + '/best_model', images))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (6, 10)
    expected = logits_of_the_parts(content, pixels).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_ensemble_predicts_the_mean_probabilities_of_its_heads(
    content: ModelParts, small_dataset: Dataset, tmp_path: Path
) -> None:
    heads = tuple(build_head(VALUES, 2048, 10, seed).state_dict() for seed in (1, 2, 3))
    content = replace(content, heads=heads)
    write(tmp_path, content)
    pixels = small_dataset.pixels[:6]
    each = [logits_of_the_parts(content, pixels, head).softmax(dim=1) for head in range(3)]
    expected = torch.stack(each).mean(dim=0).numpy()
    np.testing.assert_allclose(bundle.predict_pixels(tmp_path, pixels), expected, atol=1e-5)
    # The logits too must give these probabilities: losses are computed from them.
    logits = bundle.load(tmp_path)(torch.from_numpy(pixels)).detach()
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected, atol=1e-5)
    assert not np.allclose(expected, each[0].numpy(), atol=1e-3)


def test_mc_dropout_is_repeatable_and_centred_on_the_prediction(
    content: ModelParts, small_dataset: Dataset, tmp_path: Path
) -> None:
    model = bundle.load(write(tmp_path, content))
    assert model.has_dropout
    pixels = torch.from_numpy(small_dataset.pixels[:4])
    with torch.inference_mode():
        first, again, other = (model.sample(pixels, 200, seed) for seed in (0, 0, 1))
        expected = model(pixels).softmax(dim=1)
    assert first.shape == (200, 4, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std(dim=0).max() > 0.01
    assert (first.mean(dim=0) - expected).abs().max() < 0.1
    # Dropout is off again afterwards.
    with torch.inference_mode():
        assert torch.equal(model(pixels).softmax(dim=1), expected)


def test_the_config_has_the_fields_of_timm_and_hugging_face(
    content: ModelParts, tmp_path: Path
) -> None:
    write(tmp_path, content)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnet50"
    assert config["num_classes"] == 10
    assert config["label_names"][0] == config["id2label"]["0"] == "airplane"
    assert config["label2id"]["truck"] == 9
    ours: dict[str, Any] = config["pretrained_cfg"]
    theirs: Any = timm.create_model("resnet50").pretrained_cfg
    assert ours.keys() - {"channels"} <= theirs.keys()
    assert ours["mean"] == pytest.approx(theirs["mean"])
    assert ours["std"] == pytest.approx(theirs["std"])
    assert ours["input_size"] == [3, 64, 64]
    assert config["hyperparameters"] == VALUES
    assert config["head"] == {"hidden_widths": [16, 8], "dropout": [0.5, 0.5], "ensemble": 1}
    assert config["run_id"] == "x"


@pytest.mark.parametrize("name", ["imagenet", "caffe", "raw"])
def test_mean_and_std_in_timm_units_give_the_same_input(
    name: str, content: ModelParts, small_dataset: Dataset, tmp_path: Path
) -> None:
    preprocess = replace(PREPROCESSES[name], image_size=32)
    write(tmp_path, replace(content, preprocess=preprocess))
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    pixels = torch.from_numpy(small_dataset.pixels[:3])
    expected = preprocess(pixels)
    values = pixels.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(config[part]).view(3, 1, 1) for part in ("mean", "std"))
    found = (values - mean) / std
    if config["channels"] == "BGR":
        found = found.flip(1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


def plain_network(kind: str) -> nn.Module:
    """Return another library's ResNet50 without its classifier."""
    if kind == "timm":
        network: nn.Module = timm.create_model("resnet50", num_classes=0)
        return network
    network = resnet50()
    network.fc = nn.Identity()
    return network


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
@pytest.mark.parametrize("architecture", ["torchvision", "keras"])
def test_other_libraries_load_the_backbone_unchanged(
    kind: str, architecture: str, content: ModelParts, small_dataset: Dataset, tmp_path: Path
) -> None:
    if architecture == "keras":
        content = replace(content, architecture=KERAS)
    write(tmp_path, content)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    network = plain_network(kind)
    state = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone")}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split(".")[-1] for name in missing} <= {"num_batches_tracked"}
    # config.json describes weights that another framework trained.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = config["backbone"]["bn_eps"]
    if config["backbone"]["stride_on_1x1"]:
        for stage in ("layer2", "layer3", "layer4"):
            first: Any = network.get_submodule(f"{stage}.0")
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    head = nn.Sequential(
        nn.Linear(2048, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(),
        nn.Linear(8, 10),
    )  # fmt: skip
    head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
    size = config["pretrained_cfg"]["input_size"][1:]
    values = torch.from_numpy(small_dataset.pixels[:4]).permute(0, 3, 1, 2).float()
    values = nn.functional.interpolate(values, size, mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(config["pretrained_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.inference_mode():
        features = network.eval()((values - mean) / std)
        found = head.eval()((features - tensors["feature_mean"]) / tensors["feature_std"])
        expected = bundle.load(tmp_path)(torch.from_numpy(small_dataset.pixels[:4]))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_an_invalid_bundle_is_refused_in_one_line(content: ModelParts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json here"):
        bundle.load(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json here"):
        bundle.load("x" * 5000)
    write(tmp_path, content)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        bundle.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="is not in format 1"):
        bundle.load(tmp_path)
