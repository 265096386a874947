"""One training run, of a head on features or of a whole network on images.

Trials and confirmation runs share this loop. It is independent of Ray: it takes data,
hyperparameters and a seed, and calls `report` after each epoch.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from analysis.rundir.metric import Metric, is_better
from search_spaces import Value, value_of, without_dropout
from study.models.head import build_head
from study.models.state_dict import copy_to_cpu
from study.seeds import derive_seed, generator
from study.training.augment import draw_views
from study.training.data import TrainingData
from study.training.evaluate import (
    balanced_accuracy,
    compute_logits,
    evaluate,
    loss_and_accuracy,
)
from study.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rates
from study.training.step import TrainingStep, own_stream


@dataclass(frozen=True)
class EpochMetrics:
    """A run's metrics after an epoch, measured in evaluation mode (dropout off)."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean cross-entropy in nats on `monitor`."""
    train_accuracy: float
    """Fraction 0 to 1 on `monitor`."""
    val_loss: float
    val_accuracy: float
    score: float
    """The best value so far of the metric on val."""
    best_epoch: int
    """The epoch that reached the score."""
    start: float
    """Unix time in seconds."""
    end: float
    val_balanced_accuracy: float = math.nan
    """Mean of the per-class accuracies on val."""


@dataclass(frozen=True)
class EpochWeights:
    """Model weights after an epoch, fp32 on the CPU: the head's, or the whole network's."""

    epoch: int
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training run."""

    epochs: tuple[EpochMetrics, ...]
    best: EpochWeights
    """After the best epoch by the metric on val; ties go to the earlier one."""
    last: EpochWeights


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to resume after an epoch as if it had never stopped.

    It has no random generator state: each epoch derives its streams from the seed.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """The optimizer's tensors, named "<parameter number>.<name>"."""
    history: tuple[EpochMetrics, ...]
    """The finished epochs, at least one; while the backbone warms up, those of the warm-up."""
    best: EpochWeights
    warmup: bool = False
    """True while the backbone warms up."""


#: Takes the state of a run; valid until the run continues.
TakeState = Callable[[], TrainingState]

#: Called after each epoch, with its number (0 in the backbone's warm-up).
Save = Callable[[int, TakeState], None]


class NonFiniteLossError(Exception):
    """The loss became infinite or NaN: the run diverged."""


def train(
    hyperparameters: Mapping[str, Value],
    data: TrainingData,
    *,
    seed: int,
    epochs: int,
    metric: Metric,
    report: Callable[[EpochMetrics], None] = lambda _: None,
    save: Save = lambda *_: None,
    resume: TrainingState | None = None,
) -> TrainingResult:
    """Train a new head, and the backbone under it where `data` has one.

    Args:
        hyperparameters: The recipe and the factor, named as in `search_spaces`.
        data: On the training device.
        seed: Initial weights, data order, augmentation and dropout masks each have a stream
            derived from it. The same seed gives the same result on the same machine with the same
            number of threads; on a GPU, up to the rounding of sums whose order varies.
        epochs: Epochs to train, 1 or more.
        metric: Defines "best": the smallest `val_loss`, or the largest value of another metric.
        report: Called after each epoch with its metrics; may end the run by raising.
        save: Called before `report`, and after each epoch of the backbone's warm-up, with a
            function that takes the run's state.
        resume: State to resume from, saved by a run with the same arguments; the result is the one
            that run would have had. Finished epochs are not reported again.

    Returns:
        The metrics of every epoch, and the weights after the best epoch and after the last.

    Raises:
        NonFiniteLossError: The loss on monitor or val is not finite.
    """
    device = data.train.inputs.device
    rows = len(data.train.labels)
    batch_size = int(hyperparameters["batch_size"])
    mask_stream = int(value_of(hyperparameters, "mask_stream"))
    with own_stream(device):
        model, seed = _initial_model(hyperparameters, data, seed, metric, save, resume)
        optimizer = build_optimizer(model, hyperparameters)
        history: list[EpochMetrics] = []
        if resume is not None and not resume.warmup:
            restore(resume, model, optimizer)
            history, best = list(resume.history), resume.best
        step = TrainingStep(model, optimizer, data.train.inputs, data.train.labels, hyperparameters)
        steps = len(batches(torch.arange(rows), batch_size))
        for epoch in range(len(history) + 1, epochs + 1):
            start = time.time()
            order = epoch_order(rows, seed, epoch).to(device)
            views = _epoch_views(data, seed, epoch)
            torch.manual_seed(derive_seed(seed, "masks", mask_stream, epoch))
            model.train()
            for number, batch in enumerate(batches(order, batch_size), start=(epoch - 1) * steps):
                factor = learning_rate_factor(hyperparameters, number, steps, epochs)
                set_learning_rates(optimizer, factor)
                step(batch, None if views is None else views[batch])

            train_loss, train_accuracy = evaluate(model, data.monitor)
            val_logits = compute_logits(model, data.val.inputs)
            val_loss, val_accuracy = loss_and_accuracy(val_logits, data.val.labels)
            val_balanced_accuracy = balanced_accuracy(val_logits, data.val.labels)
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                raise NonFiniteLossError(f"the loss is not finite after epoch {epoch}")

            now = {
                "val_accuracy": val_accuracy,
                "val_loss": val_loss,
                "val_balanced_accuracy": val_balanced_accuracy,
            }[metric]
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
                    val_balanced_accuracy=val_balanced_accuracy,
                )
            )
            if improved:
                best = _epoch_weights(model, epoch)
            # History and best are bound now, the model is not: valid only until the next epoch.
            save(epoch, partial(take_state, model, optimizer, tuple(history), best))
            report(history[-1])
        return TrainingResult(tuple(history), best, _epoch_weights(model, epochs))


