"""Selection of the model to export, on val alone."""

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
from study.confirm.run import best_row
from study.errors import UserError
from study.search.champions import Champion
from study.study import Study
from study.training.evaluate import balanced_accuracy, loss_and_accuracy


@dataclass(frozen=True)
class Selection:
    """The run whose model is exported, or the runs whose heads make an ensemble."""

    run_ids: tuple[str, ...]
    hyperparameters: dict[str, Value]
    """Shared by all of these runs."""
    score: float
    """The study's metric on val; for an ensemble, that of the ensemble."""
    trained: tuple[dict[str, Tensor], ...]
    """Weights of each run: its head's, or the whole network's."""
    rows: tuple[ConfirmRow, ...]
    """Results of the confirmation runs; empty for a search trial."""
    best_single: float | None = None
    """For an ensemble: the best score of any single confirmation run."""
    beats_best_single: bool | None = None
    """For an ensemble: True if its score beats `best_single`."""


def select_model(study: Study, champions: Sequence[Champion]) -> Selection:
    """Select the model that `--export` asks for.

    Args:
        study: The study whose run directory holds the runs.
        champions: Candidates if there are no confirmation runs.

    Raises:
        UserError: There is no such run, or its weights cannot be read.
    """
    what, rows = study.config.export, study.rundir.read_confirm()
    if what == "ensemble":
        return _select_ensemble(study.rundir, rows, study.config.metric)
    wanted = [row for row in rows if what in ("best", row.setting)]
    if wanted:
        row = best_row(wanted, study.config.metric)
        weights = _weights(study.rundir, row.run_id)
        return Selection((row.run_id,), dict(row.hyperparameters), row.score, (weights,), (row,))
    if rows:
        raise UserError(
            f"--export {what}: no confirmation run of this setting has completed; choose another"
            " setting, or best."
        )
    return _select_champion(study, [c for c in champions if what in ("best", c.arm)])


def _select_champion(study: Study, champions: Sequence[Champion]) -> Selection:
    best: Champion | None = None
    for champion in champions:
        if champion.run_id and (
            best is None or is_better(champion.score, best.score, study.config.metric)
        ):
            best = champion
    if best is None:
        raise UserError(
            f"--export {study.config.export}: there is no completed search trial and no"
            " confirmation run (--seeds 0) to export; extend the study with more --trials or"
            " --seeds."
        )
    run_id = str(best.run_id)
    return Selection(
        (run_id,), dict(best.hyperparameters), best.score, (_weights(study.rundir, run_id),), ()
    )


def _select_ensemble(rundir: RunDir, rows: Sequence[ConfirmRow], metric: Metric) -> Selection:
    """Select the recipe and setting whose runs form the best ensemble on val."""
    cells: dict[tuple[str, str], list[ConfirmRow]] = {}
    for row in rows:
        cells.setdefault((row.recipe, row.setting), []).append(row)
    best: list[ConfirmRow] = []
    best_score = 0.0
    for cell in cells.values():
        score = _score_together(rundir, cell, metric)
        if not best or is_better(score, best_score, metric):
            best, best_score = cell, score
    best_single = best_row(rows, metric).score
    return Selection(
        tuple(row.run_id for row in best),
        dict(best[0].hyperparameters),
        best_score,
        tuple(_weights(rundir, row.run_id) for row in best),
        tuple(best),
        best_single,
        is_better(best_score, best_single, metric),
    )


def _score_together(rundir: RunDir, rows: Sequence[ConfirmRow], metric: Metric) -> float:
    """Return the metric of the runs' mean probabilities on val, from their stored predictions."""
    stored = []
    for row in rows:
        file = rundir.predictions(row.run_id)
        rundir.fetch(file)
        try:
            stored.append(read_predictions(file, "val"))
        except RunDirError as error:
            raise UserError(f"{error}; recreate it with --resume.") from error
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
            f"{file}: the weights of the run to export cannot be read ({error}); restore the file."
        ) from error
