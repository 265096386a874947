"""Evaluation of a model: logits, loss and accuracies."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study.training.data import Part
from study.training.step import forward, without_cudnn_benchmark

#: Rows of features per evaluation batch; bounds the memory of the widest hidden layer.
EVALUATION_BATCH = 2_500

#: Images per evaluation batch, by type of device.
IMAGE_BATCH = {"cpu": 128, "cuda": 512}


def compute_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Compute fp32 logits [n, classes] of features [n, features] or images, in evaluation mode."""
    size = EVALUATION_BATCH if inputs.ndim == 2 else IMAGE_BATCH[inputs.device.type]
    model.eval()
    logits = []
    with torch.inference_mode():
        for part in inputs.split(size):
            with nullcontext() if len(part) == size else without_cudnn_benchmark():
                logits.append(forward(model, part))
    return torch.cat(logits)


def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return loss (mean cross-entropy, nats) and accuracy (fraction) in evaluation mode."""
    return loss_and_accuracy(compute_logits(model, part.inputs), part.labels)


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return loss (mean cross-entropy, nats) and accuracy (fraction) of logits [n, classes]."""
    loss = F.cross_entropy(logits, labels).item()
    correct = (logits.argmax(dim=1) == labels).sum().item()
    return loss, correct / len(labels)


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the mean per-class accuracy of logits [n, classes], over the classes with labels."""
    images = labels.bincount(minlength=logits.shape[1])
    right = labels[logits.argmax(dim=1) == labels].bincount(minlength=logits.shape[1])
    present = images > 0
    return (right[present] / images[present]).double().mean().item()
