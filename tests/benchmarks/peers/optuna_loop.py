"""Plain Optuna in one process, on cached features, with a typical PyTorch loop."""

import time
from collections.abc import Iterator
from dataclasses import asdict

import optuna
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.peers.torch_head import build_head
from tests.benchmarks.peers.work import Trial, Work, answer, parser


def main() -> None:
    """Run the trials one after another."""
    options = parser()
    options.add_argument("--threads", type=int, help="default: PyTorch's, one per core")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    work: Work = given.work
    train_data, val_data = (
        TensorDataset(
            torch.from_numpy(work.array(f"{part}_features")),
            torch.from_numpy(work.array(f"{part}_labels")),
        )
        for part in ("train", "val")
    )
    accuracies: list[list[float]] = []

    def objective(trial: optuna.Trial) -> float:
        heads = sorted({trial.head for trial in work.trials})
        hyperparameters = Trial(
            head=trial.suggest_categorical("head", heads),
            dropout=trial.suggest_float("dropout", 0.0, 0.6),
            learning_rate=trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
            batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
            seed=trial.number,
        )
        accuracies.append([])
        for epoch, accuracy in enumerate(train(hyperparameters, work.epochs, train_data, val_data)):
            accuracies[-1].append(accuracy)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracies[-1][-1]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = time.time()
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    for trial in work.trials:
        study.enqueue_trial({k: value for k, value in asdict(trial).items() if k != "seed"})
    study.optimize(objective, n_trials=len(work.trials))
    answer(accuracies, time.time() - start, ["optuna", "torch"])


def train(
    trial: Trial, epochs: int, train_data: TensorDataset, val_data: TensorDataset
) -> Iterator[float]:
    """Train a head; yield the accuracy on val after each epoch."""
    torch.manual_seed(trial.seed)
    model = build_head(trial, features=train_data.tensors[0].shape[1])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=trial.learning_rate, weight_decay=trial.weight_decay
    )
    train_loader = DataLoader(train_data, batch_size=trial.batch_size, shuffle=True)
    val_loader = DataLoader(val_data, batch_size=1024)
    for _ in range(epochs):
        model.train()
        for features, labels in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for features, labels in val_loader:
                right += int((model(features).argmax(dim=1) == labels).sum())
        yield right / len(val_data)


if __name__ == "__main__":
    main()
