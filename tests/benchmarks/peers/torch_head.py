"""The head in plain PyTorch."""

from torch import nn

from tests.benchmarks.peers.work import CLASSES, Trial


def build_head(trial: Trial, features: int) -> nn.Sequential:
    """Return Linear, ReLU and dropout per hidden width, then Linear to the classes."""
    layers: list[nn.Module] = []
    for width in trial.widths:
        layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(trial.dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, CLASSES))
