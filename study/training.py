"""One training run of the head on features: the same loop for trials and confirmation runs.

The loop knows nothing of Ray: it is given data, hyperparameters and a seed, and calls `report`
after each epoch.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import PARAMETERS, Value
from study.config import Metric
from study.hardware import has_native_bf16
from study.head import build_head
from study.streams import derive_seed, generator

#: Rows that are evaluated at once; bounds the memory of the widest hidden layer.
EVALUATION_BATCH = 2_500


@dataclass(frozen=True)
class Part:
    """Features and labels of one part of the data, on the device that trains."""

    inputs: Tensor
    """[n, features], bfloat16, standardised."""
    labels: Tensor
    """[n], int64, 0 to classes - 1."""


@dataclass(frozen=True)
class TrainingData:
    """What a run may see while it trains; `test` is not among it."""

    train: Part
    monitor: Part
    """A fixed stratified part of train, as large as val: its metrics show the fit by epoch."""
    val: Part
    classes: int


@dataclass(frozen=True)
class EpochMetrics:
    """How a run stands after an epoch; measured in evaluation mode, dropout off."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean cross-entropy in nats on `monitor`."""
    train_accuracy: float
    """Fraction 0 to 1 on `monitor`."""
    val_loss: float
    val_accuracy: float
    score: float
    """The best value of the metric on val so far."""
    best_epoch: int
    """The epoch that the score comes from."""
    start: float
    """Unix time in seconds."""
    end: float


@dataclass(frozen=True)
class Snapshot:
    """The head's weights after an epoch, on the CPU, fp32."""

    epoch: int
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    epochs: tuple[EpochMetrics, ...]
    best: Snapshot
    """At the best epoch by the metric on val; the earlier one of equals."""
    last: Snapshot


class NonFiniteLossError(Exception):
    """The loss became infinite or NaN: the run has diverged."""


def train(
    hyperparameters: Mapping[str, Value],
    data: TrainingData,
    *,
    seed: int,
    epochs: int,
    metric: Metric,
    report: Callable[[EpochMetrics, Snapshot], None] = lambda *_: None,
) -> Run:
    """Train a new head.

    Args:
        hyperparameters: The recipe and the factor, named as in `search_spaces`.
        data: On the device that is to train.
        seed: Initial weights, data order and dropout masks each have a stream derived from it.
            The same seed gives the same result on the same machine and number of threads.
        epochs: Epochs to train, 1 or more.
        metric: What "best" means: the largest `val_accuracy` or the smallest `val_loss`.
        report: Called after each epoch with its metrics and the best weights so far; may end
            the run by raising.

    Returns:
        Every epoch's metrics, and the weights of the best epoch and of the last.

    Raises:
        NonFiniteLossError: The loss on monitor or val is not finite.
    """
    device = data.train.inputs.device
    rows, features = data.train.inputs.shape
    batch_size = int(hyperparameters["batch_size"])
    mask_stream = int(hyperparameters.get("mask_stream", PARAMETERS["mask_stream"].default))
    head = build_head(hyperparameters, features, data.classes, seed).to(device)
    optimizer = _build_optimizer(head, hyperparameters)

    history: list[EpochMetrics] = []
    for epoch in range(1, epochs + 1):
        start = time.time()
        order = epoch_order(rows, seed, epoch).to(device)
        torch.manual_seed(derive_seed(seed, "masks", mask_stream, epoch))
        head.train()
        for batch in order.split(batch_size):
            logits = forward(head, data.train.inputs[batch])
            loss = F.cross_entropy(logits, data.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        train_loss, train_accuracy = evaluate(head, data.monitor)
        val_loss, val_accuracy = evaluate(head, data.val)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise NonFiniteLossError(f"the loss is not finite after epoch {epoch}")

        now = val_accuracy if metric == "val_accuracy" else val_loss
        improved = not history or is_better(now, history[-1].score, metric)
        history.append(
            EpochMetrics(
                epoch=epoch,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                score=now if improved else history[-1].score,
                best_epoch=epoch if improved else history[-1].best_epoch,
                start=start,
                end=time.time(),
            )
        )
        if improved:
            best = _snapshot(head, epoch)
        report(history[-1], best)
    return Run(tuple(history), best, _snapshot(head, epochs))


def is_better(value: float, than: float, metric: Metric) -> bool:
    """Whether a value of the metric is strictly better than another."""
    return value > than if metric == "val_accuracy" else value < than


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through the training rows: a permutation, [rows], int64."""
    return torch.randperm(rows, generator=generator(seed, "order", epoch))


def forward(head: nn.Module, inputs: Tensor) -> Tensor:
    """Logits [batch, classes] in fp32; matrices in bf16 where the device is faster with it.

    The weights and the optimiser's state stay fp32.
    """
    if not has_native_bf16(inputs.device):
        return head(inputs.float())  # type: ignore[no-any-return]
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return head(inputs).float()  # type: ignore[no-any-return]


def predict(head: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in evaluation mode: [n, features] -> [n, classes], fp32."""
    head.eval()
    with torch.inference_mode():
        return torch.cat([forward(head, part) for part in inputs.split(EVALUATION_BATCH)])


def evaluate(head: nn.Module, part: Part) -> tuple[float, float]:
    """Loss (mean cross-entropy, nats) and accuracy (fraction) in evaluation mode."""
    return loss_and_accuracy(predict(head, part.inputs), part.labels)


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss (mean cross-entropy, nats) and accuracy (fraction) of logits [n, classes]."""
    loss = F.cross_entropy(logits, labels).item()
    correct = (logits.argmax(dim=1) == labels).sum().item()
    return loss, correct / len(labels)


def _build_optimizer(
    head: nn.Module, hyperparameters: Mapping[str, Value]
) -> torch.optim.Optimizer:
    adamw = hyperparameters["optimizer"] == "adamw"
    return (torch.optim.AdamW if adamw else torch.optim.Adam)(
        head.parameters(),
        lr=float(hyperparameters["learning_rate"]),
        weight_decay=float(hyperparameters["weight_decay"]),
        fused=True,
    )


def _snapshot(head: nn.Module, epoch: int) -> Snapshot:
    weights = {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}
    return Snapshot(epoch, weights)
