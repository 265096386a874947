"""The backbone in oneDNN's operators: the same numbers as in eager PyTorch, in fp32."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from study.features import onednn_engine
from study.features.extract import fold_batch_norms
from study.features.onednn_engine import (
    ChannelsProduct,
    Convolution,
    MapProduct,
    PlainConvolution,
    has_operators,
    in_onednn,
)
from study.models.backbone import build_backbone
from study.models.weights import Weights


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("stride_on_1x1", [False, True])
@pytest.mark.parametrize("size", [32, 48, 64, 96])
def test_output_matches_the_network(
    random_weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    stride_on_1x1: bool,
    operators: bool,
    products: bool,
) -> None:
    assert has_operators()
    if products:
        monkeypatch.setattr(onednn_engine, "PRODUCTS_IN", torch.float32)
    monkeypatch.setattr(onednn_engine, "has_operators", lambda: operators)
    net = folded_resnet(random_weights, stride_on_1x1=stride_on_1x1)
    images = torch.randn(3, 3, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = net(images)
        found = in_onednn(net, size, batch_size=2)(images)
        again = in_onednn(net, size, batch_size=2)(images)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("size", "whole_maps", "at_every_pixel"), [(32, 9, 19), (64, 3, 6), (96, 2, 6), (224, 0, 0)]
)
def test_only_small_maps_are_products_in_bf16(
    random_weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    whole_maps: int,
    at_every_pixel: int,
) -> None:
    """The cost of a product over a whole map grows with the square of its pixels."""
    made: list[str] = []
    for kind in (ChannelsProduct, MapProduct, Convolution):
        monkeypatch.setattr(onednn_engine, kind.__name__, counted(kind, made))
    in_onednn(folded_resnet(random_weights).bfloat16(), size, batch_size=2)
    kinds = [made.count(kind.__name__) for kind in (MapProduct, ChannelsProduct, Convolution)]
    # `has_operators` builds one more convolution.
    assert kinds == [whole_maps, at_every_pixel, 53 + 1 - whole_maps - at_every_pixel]


def counted(kind: type, made: list[str]) -> "object":
    def make(*arguments: object) -> object:
        made.append(kind.__name__)
        return kind(*arguments)

    return make


def test_has_operators_draws_no_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert has_operators()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_missing_or_different_operators_are_not_used(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Another version of PyTorch may raise any of these errors."""

    def call(*_: object, **__: object) -> None:
        raise error("no such operator")

    monkeypatch.setattr(Convolution, "__call__", call)
    assert not has_operators()
    monkeypatch.setattr(Convolution, "__call__", PlainConvolution.__call__)
    monkeypatch.setattr(Convolution, "_conv", nn.Conv2d(4, 4, 3, padding=1), raising=False)
    assert not has_operators()  # they run, but compute something else


def folded_resnet(weights: Weights, *, stride_on_1x1: bool = False) -> ResNet:
    """A folded ResNet50, channels last."""
    net = fold_batch_norms(build_backbone(weights.state, weights.architecture))
    assert isinstance(net, ResNet)
    for stage in (net.layer2, net.layer3, net.layer4):
        block = stage[0]
        assert isinstance(block, Bottleneck)
        strides = ((2, 2), (1, 1)) if stride_on_1x1 else ((1, 1), (2, 2))
        block.conv1.stride, block.conv2.stride = strides
    return net.to(memory_format=torch.channels_last)
