"""The training loop, on small synthetic features (two Gaussian clouds per class)."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.rundir.metric import Metric, is_better
from study.errors import StorageError
from study.models.head import Dropout, Linear, build_head, restore_head
from study.models.state_dict import save_safetensors
from study.seeds import derive_seed
from study.training import loop, step
from study.training.checkpoint import load_checkpoint, save_checkpoint
from study.training.data import Part, TrainingData
from study.training.evaluate import balanced_accuracy, compute_logits, evaluate, loss_and_accuracy
from study.training.loop import (
    EpochMetrics,
    NonFiniteLossError,
    TakeState,
    TrainingState,
    batches,
    epoch_order,
    train,
)
from study.training.optimizer import learning_rate_factor

RECIPE: dict[str, Any] = {
    "head": "32-16",
    "learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "batch_size": 64,
    "optimizer": "adamw",
    "dropout": 0.3,
}


def synthetic_part(rows: int, seed: int) -> Part:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(99))
    values = centres[labels] + 1.5 * torch.randn(rows, 24, generator=random)
    return Part(values.bfloat16(), labels)


@pytest.fixture
def data() -> TrainingData:
    part = synthetic_part(600, seed=1)
    return TrainingData(part, synthetic_part(100, seed=2), synthetic_part(200, seed=3), classes=4)


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "has_native_bf16", lambda _: request.param)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outcome(metrics: EpochMetrics) -> EpochMetrics:
    """Metrics without start and end times."""
    return replace(metrics, start=0.0, end=0.0)


@pytest.mark.usefixtures("precision")
def test_it_learns(data: TrainingData) -> None:
    run = train(RECIPE, data, seed=5, epochs=8, metric="val_accuracy")
    assert run.epochs[-1].val_accuracy > 0.8
    assert run.epochs[-1].val_loss < run.epochs[0].val_loss


@pytest.mark.usefixtures("precision")
def test_the_same_seed_gives_the_same_run(data: TrainingData) -> None:
    first, second = (train(RECIPE, data, seed=5, epochs=3, metric="val_loss") for _ in range(2))
    assert [*map(outcome, first.epochs)] == [*map(outcome, second.epochs)]
    assert same(first.last.weights, second.last.weights)
    other = train(RECIPE, data, seed=6, epochs=3, metric="val_loss")
    assert not same(first.last.weights, other.last.weights)


def test_a_run_does_not_depend_on_what_ran_before_it(data: TrainingData) -> None:
    first = train(RECIPE, data, seed=5, epochs=2, metric="val_loss")
    torch.randn(17)
    train({**RECIPE, "head": "8", "dropout": 0.6}, data, seed=9, epochs=1, metric="val_loss")
    second = train(RECIPE, data, seed=5, epochs=2, metric="val_loss")
    assert same(first.last.weights, second.last.weights)


def test_a_matched_pair_starts_from_the_same_weights_and_sees_the_same_batches(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of a recipe and a seed differ in dropout alone."""
    initial: list[dict[str, Tensor]] = []
    batches: list[list[Tensor]] = []
    real_forward = step.forward

    def recorded_head(*arguments: Any) -> torch.nn.Sequential:
        head = build_head(*arguments)
        initial.append({name: value.clone() for name, value in head.state_dict().items()})
        batches.append([])
        return head

    def recorded_forward(head: torch.nn.Module, inputs: Tensor) -> Tensor:
        if head.training:
            batches[-1].append(inputs.clone())
        return real_forward(head, inputs)

    monkeypatch.setattr(loop, "build_head", recorded_head)
    monkeypatch.setattr(step, "forward", recorded_forward)
    without, with_ = (
        train({**RECIPE, "dropout": rate}, data, seed=7, epochs=2, metric="val_accuracy")
        for rate in (0.0, 0.5)
    )
    assert same(*initial)
    assert len(batches[0]) == 2 * math.ceil(600 / 64)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert not same(without.last.weights, with_.last.weights)


def test_the_placebo_changes_only_the_masks(data: TrainingData) -> None:
    def run(**values: float) -> Tensor:
        finished = train({**RECIPE, **values}, data, seed=7, epochs=1, metric="val_loss")
        return finished.last.weights["0.weight"]

    assert torch.equal(run(), run(mask_stream=1))
    assert not torch.equal(run(), run(mask_stream=2))
    assert torch.equal(run(dropout=0.0), run(dropout=0.0, mask_stream=2))


