"""Context shared by search and confirmation runs."""

from dataclasses import dataclass, replace

import ray

from analysis.rundir import RunDir
from study.cluster.resources import Resources
from study.runs.worker import RunSettings
from study.screen import Screen
from study.study import Study
from study.training.data import TrainingArrays


@dataclass(frozen=True)
class RunContext:
    """Data, settings and resources of every run, and the screen that shows them."""

    training: "ray.ObjectRef[TrainingArrays]"
    """The data without `test`, in Ray's object store."""
    settings: RunSettings
    resources: Resources
    """Resources of one run, and how many run at once."""
    screen: Screen

    def with_resources(self, resources: Resources) -> "RunContext":
        """Return this context with other resources."""
        settings = replace(self.settings, gpu_share=resources.gpus)
        return replace(self, resources=resources, settings=settings)

    def one_at_a_time(self) -> "RunContext":
        """Return this context for one run at a time, with a whole GPU instead of a share."""
        return self.with_resources(self.resources.one_at_a_time())


def run_settings(study: Study, resources: Resources) -> RunSettings:
    """Return the settings that a worker process needs."""
    config = study.config
    return RunSettings(
        epochs=config.epochs,
        metric=config.metric,
        threads=max(1, int(config.cpus_per_trial)),
        rundir=RunDir(study.rundir.path.absolute()),
        remote=study.remote,
        gpu_share=resources.gpus,
        timeout=None if config.trial_timeout is None else 60 * config.trial_timeout,
    )
