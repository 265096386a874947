"""bf16 features cost no accuracy, on real images and weights, relative to the seed variance."""

from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch

from study.data.load import load_dataset
from study.data.split import make_split
from study.features.extract import Features, FeaturesName, Precision, compute_features
from study.models.backbone import build_backbone
from study.models.head import restore_head
from study.models.weights import Weights
from study.training.evaluate import evaluate
from study.training.loop import train
from study.training.prepare import prepare_features

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    "head": "256",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "batch_size": 128,
    "optimizer": "adamw",
    "dropout": 0.2,
}


def test_heads_on_bf16_features_are_as_good_as_on_fp32(keras_weights: Weights) -> None:
    """Mean test accuracy over 8 seeds differs by less than the standard deviation over seeds."""
    dataset = load_dataset("cifar10", 3000)
    backbone = build_backbone(keras_weights.state, keras_weights.architecture)
    how = replace(keras_weights.preprocess, image_size=32)

    def accuracies(precision: Precision) -> list[float]:
        values = compute_features(backbone, dataset.pixels, how, precision=precision, device=CPU)
        features = Features(values.bfloat16(), FeaturesName("", precision), 0.0, cached=False)
        prepared, _ = prepare_features(dataset, make_split(dataset), features)
        data, test = prepared.training.to(CPU), prepared.test.to(CPU)
        found = []
        for seed in range(8):
            run = train(RECIPE, data, seed=seed, epochs=5, metric="val_accuracy")
            found.append(evaluate(restore_head(run.last.weights, RECIPE), test)[1])
        return found

    fp32, bf16 = accuracies("fp32"), accuracies("bf16")
    assert abs(mean(fp32) - mean(bf16)) < stdev(fp32)
    assert min(*fp32, *bf16) > 0.5
