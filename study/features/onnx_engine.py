"""A folded ResNet50 in ONNX Runtime, the fastest way to compute it in fp32 on a CPU.

tests/benchmarks/features.py compares it with PyTorch and with the processor's limit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

#: The opset that the nodes below need; every onnxruntime since 2020 supports it.
OPSET = 13

INPUT, OUTPUT = "images", "features"


def in_onnx_runtime(backbone: nn.Module, threads: int) -> Callable[[Tensor], Tensor]:
    """Turn a folded backbone into a function that ONNX Runtime computes on the CPU.

    Args:
        backbone: A ResNet50 whose BatchNorms are folded and whose classifier is an identity; fp32,
            on the CPU.
        threads: Number of CPU threads.

    Returns:
        A function from fp32 [B, 3, S, S] to fp32 [B, 2048].
    """
    assert isinstance(backbone, ResNet)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        build_onnx(backbone), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        (features,) = session.run(None, {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(features)

    return run


def build_onnx(backbone: ResNet) -> bytes:
    """Build the ONNX file; torch's exporter gives the same one but takes ten seconds more."""
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    last = INPUT

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def convolve(name: str, conv: nn.Module, values: str) -> str:
        assert isinstance(conv, nn.Conv2d)
        for kind, tensor in (("weight", conv.weight), ("bias", conv.bias)):
            assert tensor is not None
            array: np.ndarray = tensor.detach().numpy()
            weights.append(numpy_helper.from_array(array, f"{name}.{kind}"))
        pads = [*map(int, conv.padding), *map(int, conv.padding)]
        given = (values, f"{name}.weight", f"{name}.bias")
        return add("Conv", *given, strides=conv.stride, pads=pads)

    last = add("Relu", convolve("conv1", backbone.conv1, last))
    last = add("MaxPool", last, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for name, block in _blocks(backbone):
        inner = add("Relu", convolve(f"{name}.conv1", block.conv1, last))
        inner = add("Relu", convolve(f"{name}.conv2", block.conv2, inner))
        inner = convolve(f"{name}.conv3", block.conv3, inner)
        if block.downsample is not None:
            last = convolve(f"{name}.downsample", block.downsample, last)
        last = add("Relu", add("Add", inner, last))
    last = add("Flatten", add("GlobalAveragePool", last))
    nodes.append(helper.make_node("Identity", [last], [OUTPUT]))

    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, "side", "side"])
    features = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 2048])
    graph = helper.make_graph(nodes, "resnet50", [images], [features], weights)
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
    )
    content: bytes = model.SerializeToString()
    return content


def _blocks(backbone: ResNet) -> Iterator[tuple[str, Bottleneck]]:
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(getattr(backbone, stage)):
            yield f"{stage}.{number}", block
