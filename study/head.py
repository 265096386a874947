"""The head that stands on the backbone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from search_spaces import Value, dropout_rates, hidden_widths
from study.streams import derive_seed


def build_head(
    hyperparameters: Mapping[str, Value], features: int, classes: int, seed: int
) -> nn.Sequential:
    """Linear → ReLU → Dropout per hidden width, then Linear to the classes.

    Args:
        hyperparameters: The recipe and the factor; widths and dropout rates are read from them.
            Rates do not touch the initial weights.
        features: Number of features that come in.
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
            layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(rate)]
            features = width
        layers.append(nn.Linear(features, classes))
    return nn.Sequential(*layers)


def restore_head(
    weights: Mapping[str, Tensor], hyperparameters: Mapping[str, Value]
) -> nn.Sequential:
    """The head that `build_head` made with these hyperparameters, with its trained weights."""
    last_layer = max(weights, key=lambda name: int(name.split(".")[0]))
    features, classes = weights["0.weight"].shape[1], weights[last_layer].shape[0]
    head = build_head(hyperparameters, features, classes, seed=0)
    head.load_state_dict(weights)
    return head
