"""What each run gets of the machines, and how many run at once.

Known before anything slow is imported: Ray starts on it, while PyTorch is still on its way.
"""

import math
from dataclasses import dataclass, replace

from study.cluster import GPU_TYPE_LABEL, Machines
from study.config import Study
from study.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What one run gets, and how many run at once."""

    cpus: float
    gpus: float
    """A fraction where runs share a GPU."""
    at_once: int
    gpu_types: tuple[str, ...] = ()
    """The types of GPU on which a run fits, as Ray names them; empty where it fits on all."""

    @property
    def alone(self) -> bool:
        """Whether runs go one by one, each with a whole GPU or none."""
        return self.at_once == 1 and self.gpus in (0, 1)

    def one_at_a_time(self) -> "Resources":
        """The same for runs one after the other, each with a whole GPU where it had a share."""
        return replace(self, gpus=float(self.gpus > 0), at_once=1)

    @property
    def label_selector(self) -> dict[str, str]:
        """The nodes that a run may go to, as Ray takes it."""
        return {GPU_TYPE_LABEL: f"in({','.join(self.gpu_types)})"} if self.gpu_types else {}


def plan_resources(study: Study, machines: Machines, runs_per_gpu: int | None = None) -> Resources:
    """What each run gets of the machines, and how many run at once.

    Args:
        study: Says what the user asks for.
        machines: Where runs may run.
        runs_per_gpu: As measured, where the user leaves it open; None: one.

    Raises:
        UserError: Not even one run fits, and nothing says that machines will join.
    """
    config = study.config
    gpus = config.gpus_per_trial
    if gpus == "auto":
        gpus = 1 / (runs_per_gpu or 1) if machines.gpus else 0.0
    fit = machines.room(config.cpus_per_trial, gpus)
    if machines.is_cluster and config.max_concurrent is not None:
        # Runs that wait are what makes a cluster grow.
        return Resources(config.cpus_per_trial, gpus, config.max_concurrent)
    if not fit:
        raise UserError(_no_room(machines, config.cpus_per_trial, gpus))
    at_once = fit if config.max_concurrent is None else min(fit, config.max_concurrent)
    return Resources(config.cpus_per_trial, gpus, at_once)


def plan_cores(study: Study, machines: Machines) -> int:
    """Of how many cores of this machine a study can make use.

    Args:
        study: Says how many runs may go on at once.
        machines: This machine alone.

    Raises:
        UserError: Not even one run fits.
    """
    at_once = study.config.max_concurrent
    if not is_measured(study, machines):
        at_once = plan_resources(study, machines).at_once
    cores = int(machines.cpus)
    return (
        cores if at_once is None else min(cores, math.ceil(at_once * study.config.cpus_per_trial))
    )


def is_measured(study: Study, machines: Machines) -> bool:
    """Whether it is measured before the search how many runs share a GPU."""
    return study.config.gpus_per_trial == "auto" and machines.gpus > 0


def _no_room(machines: Machines, cpus: float, gpus: float) -> str:
    """Why not even one run fits, and what to do."""
    if machines.is_cluster:
        wanted = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        return (
            f"no node of the cluster has {wanted} for a run ({machines}); give less with"
            " --cpus-per-trial or --gpus-per-trial, or, where nodes join on demand, say with"
            " --max-concurrent for how many runs to ask."
        )
    cores, gpu_count = machines.cpus, machines.gpus
    if cpus > cores:
        option, have = f"--cpus-per-trial {cpus:g}", f"{cores:g} CPU cores; give {cores:g}"
    else:
        option, have = f"--gpus-per-trial {gpus:g}", f"{gpu_count} GPUs; give {gpu_count}"
    return f"{option}: this machine has {have} or less."
