"""What each run gets of the machines, and how many run at once.

Known before anything slow is imported: Ray starts on it, while PyTorch is still on its way.
"""

import math
from dataclasses import dataclass, replace

from study.cluster.machines import GPU_TYPE_LABEL, Machines
from study.config import ResourceOptions
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


def plan_resources(
    options: ResourceOptions, machines: Machines, runs_per_gpu: int | None = None
) -> Resources:
    """What each run gets of the machines, and how many run at once.

    Args:
        options: What the user asks for.
        machines: Where runs may run.
        runs_per_gpu: As measured, where the user leaves it open; None: one.

    Raises:
        UserError: Not even one run fits, and nothing says that machines will join.
    """
    gpus = options.gpus_per_trial
    if gpus == "auto":
        gpus = 1 / (runs_per_gpu or 1) if machines.gpus else 0.0
    fit = machines.room(options.cpus_per_trial, gpus)
    if machines.is_cluster and options.max_concurrent is not None:
        # Runs that wait are what makes a cluster grow.
        return Resources(options.cpus_per_trial, gpus, options.max_concurrent)
    if not fit:
        raise UserError(_no_room(machines, options.cpus_per_trial, gpus))
    at_once = fit if options.max_concurrent is None else min(fit, options.max_concurrent)
    return Resources(options.cpus_per_trial, gpus, at_once)


def plan_cores(options: ResourceOptions, machines: Machines) -> int:
    """Of how many cores of this machine a study can make use.

    Args:
        options: Say how many runs may go on at once.
        machines: This machine alone.

    Raises:
        UserError: Not even one run fits.
    """
    at_once = options.max_concurrent
    if not is_measured(options, machines):
        at_once = plan_resources(options, machines).at_once
    cores = int(machines.cpus)
    return cores if at_once is None else min(cores, math.ceil(at_once * options.cpus_per_trial))


def is_measured(options: ResourceOptions, machines: Machines) -> bool:
    """Whether it is measured before the search how many runs share a GPU."""
    return options.gpus_per_trial == "auto" and machines.gpus > 0


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
