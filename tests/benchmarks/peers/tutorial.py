"""Ray Tune as in its tutorials on transfer learning: the frozen backbone runs in every epoch.

Each trial builds the pretrained ResNet50, freezes it, and runs it on every batch of images in every
epoch; one core per trial, with as many trials at once as there are cores.
"""

import time
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import tune
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from study.models.backbone import build_backbone
from study.models.weights import load_weights
from study.system.hardware import cpu_count
from tests.benchmarks.peers.torch_head import build_head
from tests.benchmarks.peers.work import Trial, Work, answer, parser


def main() -> None:
    """Run the trials under Ray Tune."""
    work: Work = parser().parse_args().work
    ray.init(address="local", num_cpus=cpu_count(), include_dashboard=False, log_to_driver=False)
    arrays = {
        f"{part}_{kind}": work.array(f"{part}_{kind}")
        for part in ("train", "val")
        for kind in ("images", "labels")
    }
    trainable = tune.with_parameters(train, work=work, arrays=arrays)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(list(work.trials))},
        tune_config=tune.TuneConfig(metric="val_accuracy", mode="max"),
        run_config=tune.RunConfig(storage_path=f"{work.folder}/ray_results", verbose=0),
    )
    results = tuner.fit()
    frames = [
        frame
        for number in range(len(results))
        if (frame := results[number].metrics_dataframe) is not None
    ]
    begun, ended = min(f["start"].min() for f in frames), max(f["end"].max() for f in frames)
    accuracies = [frame["val_accuracy"].tolist() for frame in frames]
    answer(accuracies, float(ended - begun), ["ray", "torch"])


def train(config: dict[str, Any], work: Work, arrays: dict[str, Any]) -> None:
    """Run a trial: train a head on the frozen backbone."""
    start = time.time()
    trial: Trial = config["trial"]
    torch.manual_seed(trial.seed)
    weights = load_weights("keras")
    backbone = build_backbone(weights.state, weights.architecture).requires_grad_(False)
    mean, std = (torch.from_numpy(work.array(name)) for name in ("mean", "std"))
    head = build_head(trial, features=len(mean))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=trial.learning_rate, weight_decay=trial.weight_decay
    )
    preprocess = replace(weights.preprocess, image_size=work.image_size)
    train_data, val_data = (
        TensorDataset(
            torch.tensor(arrays[f"{part}_images"]), torch.tensor(arrays[f"{part}_labels"])
        )
        for part in ("train", "val")
    )
    train_loader = DataLoader(train_data, batch_size=trial.batch_size, shuffle=True)
    val_loader = DataLoader(val_data, batch_size=256)

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = head((backbone(preprocess(images)) - mean) / std)
        return logits

    for _ in range(work.epochs):
        head.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(forward(images), labels).backward()
            optimizer.step()
        head.eval()
        right = 0
        with torch.no_grad():
            for images, labels in val_loader:
                right += int((forward(images).argmax(dim=1) == labels).sum())
        tune.report({"val_accuracy": right / len(val_data), "start": start, "end": time.time()})


if __name__ == "__main__":
    main()
