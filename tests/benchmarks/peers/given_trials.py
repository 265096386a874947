"""A study's search with predefined trials."""

from unittest.mock import patch

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from analysis.rundir import EpochRow
from analysis.rundir.optuna_db import open_storage
from search_spaces import Choice, Float
from study.cluster.resources import plan_resources
from study.cluster.session import find_machines, ray_session
from study.inputs import load_inputs
from study.runs.context import RunContext, run_settings
from study.screen import Screen
from study.search import scheduler
from study.search.searcher import open_study
from study.search.tune import run_search
from study.study import Study
from tests.benchmarks.peers.work import Trial, Work


def search_given(study: Study, work: Work) -> list[EpochRow]:
    """Run the trials; return their epochs.

    They are put into optuna.db as if an earlier start had begun them, so the search resumes them,
    and there are no others: the time to draw them, milliseconds each, is not included. ASHA decides
    only at the last epoch, so it stops none.
    """
    for trial in work.trials:
        _put_in(study, trial)
    with patch.object(scheduler, "GRACE_PERIOD", work.epochs), ray_session(study.config.address):
        _, prepared = load_inputs(study, {}, None)
        resources = plan_resources(study.config, find_machines(study.config.address))
        settings = run_settings(study, resources)
        run_search(study, RunContext(ray.put(prepared.training), settings, resources, Screen()))
    return study.rundir.read_epochs()


def _put_in(study: Study, trial: Trial) -> None:
    """Add a trial to the arm's Optuna study in the state running."""
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
