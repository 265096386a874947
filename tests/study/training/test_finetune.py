"""Runs that train the whole network: on 400 real images, from random weights.

A ResNet50 trains slowly without a GPU, so images and epochs are few; test_end_to_end.py uses
pretrained weights.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from search_spaces import find_space
from study.config import Augment
from study.data.dataset import Dataset
from study.data.split import Split, make_split
from study.models.backbone import KERAS, build_backbone
from study.models.network import Network, Pretrained
from study.models.weights import Weights
from study.runs.gpu_load import largest_run, measure_load
from study.training.checkpoint import load_checkpoint, save_checkpoint
from study.training.data import TrainingArrays, TrainingData
from study.training.evaluate import evaluate
from study.training.loop import (
    EpochWeights,
    TakeState,
    TrainingResult,
    TrainingState,
    build_model,
    train,
)
from study.training.prepare import prepare_images
from study.training.step import TrainingStep

RECIPE: dict[str, Any] = {
    "head": "32",
    "learning_rate": 1e-3,
    "backbone_lr_ratio": 1.0,
    "weight_decay": 1e-4,
    "batch_size": 20,
    "optimizer": "adamw",
    "dropout": 0.3,
}
CPU = torch.device("cpu")


def arrays(
    dataset: Dataset, weights: Weights, images: int = 60, augment: Augment = "none"
) -> TrainingArrays:
    """The first training images of the small dataset, at 32 px."""
    whole = make_split(dataset)
    split = Split(whole.train[:images], whole.val[:20], whole.test[:20], "")
    preprocess = replace(weights.preprocess, image_size=32)
    pretrained = Pretrained(weights.state, weights.architecture, preprocess)
    return prepare_images(dataset, split, pretrained, augment).training


@pytest.fixture
def data(small_dataset: Dataset, random_weights: Weights) -> TrainingData:
    return arrays(small_dataset, random_weights).to(CPU)


def short(data: TrainingData, *, seed: int = 1, epochs: int = 1, **values: Any) -> TrainingResult:
    return train({**RECIPE, **values}, data, seed=seed, epochs=epochs, metric="val_loss")


def same(a: EpochWeights, b: EpochWeights) -> bool:
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(a.weights[name], b.weights[name]) for name in a.weights
    )


def changed(before: Pretrained, after: EpochWeights) -> set[str]:
    """Return the names of the backbone's tensors that training changed."""
    return {
        name
        for name, value in before.state.items()
        if not torch.equal(value, after.weights[f"backbone.{name}"])
    }


def pretrained_of(data: TrainingData) -> Pretrained:
    assert data.pretrained is not None
    return data.pretrained


@pytest.mark.integration
def test_it_learns(small_dataset: Dataset, keras_weights: Weights) -> None:
    """On 267 images from pretrained weights, the loss falls and accuracy is far above chance."""
    data = arrays(small_dataset, keras_weights, images=267).to(CPU)
    run = train(
        {**RECIPE, "learning_rate": 3e-4, "dropout": 0.1},
        data,
        seed=1,
        epochs=7,
        metric="val_loss",
    )
    losses = [epoch.train_loss for epoch in run.epochs]
    assert losses[-1] < 0.7 * losses[0]
    assert run.epochs[-1].train_accuracy > 0.5
    loss, accuracy = evaluate(build_model_from(run.last, data), data.monitor)
    assert (loss, accuracy) == (run.epochs[-1].train_loss, run.epochs[-1].train_accuracy)


def build_model_from(snapshot: EpochWeights, data: TrainingData) -> nn.Module:
    model = build_model(RECIPE, data, seed=99)
    model.load_state_dict(snapshot.weights)
    return model


def test_a_run_does_not_affect_the_next(data: TrainingData) -> None:
    """The same seed gives the same result, first in a process or after different runs."""
    before = {name: value.clone() for name, value in pretrained_of(data).state.items()}
    first = short(data)
    short(data, seed=2, head="16", dropout=0.6, batch_norm="pretrained")
    short(data, seed=3, frozen_layers="stage-3", batch_size=30)
    assert same(first.last, short(data).last)
    assert not same(first.last, short(data, seed=2).last)
    assert all(torch.equal(before[name], pretrained_of(data).state[name]) for name in before)


