"""The head on top of the backbone."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import Value, dropout_rates, hidden_widths
from study.seeds import derive_seed

FEATURES = 2048
"""Number of features: the size of the backbone's output and of the head's input."""


class Dropout(nn.Dropout):
    """PyTorch's dropout with masks that a CPU draws several times as fast.

    On a CPU, 16 random bits decide on each unit, so the rate is exact to within 1/131,072. Other
    devices and evaluation mode use PyTorch's own implementation.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Zero units at random and scale the others by 1 / (1 - rate); shapes are kept."""
        if not self.training or self.p in (0.0, 1.0) or inputs.device.type != "cpu":
            return super().forward(inputs)
        words = torch.empty(math.ceil(inputs.numel() / 4), dtype=torch.int64)
        words.random_(-(2**63), None)
        bits = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        # Comparing directly into the inputs' dtype is vectorised; a boolean mask is not.
        mask = torch.empty_like(inputs, memory_format=torch.contiguous_format, requires_grad=False)
        torch.ge(bits, round(self.p * 2**16) - 2**15, out=mask)
        return inputs * mask.mul_(1 / (1 - self.p))


class Linear(nn.Linear):
    """PyTorch's linear layer, faster to train in bf16 on a CPU.

    Other devices, other dtypes and evaluation mode use PyTorch's own implementation.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [batch, inputs] to [batch, outputs]."""
        if not self.training or inputs.device.type != "cpu" or inputs.dtype != torch.bfloat16:
            return super().forward(inputs)
        return cast(Tensor, _LinearInBf16.apply(inputs, self.weight, self.bias))


class _LinearInBf16(torch.autograd.Function):
    """What autocast does in a linear layer, except for the memory layout of one factor.

    The weight gradient is a product with the transposed output gradient. If that is a view, oneDNN
    takes up to 1.5 times as long for the product as for a copy and a product together.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rounded = weight.bfloat16()
        ctx.save_for_backward(inputs, rounded if ctx.needs_input_grad[0] else None)
        return F.linear(inputs, rounded, bias.bfloat16())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (of_outputs,) = gradients
        inputs, rounded = ctx.saved_tensors
        of_inputs = None if rounded is None else of_outputs @ rounded
        of_weight = of_outputs.t().contiguous() @ inputs
        return of_inputs, of_weight.float(), of_outputs.sum(dim=0).float()


def build_head(
    hyperparameters: Mapping[str, Value], features: int, classes: int, seed: int
) -> nn.Sequential:
    """Build Linear → ReLU → Dropout per hidden width, then Linear to the classes.

    Args:
        hyperparameters: The recipe and the factor, which give widths and dropout rates. Rates do
            not affect the initial weights.
        features: Number of input features.
        classes: Number of classes.
        seed: The run's seed; the initial weights (PyTorch's default for Linear) come from its
            stream "weights".

    Returns:
        A module that maps [batch, features] to logits [batch, classes].
    """
    layers: list[nn.Module] = []
    rates = dropout_rates(hyperparameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        for width, rate in zip(hidden_widths(hyperparameters), rates, strict=True):
            layers += [Linear(features, width), nn.ReLU(), Dropout(rate)]
            features = width
        layers.append(Linear(features, classes))
    return nn.Sequential(*layers)


def restore_head(
    weights: Mapping[str, Tensor], hyperparameters: Mapping[str, Value]
) -> nn.Sequential:
    """Rebuild the head that `build_head` made with these hyperparameters, with trained weights."""
    last_layer = max(weights, key=lambda name: int(name.split(".")[0]))
    features, classes = weights["0.weight"].shape[1], weights[last_layer].shape[0]
    head = build_head(hyperparameters, features, classes, seed=0)
    head.load_state_dict(weights)
    return head


def head_parameters(head: str, classes: int) -> int:
    """Return the number of parameters of a head."""
    widths = (FEATURES, *hidden_widths({"head": head}), classes)
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))