def test_every_epoch_sees_every_row_once_in_its_own_order() -> None:
    orders = [epoch_order(600, seed=1, epoch=epoch) for epoch in (1, 2)]
    assert all(torch.equal(order.sort().values, torch.arange(600)) for order in orders)
    assert not torch.equal(*orders)


def test_the_best_epoch_follows_the_metric(data: TrainingData) -> None:
    metrics: tuple[Metric, ...] = ("val_accuracy", "val_loss", "val_balanced_accuracy")
    for metric in metrics:
        reported: list[EpochMetrics] = []

        values = {**RECIPE, "learning_rate": 3e-2, "dropout": 0.0}
        run = train(values, data, seed=3, epochs=20, metric=metric, report=reported.append)
        curve = [getattr(epoch, metric) for epoch in run.epochs]
        best = min(curve) if metric == "val_loss" else max(curve)
        assert run.best.epoch == 1 + curve.index(best) < 20
        assert run.epochs[-1].score == best
        assert run.epochs[-1].best_epoch == run.best.epoch
        assert reported == list(run.epochs)
        # The saved weights are those of that epoch: they give the same metrics.
        head = restore_head(run.best.weights, values)
        loss, accuracy = evaluate(head, data.val)
        assert (loss, accuracy) == (
            run.epochs[run.best.epoch - 1].val_loss,
            run.epochs[run.best.epoch - 1].val_accuracy,
        )


def test_metrics_are_measured_with_dropout_off(data: TrainingData) -> None:
    head = build_head({**RECIPE, "dropout": 0.6}, 24, 4, seed=1)
    head.train()
    assert torch.equal(compute_logits(head, data.val.inputs), compute_logits(head, data.val.inputs))


def test_a_non_finite_loss_ends_the_run(data: TrainingData) -> None:
    with pytest.raises(NonFiniteLossError, match="after epoch 1"):
        train({**RECIPE, "learning_rate": 1e30}, data, seed=1, epochs=3, metric="val_loss")


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    data: TrainingData, stopped_after: int, tmp_path: Path
) -> None:
    """Resumed from its checkpoint file, with a learning rate that changes at every step."""
    values = {**RECIPE, "lr_schedule": "cosine", "lr_warmup_epochs": 2, "learning_rate": 1e-2}
    states: list[TrainingState] = []

    def save(_: int, take: TakeState) -> None:
        states.append(take())

    whole = train(values, data, seed=5, epochs=5, metric="val_accuracy", save=save)
    save_checkpoint(tmp_path / "state", states[stopped_after - 1], "this run")
    again: list[EpochMetrics] = []
    resumed = train(
        values,
        data,
        seed=5,
        epochs=5,
        metric="val_accuracy",
        report=again.append,
        resume=load_checkpoint(tmp_path / "state", "this run"),
    )
    assert [epoch.epoch for epoch in again] == list(range(stopped_after + 1, 6))
    assert [*map(outcome, resumed.epochs)] == [*map(outcome, whole.epochs)]
    assert same(resumed.last.weights, whole.last.weights)
    assert resumed.best.epoch == whole.best.epoch
    assert same(resumed.best.weights, whole.best.weights)


