"""The folded backbone on a CPU, in the operators of oneDNN that suit each layer.

Step by step in PyTorch, in bf16, a third of the time at 96 px goes to ReLUs and sums, most of it at
32 px to convolutions of maps of a pixel or a few, which reach a twentieth of the rate of matrix
products. So here a convolution does the ReLU and the sum behind it, and in bf16 one of small maps
is a matrix product (in fp32 convolutions are faster). What PyTorch's compiler makes of the same
network is slower at 32 px and no faster at 96 (tests/benchmarks/features.py), and it needs a C++
compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

#: The type in which products are faster.
PRODUCTS_IN = torch.bfloat16

#: Pixels a side up to which a map is small.
SMALL = 3

#: Up to so many pairs of a pixel that goes in and one that comes out, a 3×3 convolution is one
#: product over the whole map: 3×3 pixels to as many, or 4×4 to 2×2. It multiplies each pair, by
#: weights that are zero where the two are far apart; the convolution multiplies 9 for each that
#: comes out. From 4×4 to as many pixels it takes twice as long as the convolution.
PAIRS = SMALL**4


class Layer(Protocol):
    """A convolution and what follows it."""

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """Convolve, add, and cut off what is negative.

        Args:
            maps: [batch, channels, height, width], channels last.
            plus: What to add; it may be overwritten.
            relu: Whether to cut off.
        """


@dataclass(frozen=True)
class Block:
    """A residual block."""

    layers: tuple[Layer, Layer, Layer]
    shortcut: Layer | None

    def __call__(self, maps: Tensor) -> Tensor:
        """Run it; `maps` may be overwritten."""
        first, second, third = self.layers
        inner = second(first(maps))
        return third(inner, maps if self.shortcut is None else self.shortcut(maps, relu=False))


def in_onednn(net: nn.Module, image_size: int, batch_size: int) -> Callable[[Tensor], Tensor]:
    """A folded ResNet50 as a function from images to features.

    Args:
        net: From `features.folded`, on the CPU, in the type to compute in and channels last.
        image_size: Of the images, in pixels a side.
        batch_size: For how many images at a time oneDNN lays out its weights; more or fewer may
            come.

    Returns:
        [batch, 3, image_size, image_size], channels last -> [batch, 2048].
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
    """A 1×1 convolution: the same product at every pixel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._step = conv.stride[0]
        self._weight, self._bias = conv.weight.flatten(1), conv.bias

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """As `Layer`."""
        # Pixels in memory one after the other, or else the bias is added in a pass of its own.
        pixels = maps.permute(0, 2, 3, 1)[:, :: self._step, :: self._step].contiguous()
        found = F.linear(pixels, self._weight, self._bias).permute(0, 3, 1, 2)
        return _finish(found, plus, relu)


class MapProduct:
    """A convolution of maps of one size: a product of a map, flat, with all that it reaches."""

    def __init__(self, conv: nn.Conv2d, size: int) -> None:
        assert conv.bias is not None
        (kernel, _), (step, _), padding = conv.kernel_size, conv.stride, int(conv.padding[0])
        self._size = _outgoing(conv, size)
        # For each pixel that comes out, the kernel laid where it is on the map; what is beside the
        # map is cut off.
        starts = [number * step - padding for number in range(self._size)]
        ends = [(start, size - kernel - start) for start in starts]
        laid = [F.pad(conv.weight, (*x, *y)) for y in ends for x in ends]
        weight = torch.stack(laid).permute(0, 1, 3, 4, 2)  # [pixels, out, height, width, in]
        self._weight = weight.flatten(2).flatten(0, 1).contiguous()
        self._bias = conv.bias.repeat(self._size**2)

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """As `Layer`."""
        flat = F.linear(maps.permute(0, 2, 3, 1).flatten(1), self._weight, self._bias)
        found = flat.reshape(len(maps), self._size, self._size, -1).permute(0, 3, 1, 2)
        return _finish(found, plus, relu)


class Convolution:
    """A convolution with what follows it, by the operators that PyTorch has for its compiler.

    They are not public; `has_operators` says whether this PyTorch has them.
    """

    def __init__(self, conv: nn.Conv2d, shape: list[int]) -> None:
        how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self._weight = reorder(conv.weight, *how, shape)
        self._rest = (conv.bias, *how)

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """As `Layer`."""
        last: tuple[str, list[float], str] = ("relu" if relu else "none", [], "")
        found: Tensor
        if plus is None:
            run = torch.ops.mkldnn._convolution_pointwise
            found = run(maps, self._weight, *self._rest, *last)
        else:
            assert relu
            into = torch.ops.mkldnn._convolution_pointwise_.binary
            found = into(plus, maps, self._weight, *self._rest, "add", 1.0, *last)
        return found


class PlainConvolution:
    """The same, step by step."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = conv

    def __call__(self, maps: Tensor, plus: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """As `Layer`."""
        return _finish(self._conv(maps), plus, relu)


def has_operators() -> bool:
    """Whether this PyTorch has what `Convolution` calls, and that does what it should."""
    with torch.random.fork_rng(devices=[]):  # a caller's random numbers are not for this
        conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    maps = torch.ones(1, 4, 5, 5).to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            expected = PlainConvolution(conv)(maps, maps.clone())
            found = Convolution(conv, list(maps.shape))(maps, maps.clone())
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-3)


def _layer(conv: nn.Conv2d, shape: list[int], *, fused: bool) -> Layer:
    """The fastest form of a convolution of maps of a shape."""
    size, outgoing = shape[-1], _outgoing(conv, shape[-1])
    if conv.weight.dtype == PRODUCTS_IN:
        if conv.kernel_size == (1, 1) and outgoing <= SMALL:
            return ChannelsProduct(conv)
        if (size * outgoing) ** 2 <= PAIRS:
            return MapProduct(conv, size)
    return Convolution(conv, shape) if fused else PlainConvolution(conv)


def _finish(found: Tensor, plus: Tensor | None, relu: bool) -> Tensor:
    if plus is not None:
        found = found.add_(plus)
    return found.relu_() if relu else found


def _outgoing(conv: nn.Conv2d, size: int) -> int:
    """Pixels a side of what comes out of a convolution."""
    return (size + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1


def _shapes(net: nn.Module, image_size: int, batch_size: int) -> dict[nn.Module, list[int]]:
    """The shape of what goes into each convolution."""
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