@pytest.mark.parametrize(
    ("frozen_layers", "trains"),
    [
        ("none", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("stem", ("layer1", "layer2", "layer3", "layer4")),
        ("stage-3", ("layer4",)),
    ],
)
def test_frozen_layers_do_not_change(
    data: TrainingData, frozen_layers: str, trains: tuple[str, ...]
) -> None:
    """Neither their weights nor their BatchNorm statistics; all other layers change."""
    state = pretrained_of(data).state
    run = short(data, frozen_layers=frozen_layers)
    expected = {name for name in state if name.split(".")[0] in trains}
    assert changed(pretrained_of(data), run.last) == expected


def test_pretrained_statistics_stay_fixed_and_everything_else_trains(data: TrainingData) -> None:
    state = pretrained_of(data).state
    run = short(data, batch_norm="pretrained")
    expected = {name for name in state if "running" not in name}
    assert changed(pretrained_of(data), run.last) == expected


def test_statistics_move_by_the_momentum_of_the_weights(random_weights: Weights) -> None:
    """Keras' 0.99 is PyTorch's 0.01."""
    for architecture, momentum in ((random_weights.architecture, 0.1), (KERAS, 0.01)):
        backbone = build_backbone(random_weights.state, architecture).train()
        image = torch.randn(8, 3, 32, 32)
        before = random_weights.state["bn1.running_mean"]
        batch = backbone.conv1(image).mean(dim=(0, 2, 3))  # type: ignore[operator]
        backbone(image)
        after = backbone.bn1.running_mean  # type: ignore[union-attr]
        assert torch.allclose(after, before + momentum * (batch - before), atol=1e-5)  # type: ignore[arg-type]


def test_augmentation_is_the_same_for_a_matched_pair_and_changes_by_epoch(
    small_dataset: Dataset, random_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = arrays(small_dataset, random_weights, augment="crop-flip").to(CPU)
    seen: list[Tensor] = []
    real = Network.forward

    def recorded(self: Network, pixels: Tensor) -> Tensor:
        if self.training:
            seen.append(pixels.clone())
        return real(self, pixels)

    monkeypatch.setattr(Network, "forward", recorded)
    for rate in (0.0, 0.5):
        short(data, dropout=rate, epochs=2, frozen_layers="stage-3")
    assert len(seen) == 12
    assert all(torch.equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True))
    epochs = [{image.numpy().tobytes() for image in torch.cat(seen[i : i + 3])} for i in (0, 3)]
    assert len(epochs[0] & epochs[1]) < 30


def test_replayed_steps_equal_plain_ones(data: TrainingData) -> None:
    """Test the buffers that a CUDA graph reads from, with a replay that repeats the work.

    It stands in for the graph, which needs a GPU; tests/benchmarks/finetune.py has the real one.
    """
    batches = [torch.arange(start, start + 20) for start in (0, 20, 40, 10, 30)]
    batches.append(torch.arange(7))
    views = [torch.randint(0, 2, (len(batch), 3)) for batch in batches]
    captured = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return work

    weights = []
    for capture in (None, record):
        torch.manual_seed(0)
        model = build_model(RECIPE, data, seed=1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = TrainingStep(
            model, optimizer, data.train.inputs, data.train.labels, RECIPE, capture=capture
        )
        for batch, view in zip(batches, views, strict=True):
            step(batch, view)
        weights.append(model.state_dict())
    assert len(captured) == 1
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class NothingFromPython(TorchDispatchMode):
    """Raises if a tensor is made from Python numbers or converted to one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forbidden = (torch.ops.aten.lift_fresh, torch.ops.aten._local_scalar_dense)
        assert func.overloadpacket not in forbidden, func
        return func(*args, **(kwargs or {}))


def test_a_step_exchanges_no_data_with_python(data: TrainingData) -> None:
    """On a GPU that would be copies to and from the CPU, which a CUDA graph cannot contain."""
    model = build_model(RECIPE, data, seed=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = TrainingStep(model, optimizer, data.train.inputs, data.train.labels, RECIPE)
    rows = torch.arange(4)
    step(rows, None)
    with NothingFromPython():
        step(rows, torch.ones(4, 3, dtype=torch.int64))


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    small_dataset: Dataset, random_weights: Weights, stopped_after: int, tmp_path: Path
) -> None:
    """Stopped in the backbone's warm-up (the first two states) or after it."""
    data = arrays(small_dataset, random_weights, augment="flip").to(CPU)
    values = {**RECIPE, "backbone_warmup_epochs": 2, "frozen_layers": "stage-3"}
    states: list[TrainingState] = []
    epochs: list[int] = []

    def save(epoch: int, take: TakeState) -> None:
        epochs.append(epoch)
        states.append(take())

    whole = train(values, data, seed=5, epochs=3, metric="val_loss", save=save)
    assert epochs == [0, 0, 1, 2, 3]
    save_checkpoint(tmp_path / "state", states[stopped_after], "this run")
    resume = load_checkpoint(tmp_path / "state", "this run")
    assert resume.warmup == (stopped_after < 2)
    trained_again: list[int] = []
    resumed = train(
        values,
        data,
        seed=5,
        epochs=3,
        metric="val_loss",
        save=lambda epoch, _: trained_again.append(epoch),
        resume=resume,
    )
    assert trained_again == epochs[stopped_after + 1 :]
    assert same(resumed.last, whole.last)
    assert same(resumed.best, whole.best)


def test_after_the_warm_up_the_backbone_is_that_of_the_run_without_dropout(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run at the same seed, after its last epoch; the head is a new one."""
    built: list[nn.Module] = []
    real = Pretrained.build

    def recorded(self: Pretrained, *arguments: Any) -> Network:
        built.append(real(self, *arguments))
        return built[-1]  # type: ignore[return-value]

    first = short(data, dropout=0.0, epochs=2)
    monkeypatch.setattr(Pretrained, "build", recorded)
    starts: list[dict[str, Tensor]] = []
    real_train = Network.train

    def at_start(self: Network, mode: bool = True) -> Network:
        # The first network is the warm-up's.
        if mode and self is not built[0] and not starts:
            starts.append({name: value.clone() for name, value in self.state_dict().items()})
        return real_train(self, mode)

    monkeypatch.setattr(Network, "train", at_start)
    short(data, dropout=0.4, backbone_warmup_epochs=2)
    (start,) = starts
    for name, value in first.last.weights.items():
        assert torch.equal(value, start[name]) == (
            name.startswith("backbone.") or name.endswith("bias")
        ) or name.startswith("head."), name
    fresh = build_model(RECIPE, data, seed=1).state_dict()
    assert not torch.equal(start["head.0.weight"], fresh["head.0.weight"])
    assert not torch.equal(start["head.0.weight"], first.last.weights["head.0.weight"])


def test_load_is_measured_on_the_largest_run(data: TrainingData) -> None:
    values = largest_run(find_space("finetune"))
    assert values["head"] == "1024"  # the one with the most parameters
    assert values["batch_size"] == 256
    assert values["frozen_layers"] == "none"
    load = measure_load({**values, "batch_size": 20}, data)
    assert load.device == "CPU"
    assert load.images_per_second == pytest.approx(20 / load.step_seconds)
