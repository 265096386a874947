"""Standardisation of features: mean 0 and standard deviation 1 over train."""

from dataclasses import dataclass

import torch
from torch import Tensor

from study.models.head import FEATURES

#: Rows of features in fp32 at a time: as many as a core's cache holds.
ROWS = 256


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of each feature over train, fp32 [features]; part of the model.

    The standard deviation of a constant feature is 1.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Standardise [n, features] in any float type; returns the same shape in bfloat16."""
        return ((features.float() - self.mean) / self.std).bfloat16()


def no_standardisation() -> Standardisation:
    """Return the identity: mean 0 and standard deviation 1."""
    return Standardisation(torch.zeros(FEATURES), torch.ones(FEATURES))


def fit_standardisation(features: Tensor, rows: Tensor) -> Standardisation:
    """Compute the mean and standard deviation of each feature over some rows.

    Args:
        features: [n, features] in any float type.
        rows: Indices, int64 [1 or more].
    """
    # Sum differences from a row instead of values, so that a constant feature has a deviation of
    # exactly 0. `torch.std_mean` is ten times as slow.
    shift = features[rows[0]].float()
    total, squares = torch.zeros(2, len(shift), dtype=torch.float64)
    for chosen in rows.split(ROWS):
        differences = features.index_select(0, chosen).float().sub_(shift)
        total += differences.sum(dim=0)
        squares += differences.square_().sum(dim=0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_(min=0).sqrt().float()
    return Standardisation((mean + shift).float(), torch.where(std > 1e-6, std, 1.0))
