"""Which model is exported: chosen on val alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from analysis.rundir import ConfirmRow, RunDir, RunDirError
from analysis.rundir.metric import Metric, is_better
from analysis.rundir.predictions import read_predictions
from search_spaces import Value
from study.confirm.run import best_of
from study.errors import UserError
from study.search.champions import Champion
from study.study import Study
from study.training.evaluate import balanced_accuracy, loss_and_accuracy


@dataclass(frozen=True)
class Selection:
    """The run whose model is exported, or the runs whose heads make an ensemble."""

    run_ids: tuple[str, ...]
    hyperparameters: dict[str, Value]
    """The same for all of them."""
    score: float
    """The study's metric on val; of an ensemble its own."""
    trained: tuple[dict[str, Tensor], ...]
    """Their weights: the heads', or the whole network's."""
    rows: tuple[ConfirmRow, ...]
    """What their confirmation measured; empty for a trial of the search."""
    best_single: float | None = None
    """For an ensemble: the best score of a single run on val."""
    pays: bool | None = None
    """Whether the ensemble's score is better than that."""


def select_model(study: Study, champions: Sequence[Champion]) -> Selection:
    """What `--export` asks for.

    Args:
        study: Its run directory holds the runs.
        champions: Stand in for confirmation runs where there are none.

    Raises:
        UserError: There is no such run, or its weights cannot be read.
    """
    what, rows = study.config.export, study.rundir.read_confirm()
    if what == "ensemble":
        return _choose_ensemble(study, rows)
    wanted = [row for row in rows if what in ("best", row.setting)]
    if wanted:
        row = best_of(wanted, study.config.metric)
        weights = _weights(study.rundir, row.run_id)
        return Selection((row.run_id,), dict(row.hyperparameters), row.score, (weights,), (row,))
    if rows:
        raise UserError(f"--export {what}: no confirmation run of that setting has ended well.")
    return _choose_champion(study, [c for c in champions if what in ("best", c.arm)])


def _choose_champion(study: Study, champions: Sequence[Champion]) -> Selection:
    best: Champion | None = None
    for champion in champions:
        if champion.run_id and (
            best is None or is_better(champion.score, best.score, study.config.metric)
        ):
            best = champion
    if best is None:
        raise UserError(
            f"--export {study.config.export}: the search has no trial of it, and there are no"
            " confirmation runs (--seeds 0)."
        )
    run_id = str(best.run_id)
    return Selection(
        (run_id,), dict(best.hyperparameters), best.score, (_weights(study.rundir, run_id),), ()
    )


def _choose_ensemble(study: Study, rows: Sequence[ConfirmRow]) -> Selection:
    """Of all recipes with all settings, the one whose runs together are best on val."""
    metric = study.config.metric
    cells: dict[tuple[str, str], list[ConfirmRow]] = {}
    for row in rows:
        cells.setdefault((row.recipe, row.setting), []).append(row)
    best: list[ConfirmRow] = []
    best_score = 0.0
    for cell in cells.values():
        score = _score_together(study.rundir, cell, metric)
        if not best or is_better(score, best_score, metric):
            best, best_score = cell, score
    best_single = best_of(rows, metric).score
    return Selection(
        tuple(row.run_id for row in best),
        dict(best[0].hyperparameters),
        best_score,
        tuple(_weights(study.rundir, row.run_id) for row in best),
        tuple(best),
        best_single,
        is_better(best_score, best_single, metric),
    )


def _score_together(rundir: RunDir, rows: Sequence[ConfirmRow], metric: Metric) -> float:
    """The metric on val of the runs' mean probabilities, from their stored predictions."""
    stored = []
    for row in rows:
        file = rundir.predictions(row.run_id)
        rundir.fetch(file)
        try:
            stored.append(read_predictions(file, "val"))
        except RunDirError as error:
            raise UserError(f"{error}; --resume makes it anew.") from error
    mean = torch.stack([torch.from_numpy(p.probabilities) for p in stored]).mean(dim=0)
    labels, logits = torch.from_numpy(stored[0].labels), mean.log()
    loss, accuracy = loss_and_accuracy(logits, labels)
    return {
        "val_loss": loss,
        "val_accuracy": accuracy,
        "val_balanced_accuracy": balanced_accuracy(logits, labels),
    }[metric]


def _weights(rundir: RunDir, run_id: str) -> dict[str, Tensor]:
    file = rundir.weights(run_id)
    rundir.fetch(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}, the weights of a run that is to be exported, cannot be read ({error}); bring"
            " the file back."
        ) from error
