"""Resources of each run, and how many run at once.

Imports nothing slow: Ray starts with these numbers while PyTorch is still being imported.
"""

import math
from dataclasses import dataclass, replace

from study.cluster.machines import GPU_TYPE_LABEL, Machines
from study.config import ResourceOptions
from study.errors import UserError


@dataclass(frozen=True)
class Resources:
    """Resources of one run, and how many run at once."""

    cpus: float
    gpus: float
    """A fraction if runs share a GPU."""
    at_once: int
    gpu_types: tuple[str, ...] = ()
    """GPU types that a run fits on, by Ray's names; empty if it fits on all."""

    @property
    def exclusive(self) -> bool:
        """True if runs go one at a time, each with a whole GPU or none."""
        return self.at_once == 1 and self.gpus in (0, 1)

    def one_at_a_time(self) -> "Resources":
        """Return these resources for one run at a time, with a whole GPU instead of a share."""
        return replace(self, gpus=float(self.gpus > 0), at_once=1)

    @property
    def label_selector(self) -> dict[str, str]:
        """Ray's label selector for the nodes a run may use."""
        return {GPU_TYPE_LABEL: f"in({','.join(self.gpu_types)})"} if self.gpu_types else {}


def plan_resources(
    options: ResourceOptions, machines: Machines, runs_per_gpu: int | None = None
) -> Resources:
    """Plan the resources of each run and how many run at once.

    Args:
        options: The user's options.
        machines: Machines to run on.
        runs_per_gpu: As measured, used with --gpus-per-trial auto; None: one.

    Raises:
        UserError: Not even one run fits, and no machines are expected to join.
    """
    gpus = options.gpus_per_trial
    if gpus == "auto":
        gpus = 1 / (runs_per_gpu or 1) if machines.gpus else 0.0
    fit = machines.capacity(options.cpus_per_trial, gpus)
    if machines.is_cluster and options.max_concurrent is not None:
        # Pending runs are what makes a cluster scale up.
        return Resources(options.cpus_per_trial, gpus, options.max_concurrent)
    if not fit:
        raise UserError(_explain_no_fit(machines, options.cpus_per_trial, gpus))
    at_once = fit if options.max_concurrent is None else min(fit, options.max_concurrent)
    return Resources(options.cpus_per_trial, gpus, at_once)


def plan_cores(options: ResourceOptions, machines: Machines) -> int:
    """Return how many cores of this machine a study can use.

    Args:
        options: The user's options; they bound the number of concurrent runs.
        machines: Only this machine.

    Raises:
        UserError: Not even one run fits.
    """
    at_once = options.max_concurrent
    if not is_measured(options, machines):
        at_once = plan_resources(options, machines).at_once
    cores = int(machines.cpus)
    return cores if at_once is None else min(cores, math.ceil(at_once * options.cpus_per_trial))


def is_measured(options: ResourceOptions, machines: Machines) -> bool:
    """Return whether the number of runs per GPU is measured before the search."""
    return options.gpus_per_trial == "auto" and machines.gpus > 0


def _explain_no_fit(machines: Machines, cpus: float, gpus: float) -> str:
    """Explain why not even one run fits, and what to do."""
    if machines.is_cluster:
        wanted = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        return (
            f"no node of the cluster has {wanted} for a run ({machines}); reduce"
            " --cpus-per-trial or --gpus-per-trial, or, if the cluster autoscales, set the number"
            " of runs to request with --max-concurrent."
        )
    if cpus > machines.cpus:
        return (
            f"--cpus-per-trial {cpus:g}: this machine has {machines.cpus:g} CPU cores; give"
            f" {machines.cpus:g} or less."
        )
    return f"--gpus-per-trial {gpus:g}: this machine has no GPU; give 0 or auto."
