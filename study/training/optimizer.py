"""The optimizer of a run and its learning rate schedule."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from search_spaces import Value, value_of


class _Uncompiled:
    """Optimizer methods without the wrappers that hide them from PyTorch's compiler.

    The compiler is not used here, and the first wrapper called would import it, at a cost of 2 s
    and 160 MB per process.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class _Adam(_Uncompiled, torch.optim.Adam):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class _AdamW(_Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(
    model: nn.Module, hyperparameters: Mapping[str, Value]
) -> torch.optim.Optimizer:
    """Build Adam or AdamW over the trainable parameters.

    The backbone has its own learning rate. The scales and shifts of its BatchNorms, which are few
    and hold no pattern, are not decayed.

    Args:
        model: Parameters whose names start with "backbone." are the backbone's; all others are the
            head's. Those that do not require gradients are skipped.
        hyperparameters: The run's hyperparameters.
    """
    head: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not name.startswith("backbone."):
            head.append(parameter)
        else:
            (kernels if parameter.ndim > 1 else norms).append(parameter)

    rate = float(value_of(hyperparameters, "learning_rate"))
    slow = rate * float(value_of(hyperparameters, "backbone_lr_ratio"))
    decay = float(value_of(hyperparameters, "weight_decay"))
    groups: list[dict[str, Any]] = [
        {"params": parameters, "base_lr": lr, "lr": lr, "weight_decay": weight_decay}
        for parameters, lr, weight_decay in (
            (head, rate, decay),
            (kernels, slow, decay),
            (norms, slow, 0.0),
        )
        if parameters
    ]
    device = head[0].device
    if device.type == "cuda":
        # A CUDA graph always reads the rate from the memory it was captured with.
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    adamw = hyperparameters["optimizer"] == "adamw"
    return (_AdamW if adamw else _Adam)(groups, fused=True, capturable=device.type == "cuda")


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every learning rate to its full value times `factor`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group["base_lr"] * factor)
        else:
            group["lr"] = group["base_lr"] * factor


def learning_rate_factor(
    hyperparameters: Mapping[str, Value], step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Return the learning rate of a step as a fraction of the full one.

    Args:
        hyperparameters: `lr_warmup_epochs` and `lr_schedule` are read.
        step: Step of the whole run, from 0.
        steps_per_epoch: 1 or more.
        epochs: Epochs of a full run.

    Returns:
        Above 0 and at most 1.
    """
    warmup = int(value_of(hyperparameters, "lr_warmup_epochs")) * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if value_of(hyperparameters, "lr_schedule") == "constant":
        return 1.0
    done = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