def build_model(hyperparameters: Mapping[str, Value], data: TrainingData, seed: int) -> nn.Module:
    """Build the model to train: a head on features or a whole network on images.

    Args:
        hyperparameters: The run's hyperparameters.
        data: Determines which of the two, the number of classes and the device.
        seed: The head's initial weights come from its stream "weights".
    """
    if data.pretrained is None:
        features = data.train.inputs.shape[1]
        return build_head(hyperparameters, features, data.classes, seed).to(data.device)
    return data.pretrained.build(hyperparameters, data.classes, seed)


def _initial_model(
    hyperparameters: Mapping[str, Value],
    data: TrainingData,
    seed: int,
    metric: Metric,
    save: Save,
    resume: TrainingState | None,
) -> tuple[nn.Module, int]:
    """Return the model at the start of the run's first epoch, and the seed of the run's streams.

    The backbone's warm-up is a separate run, the same as a run without dropout at this seed. The
    run after it uses other streams: a new head with the initial weights of the warm-up's head would
    start on a backbone already fitted to them.
    """
    warmup = int(value_of(hyperparameters, "backbone_warmup_epochs"))
    if data.pretrained is None or warmup == 0:
        return build_model(hyperparameters, data, seed), seed
    trained: dict[str, Tensor] = {}
    if resume is None or resume.warmup:
        first = train(
            {**without_dropout(hyperparameters), "backbone_warmup_epochs": 0},
            data,
            seed=seed,
            epochs=warmup,
            metric=metric,
            save=lambda _, take: save(0, lambda: replace(take(), warmup=True)),
            resume=resume and replace(resume, warmup=False),
        )
        weights = first.last.weights
        trained = {k: value for k, value in weights.items() if k.startswith("backbone.")}
    later_seed = derive_seed(seed, "after the warm-up")
    model = build_model(hyperparameters, data, later_seed)
    model.load_state_dict({**model.state_dict(), **trained})
    return model, later_seed


def _epoch_views(data: TrainingData, seed: int, epoch: int) -> Tensor | None:
    """Draw the augmentation of each training image for an epoch; None without augmentation."""
    if data.augment == "none":
        return None
    rows, height, width, _ = data.train.inputs.shape
    random = generator(seed, "augmentation", epoch)
    return draw_views(data.augment, rows, height, width, random).to(data.device)


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Split an epoch's order into batches.

    A last batch of one image joins the batch before it: BatchNorm cannot normalise a single image.
    """
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training rows in an epoch: a permutation, int64 [rows]."""
    return torch.randperm(rows, generator=generator(seed, "order", epoch))


def _epoch_weights(model: nn.Module, epoch: int) -> EpochWeights:
    return EpochWeights(epoch, copy_to_cpu(model.state_dict()))


def take_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: tuple[EpochMetrics, ...],
    best: EpochWeights,
) -> TrainingState:
    """Copy the state of a run."""
    tensors = {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return TrainingState(copy_to_cpu(model.state_dict()), copy_to_cpu(tensors), history, best)


def restore(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a saved state into a model and a new optimizer of the same kind."""
    model.load_state_dict(state.model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.optimizer.items():
        number, _, kind = name.partition(".")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # The fused optimizer walks through memory: moments need the layout of the weights.
            tensor = torch.empty_like(parameter).copy_(tensor)
        values.setdefault(int(number), {})[kind] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
