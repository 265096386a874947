"""This project's search, given its trials.

What a study does before its search and in it: a Ray session, images, weights and features from the
cache, `study.search.search`. The trials are put into optuna.db as if an earlier start had begun
them, so the search takes them up first, and there are no others: what drawing them would take,
milliseconds each, is left out. ASHA decides at the last epoch only, so it stops none.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from analysis.optuna_db import open_storage
from search_spaces import Arm, Choice, Float, Space
from study import scheduler
from study.config import Study, StudyConfig, check
from study.inputs import load_inputs
from study.phases import run_settings
from study.ray_session import find_machines, ray_session
from study.resources import plan_resources
from study.screen import Screen
from study.search import search
from study.searcher import open_study
from tests.benchmarks.peers.work import TRIALS, Trial, Work, answer, parser

SPACE = Space(
    name="peers",
    question="How long do others take for the same trials?",
    arms=(Arm("any", {"dropout": Float(0.0, 0.6)}),),
    recipe={
        "head": Choice(tuple(sorted({trial.head for trial in TRIALS}))),
        "learning_rate": Float(3e-5, 3e-3, log=True),
        "weight_decay": Float(1e-6, 1e-1, log=True),
        "batch_size": Choice((64, 128, 256)),
    },
)


def main() -> None:
    """Run the trials in a study's search."""
    work: Work = parser().parse_args().work
    with TemporaryDirectory(dir=work.folder) as folder:
        study = check(study_config(work, folder))
        study.rundir.path.mkdir()
        for trial in work.trials:
            put_in(study, trial)
        with (
            patch.object(scheduler, "GRACE_PERIOD", work.epochs),
            ray_session(study.config.address),
        ):
            _, prepared = load_inputs(study, {}, None)
            resources = plan_resources(study, find_machines(study.config.address))
            settings = run_settings(study, resources)
            search(study, ray.put(prepared.training), settings, resources, Screen())
        rows = study.rundir.read_epochs()
    by_run: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.run_id, row.epoch)):
        by_run.setdefault(row.run_id, []).append(row.val_accuracy)
    training = max(row.end for row in rows) - min(row.start for row in rows)
    answer(list(by_run.values()), training, ["ray", "optuna", "torch"])


def study_config(work: Work, folder: str | Path) -> StudyConfig:
    """The study that the trials belong to."""
    return StudyConfig(
        trials=len(work.trials),
        space=f"{__package__}.ours:SPACE",
        images=work.images,
        image_size=work.image_size,
        weights="keras",
        transfer="frozen",
        epochs=work.epochs,
        storage=str(folder),
        name="peers",
    )


def put_in(study: Study, trial: Trial) -> None:
    """Add a trial to the arm's Optuna study, as one that has begun."""
    arm = study.space.arms[0]
    distributions: dict[str, BaseDistribution] = {}
    for name, values in study.space.ranges(arm).items():
        if isinstance(values, Choice):
            distributions[name] = CategoricalDistribution(values.options)
        elif isinstance(values, Float):
            distributions[name] = FloatDistribution(values.low, values.high, log=values.log)
    ot_study = open_study(open_storage(study.rundir.optuna_db), arm.name, study.mode)
    ot_study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={name: getattr(trial, name) for name in distributions},
            distributions=distributions,
        )
    )


if __name__ == "__main__":
    main()
