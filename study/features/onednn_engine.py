"""The folded backbone on a CPU, in the oneDNN operators that suit each layer.

In eager PyTorch in bf16, a third of the time at 96 px goes to ReLUs and sums, and most of it at
32 px to convolutions of maps of one or a few pixels, which reach a twentieth of the throughput of
matrix products. So here a convolution includes the sum and the ReLU after it, and in bf16 a
convolution of small maps is a matrix product (in fp32 convolutions are faster). PyTorch's compiler
is slower on the same network at 32 px and no faster at 96 (tests/benchmarks/features.py), and it
needs a C++ compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

#: The dtype in which matrix products are faster than convolutions of small maps.
PRODUCTS_IN = torch.bfloat16

#: Largest side of a small map, in pixels.
SMALL = 3

#: A 3×3 convolution with at most this many pairs of an input and an output pixel is one product
#: over the whole map: 3×3 pixels to 3×3, or 4×4 to 2×2. The product multiplies every pair, with
#: weights that are zero where the two are far apart; the convolution multiplies 9 per output pixel.
#: From 4×4 to 4×4 pixels the product takes twice as long as the convolution.
PAIRS = SMALL**4


class Layer(Protocol):
    """A convolution with the sum and the ReLU after it."""

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """Convolve, then add, then apply ReLU.

        Args:
            maps: [batch, channels, height, width], channels last.
            plus: What to add; it may be overwritten.
            relu: Whether to apply ReLU.
        """


@dataclass(frozen=True)
class Block:
    """A residual block."""

    layers: tuple[Layer, Layer, Layer]
    shortcut: Layer | None

    def __call__(self, maps: Tensor) -> Tensor:
        """Run the block; `maps` may be overwritten."""
        first, second, third = self.layers
        inner = second(first(maps))
        return third(inner, maps if self.shortcut is None else self.shortcut(maps, relu=False))


def in_onednn(net: nn.Module, image_size: int, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Turn a folded ResNet50 into a function from images to features.

    Args:
        net: From `fold_batch_norms`, on the CPU, channels last, in the dtype to compute in.
        image_size: Side of the images, in pixels.
        batch_size: The batch size that oneDNN lays out its weights for; others work too.

    Returns:
        A function from [batch, 3, image_size, image_size], channels last, to [batch, 2048].
    """
    assert isinstance(net, ResNet)
    shapes, fused = _shapes(net, image_size, batch_size), has_operators()

    def layer(conv: nn.Module) -> Layer:
        assert isinstance(conv, nn.Conv2d)
        return _layer(conv, shapes[conv], fused=fused)

    def block(module: nn.Module) -> Block:
        assert isinstance(module, Bottleneck)
        layers = (layer(module.conv1), layer(module.conv2), layer(module.conv3))
        return Block(layers, layer(module.downsample) if module.downsample else None)

    with torch.inference_mode():
        first = layer(net.conv1)
        stages = (net.layer1, net.layer2, net.layer3, net.layer4)
        blocks = [block(module) for stage in stages for module in stage]

    def run(images: Tensor) -> Tensor:
        maps: Tensor = net.maxpool(first(images))
        for each in blocks:
            maps = each(maps)
        return maps.mean(dim=(2, 3))

    return run


class ChannelsProduct:
    """A 1×1 convolution as a matrix product, the same at every pixel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._step = conv.stride[0]
        self._weight, self._bias = conv.weight.flatten(1), conv.bias

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """See `Layer`."""
        # Pixels must be contiguous, or else the bias is added in a separate pass.
        pixels = maps.permute(0, 2, 3, 1)[:, :: self._step, :: self._step].contiguous()
        outputs = F.linear(pixels, self._weight, self._bias).permute(0, 3, 1, 2)
        return _finish(outputs, plus, relu)


class MapProduct:
    """A convolution of maps of one size as a matrix product of the flattened maps."""

    def __init__(self, conv: nn.Conv2d, size: int) -> None:
        assert conv.bias is not None
        (kernel, _), (step, _), padding = conv.kernel_size, conv.stride, int(conv.padding[0])
        self._size = _outgoing(conv, size)
        # For each output pixel, the kernel placed at its position on the map and cropped to it.
        starts = [number * step - padding for number in range(self._size)]
        ends = [(start, size - kernel - start) for start in starts]
        laid = [F.pad(conv.weight, (*x, *y)) for y in ends for x in ends]
        weight = torch.stack(laid).permute(0, 1, 3, 4, 2)  # [pixels, out, height, width, in]
        self._weight = weight.flatten(2).flatten(0, 1).contiguous()
        self._bias = conv.bias.repeat(self._size**2)

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """See `Layer`."""
        flat = F.linear(maps.permute(0, 2, 3, 1).flatten(1), self._weight, self._bias)
        outputs = flat.reshape(len(maps), self._size, self._size, -1).permute(0, 3, 1, 2)
        return _finish(outputs, plus, relu)


class Convolution:
    """A fused convolution, sum and ReLU, by the operators that PyTorch has for its compiler.

    They are not public; `has_operators` checks that this PyTorch has them.
    """

    def __init__(self, conv: nn.Conv2d, shape: list[int]) -> None:
        how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self._weight = reorder(conv.weight, *how, shape)
        self._rest = (conv.bias, *how)

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """See `Layer`."""
        last: tuple[str, list[float], str] = ("relu" if relu else "none", [], "")
        outputs: Tensor
        if plus is None:
            run = torch.ops.mkldnn._convolution_pointwise
            outputs = run(maps, self._weight, *self._rest, *last)
        else:
            assert relu
            into = torch.ops.mkldnn._convolution_pointwise_.binary
            outputs = into(plus, maps, self._weight, *self._rest, "add", 1.0, *last)
        return outputs


class PlainConvolution:
    """The same as separate operations."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """See `Layer`."""
        return _finish(self._conv(maps), plus, relu)


def has_operators() -> bool:
    """Return whether this PyTorch has the operators of `Convolution`, with correct results."""
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
        conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    maps = torch.ones(1, 4, 5, 5).to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            expected = PlainConvolution(conv)(maps, maps.clone())
            outputs = Convolution(conv, list(maps.shape))(maps, maps.clone())
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(outputs, expected, atol=1e-3)


def _layer(conv: nn.Conv2d, shape: list[int], *, fused: bool) -> Layer:
    """Return the fastest form of a convolution for maps of a shape."""
    size, outgoing = shape[-1], _outgoing(conv, shape[-1])
    if conv.weight.dtype == PRODUCTS_IN:
        if conv.kernel_size == (1, 1) and outgoing <= SMALL:
            return ChannelsProduct(conv)
        if (size * outgoing) ** 2 <= PAIRS:
            return MapProduct(conv, size)
    return Convolution(conv, shape) if fused else PlainConvolution(conv)


def _finish(outputs: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
    if plus is not None:
        outputs = outputs.add_(plus)
    return outputs.relu_() if relu else outputs


def _outgoing(conv: nn.Conv2d, size: int) -> int:
    """Return the side of a convolution's output, in pixels."""
    return (size + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1


def _shapes(net: nn.Module, image_size: int, batch_size: int) -> dict[nn.Module, list[int]]:
    """Return the input shape of each convolution."""
    shapes: dict[nn.Module, list[int]] = {}

    def keep(conv: nn.Module, inputs: tuple[Tensor]) -> None:
        shapes[conv] = [batch_size, *inputs[0].shape[1:]]

    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(keep) for conv in convs]
    with torch.inference_mode():
        net(torch.zeros(1, 3, image_size, image_size, dtype=convs[0].weight.dtype))
    for hook in hooks:
        hook.remove()
    return shapes
