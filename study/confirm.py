"""The confirmation phase: the champions' recipes crossed with the champions' factor settings.

Two searches find two recipes, and the luck of a search is as large as dropout's effect. So each
recipe is trained anew with each setting of the factor, over seeds that the search has not used;
runs of one recipe and one seed are matched pairs that differ in the factor alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import ray
from ray.exceptions import RayError
from safetensors.torch import save

from analysis.rundir import ConfirmRow, EpochRow, write_whole
from search_spaces import Fixed, Space, Value
from study.arrays import PartArrays, TrainingArrays
from study.champions import Champion
from study.config import Study
from study.errors import UserError
from study.packing import Resources
from study.screen import EndedRun, Screen
from study.streams import derive_seed
from study.training import NonFiniteLossError, is_better
from study.worker import Confirmation, RunSettings, run_confirmation


@dataclass(frozen=True)
class Cell:
    """A recipe with a setting of the factor."""

    recipe: str
    """The arm whose champion the recipe comes from."""
    setting: str
    """The arm whose champion's factor value it has, or a setting of the space's own."""
    hyperparameters: dict[str, Value]

    @property
    def name(self) -> str:
        """How the cell is called on the screen."""
        return f"recipe {self.recipe} · {self.setting}"


@dataclass(frozen=True)
class PlannedRun:
    """A confirmation run to do."""

    cell: Cell
    index: int
    """Of the seed, from 0."""
    seed: int

    @property
    def run_id(self) -> str:
        """The run's name wherever it appears."""
        return f"{self.cell.recipe}-recipe-{self.cell.setting}-{self.index}"


def cells(space: Space, champions: Sequence[Champion]) -> tuple[Cell, ...]:
    """Every recipe with every setting of the factor; equal cells once, under the first's name."""
    factor = space.factor_names
    settings = {
        setting.name: {name: _value(setting.factor[name]) for name in factor}
        for setting in space.settings
    } or {
        champion.arm: {name: champion.hyperparameters[name] for name in factor}
        for champion in champions
    }
    crossed = [
        Cell(champion.arm, name, {**champion.hyperparameters, **values})
        for champion in champions
        for name, values in settings.items()
    ]
    first: dict[tuple[tuple[str, Value], ...], Cell] = {}
    for cell in crossed:
        first.setdefault(tuple(sorted(cell.hyperparameters.items())), cell)
    return tuple(first.values())


def planned_runs(crossed: Sequence[Cell], seed: int, seeds: int) -> list[PlannedRun]:
    """Every cell under every seed, seed by seed, so that matched pairs end together."""
    return [
        PlannedRun(cell, index, derive_seed(seed, "confirm", index))
        for index in range(seeds)
        for cell in crossed
    ]


def confirm(
    study: Study,
    champions: Sequence[Champion],
    training: "ray.ObjectRef[TrainingArrays]",
    test: "ray.ObjectRef[PartArrays]",
    settings: RunSettings,
    resources: Resources,
    screen: Screen,
) -> None:
    """Train the confirmation runs that are missing, then write confirm.csv.

    A run that fails is said and left out; the others go on.

    Args:
        study: Its run directory holds what earlier starts left.
        champions: The arms' champions.
        training: The data without `test`, in Ray's object store.
        test: The test part; this is the only phase that reads it.
        settings: What all runs have in common.
        resources: Of one run, and how many run at once.
        screen: Shows the progress.

    Raises:
        UserError: No run succeeded.
    """
    if study.rundir.confirm.exists():
        return
    config = study.config
    crossed = cells(study.space, champions)
    planned = planned_runs(crossed, config.seed, config.seeds)
    done = {row.run_id: row for row in study.rundir.read_confirmations()}
    task = ray.remote(run_confirmation).options(num_cpus=resources.cpus, num_gpus=resources.gpus)

    groups = {cell.name: config.seeds for cell in crossed}
    with screen.phase("Confirmation", config.metric, config.epochs, groups) as view:
        for run in planned:
            if run.run_id in done:
                view.count(_ended(run, done[run.run_id]))
        view.already = view.ended
        waiting = [run for run in planned if run.run_id not in done]
        running: dict[ray.ObjectRef[Confirmation], PlannedRun] = {}
        while waiting or running:
            while waiting and len(running) < resources.at_once:
                run = waiting.pop(0)
                # In a list Ray hands on the references, not what they refer to.
                reference = task.remote(
                    run.cell.hyperparameters, run.seed, [training, test], settings
                )
                running[reference] = run
                screen.run_goes_on(run.run_id, 0, None)
            (reference,), _ = ray.wait(list(running), num_returns=1)
            run = running.pop(reference)
            try:
                confirmation = ray.get(reference)
            except (NonFiniteLossError, RayError) as error:
                screen.run_ended(_failed(run, error))
                continue
            row = _keep(study, run, confirmation, list(done.values()))
            done[run.run_id] = row
            screen.run_ended(_ended(run, row))

    if not done:
        raise UserError("every confirmation run failed; the reasons stand above and in log.txt.")
    study.rundir.write_confirm([done[run.run_id] for run in planned if run.run_id in done])


def _keep(
    study: Study, run: PlannedRun, confirmation: Confirmation, earlier: Sequence[ConfirmRow]
) -> ConfirmRow:
    """Write down a run; its weights too if it is the best by the score so far."""
    rundir, metric = study.rundir, study.config.metric
    row = _row(run, confirmation)
    if all(is_better(row.score, other.score, metric) for other in earlier):
        content = save(confirmation.best.weights, metadata={"run_id": run.run_id})
        write_whole(rundir.best_head, content)
    rundir.append_epochs(
        EpochRow(
            phase="confirm",
            run_id=run.run_id,
            attempt=1,
            arm=run.cell.setting,
            seed=run.seed,
            epoch=epoch.epoch,
            train_loss=epoch.train_loss,
            train_accuracy=epoch.train_accuracy,
            val_loss=epoch.val_loss,
            val_accuracy=epoch.val_accuracy,
            score=epoch.score,
            rung="",
            start=epoch.start,
            end=epoch.end,
            worker=confirmation.worker,
        )
        for epoch in confirmation.epochs
    )
    rundir.write_confirmation(
        run.run_id,
        row,
        val_logits=confirmation.val_logits,
        test_logits=confirmation.test_logits,
        val_labels=confirmation.val_labels,
        test_labels=confirmation.test_labels,
    )
    return row


def _row(run: PlannedRun, confirmation: Confirmation) -> ConfirmRow:
    last = {f"last_{name}": value for name, value in asdict(confirmation.last).items()}
    return ConfirmRow(
        run_id=run.run_id,
        recipe=run.cell.recipe,
        setting=run.cell.setting,
        hyperparameters=run.cell.hyperparameters,
        seed=run.seed,
        best_epoch=confirmation.best.epoch,
        score=confirmation.epochs[-1].score,
        **asdict(confirmation.selected),
        **last,
        epochs=len(confirmation.epochs),
        seconds=confirmation.seconds,
    )


def _ended(run: PlannedRun, row: ConfirmRow) -> EndedRun:
    return EndedRun(
        run.run_id,
        run.cell.name,
        "completed",
        row.epochs,
        row.score,
        row.hyperparameters,
        row.seconds,
    )


def _failed(run: PlannedRun, error: Exception) -> EndedRun:
    cause = str(error).strip().splitlines()[-1]
    return EndedRun(
        run.run_id, run.cell.name, "failed", 0, None, run.cell.hyperparameters, 0.0, cause
    )


def _value(values: object) -> Value:
    assert isinstance(values, Fixed)
    return values.value