def test_the_schedule_spans_the_run(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    monkeypatch.setattr(loop, "set_learning_rates", lambda _, factor: factors.append(factor))
    values = {**RECIPE, "lr_schedule": "cosine", "lr_warmup_epochs": 1}
    train(values, data, seed=1, epochs=3, metric="val_loss")
    steps = math.ceil(600 / 64)
    assert factors == [learning_rate_factor(values, step, steps, 3) for step in range(3 * steps)]


def test_damaged_checkpoints_and_those_of_other_runs_are_refused(
    data: TrainingData, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    train(
        RECIPE,
        data,
        seed=5,
        epochs=1,
        metric="val_loss",
        save=lambda _, take: save_checkpoint(path, take(), "this run"),
    )
    whole = path.read_bytes()
    assert load_checkpoint(path, "this run").history[-1].epoch == 1
    with pytest.raises(ValueError, match="it belongs to another run"):
        load_checkpoint(path, "another run")
    for content in (b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      ", whole[:-1], whole[:300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a valid checkpoint of this run"):
            load_checkpoint(path, "this run")
    path.unlink()
    with pytest.raises(ValueError, match="is not a valid checkpoint of this run"):
        load_checkpoint(path, "this run")


def test_a_vanished_run_directory_is_not_recreated(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written to \(No such file"):
        save_safetensors(tmp_path / "vanished" / "states" / "a.safetensors", {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    assert [len(batch) for batch in batches(torch.arange(9), 4)] == [4, 5]
    assert [len(batch) for batch in batches(torch.arange(10), 4)] == [4, 4, 2]
    assert [len(batch) for batch in batches(torch.arange(1), 4)] == [1]
    assert torch.equal(torch.cat(batches(torch.arange(9), 4)), torch.arange(9))


def test_balanced_accuracy_by_hand() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1, 0, 1]]
    # Correct: 3 of 3 in class 0, 1 of 2 in class 1, 0 of 1 in class 2.
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert balanced_accuracy(logits, labels) == pytest.approx((1 + 0.5 + 0) / 3)
    # A class without images does not count.
    assert balanced_accuracy(logits[:5], labels[:5]) == pytest.approx(0.75)


def test_loss_and_accuracy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    loss, accuracy = loss_and_accuracy(logits, torch.tensor([0, 1]))
    assert loss == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert accuracy == 0.5


def test_a_tie_is_not_better() -> None:
    assert is_better(0.9, 0.8, "val_accuracy")
    assert is_better(0.9, 0.8, "val_balanced_accuracy")
    assert not is_better(0.8, 0.8, "val_accuracy")
    assert is_better(0.3, 0.4, "val_loss")
    assert not is_better(0.4, 0.4, "val_loss")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rate", [0.05, 0.37, 0.6])
def test_dropout_drops_at_its_rate_and_scales_the_rest(dtype: torch.dtype, rate: float) -> None:
    torch.manual_seed(3)
    inputs = torch.ones(1_001, 999, dtype=dtype, requires_grad=True)
    outputs = Dropout(rate)(inputs)
    assert outputs.dtype == dtype
    dropped = outputs == 0
    # Five standard errors of a mean of n Bernoulli draws.
    tolerance = 5 * math.sqrt(rate * (1 - rate) / dropped.numel())
    assert dropped.double().mean() == pytest.approx(rate, abs=tolerance)
    assert outputs.max().item() == pytest.approx(1 / (1 - rate), rel=torch.finfo(dtype).eps)
    neighbours = (dropped[:, 1:] & dropped[:, :-1]).double().mean()
    assert neighbours == pytest.approx(rate**2, abs=5 * rate / math.sqrt(dropped.numel()))

    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs)  # type: ignore[arg-type]
    assert torch.equal(Dropout(rate).eval()(inputs), inputs)
    assert not torch.equal(Dropout(rate)(inputs), outputs)


@pytest.mark.parametrize("of_inputs", [False, True])
def test_a_linear_layer_in_bf16_matches_pytorchs_under_autocast(of_inputs: bool) -> None:
    torch.manual_seed(3)
    ours, theirs = Linear(300, 70), nn.Linear(300, 70)
    theirs.load_state_dict(ours.state_dict())
    values, weighted = torch.randn(90, 300).bfloat16(), torch.randn(90, 70).bfloat16()
    found = []
    for layer in (ours, theirs):
        inputs = values.clone().requires_grad_(of_inputs)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(inputs)
        (outputs * weighted).sum().backward()
        found.append([outputs, inputs.grad, layer.weight.grad, layer.bias.grad])
    # Up to the last bit of bf16, which depends on the order of a sum.
    torch.testing.assert_close(found[0], found[1], rtol=2**-7, atol=2**-7)
    assert (found[0][1] is not None) == of_inputs


def test_the_head_is_linear_relu_dropout_per_width() -> None:
    layers = build_head({"head": "8-6", "dropout_1": 0.1, "dropout_2": 0.4}, 5, 3, seed=0)
    assert [str(layer) for layer in layers] == [
        "Linear(in_features=5, out_features=8, bias=True)",
        "ReLU()",
        "Dropout(p=0.1, inplace=False)",
        "Linear(in_features=8, out_features=6, bias=True)",
        "ReLU()",
        "Dropout(p=0.4, inplace=False)",
        "Linear(in_features=6, out_features=3, bias=True)",
    ]


def test_building_a_head_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    build_head({"head": "8", "dropout": 0.1}, 5, 3, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_seeds_of_streams_differ_and_never_change() -> None:
    names = [("weights",), ("order", 1), ("order", 2), ("masks", 1), ("trial", "dropout", 1)]
    seeds = [derive_seed(0, *stream) for stream in names] + [derive_seed(1, "weights")]
    assert len(set(seeds)) == len(seeds)
    # Existing studies must stay reproducible.
    assert derive_seed(0, "weights") == WEIGHTS_SEED


WEIGHTS_SEED = 31069315
