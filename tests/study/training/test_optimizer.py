"""The optimizer's groups and learning rates."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from study.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rates

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.3,
    "optimizer": "adamw",
    "backbone_lr_ratio": 0.25,
}


class Small(nn.Module):
    """A small model with the module names of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
        self.head = nn.Linear(1, 1)


def test_backbone_and_head_have_separate_rates_and_norms_do_not_decay() -> None:
    model = Small()
    names = {id(value): name for name, value in model.named_parameters()}
    groups = {
        tuple(names[id(value)] for value in group["params"]): (group["lr"], group["weight_decay"])
        for group in build_optimizer(model, RECIPE).param_groups
    }
    assert groups == {
        ("head.weight", "head.bias"): (1e-2, 0.3),
        ("backbone.0.weight",): (2.5e-3, 0.3),
        ("backbone.1.weight", "backbone.1.bias"): (2.5e-3, 0.0),
    }


def test_parameters_that_do_not_require_gradients_are_skipped() -> None:
    model = Small()
    model.backbone.requires_grad_(False)
    (group,) = build_optimizer(model, RECIPE).param_groups
    assert len(group["params"]) == 2


@pytest.mark.parametrize(
    ("name", "plain"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_steps_match_torchs_own_optimizer(name: str, plain: type[torch.optim.Optimizer]) -> None:
    results = []
    for own in (True, False):
        model = nn.Linear(3, 2)
        model.load_state_dict({"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)})
        if own:
            optimizer = build_optimizer(model, {**RECIPE, "optimizer": name})
        else:
            optimizer = plain(model.parameters(), lr=1e-2, weight_decay=0.3, fused=True)  # type: ignore[call-arg]
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([[1.0, -2.0, 0.5]])).square().sum().backward()
            optimizer.step()
        saved = optimizer.state_dict()["state"][0]
        results.append([model.weight.detach(), saved["exp_avg"], saved["exp_avg_sq"]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rates_are_set_relative_to_the_full_ones(as_tensor: bool) -> None:
    """Tensors are set in place, as a CUDA graph needs."""
    optimizer = build_optimizer(Small(), RECIPE)
    if as_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    held = [group["lr"] for group in optimizer.param_groups]
    for factor in (0.5, 0.1):
        set_learning_rates(optimizer, factor)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-2 * factor, 2.5e-3 * factor, 2.5e-3 * factor])
    if as_tensor:
        now = [group["lr"] for group in optimizer.param_groups]
        assert all(a is b for a, b in zip(held, now, strict=True))


def factors(**values: Any) -> list[float]:
    return [learning_rate_factor(values, step, steps_per_epoch=4, epochs=3) for step in range(12)]


def test_a_constant_schedule_is_constant() -> None:
    assert factors(lr_schedule="constant") == [1.0] * 12


def test_a_cosine_falls_from_one_towards_zero() -> None:
    values = factors(lr_schedule="cosine")
    assert values[0] == 1.0
    assert values[6] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 11 / 12)))


def test_a_warm_up_rises_step_by_step_and_the_schedule_follows() -> None:
    values = factors(lr_schedule="cosine", lr_warmup_epochs=1)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4] == 1.0
    assert values[8] == pytest.approx(0.5)
