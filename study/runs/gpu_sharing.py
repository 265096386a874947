"""Resources of each run; runs per GPU are measured on one GPU of each type."""

from dataclasses import replace

import ray
from ray.exceptions import RayTaskError

from analysis.words import count
from study.cluster.machines import Machines
from study.cluster.remote import on_node
from study.cluster.resources import Resources, is_measured, plan_resources
from study.errors import UserError
from study.runs.context import run_settings
from study.runs.failures import failure_of
from study.runs.gpu_load import Load, fits_on_gpu, largest_run, runs_per_gpu
from study.runs.worker import run_load_measurement
from study.screen import Screen
from study.study import Study
from study.training.data import TrainingArrays


def choose_resources(
    study: Study,
    machines: Machines,
    training: "ray.ObjectRef[TrainingArrays]",
    screen: Screen,
) -> Resources:
    """Choose the resources of each run; with --gpus-per-trial auto, measure the runs per GPU."""
    if not is_measured(study.config, machines):
        return plan_resources(study.config, machines)
    loads = measure_loads(study, machines, training)
    packed = {}
    for gpu_type, load in loads.items():
        if load is not None:
            same_type = machines.with_gpus({gpu_type})
            most_by_cpu = same_type.cpus / study.config.cpus_per_trial / same_type.gpus
            packed[gpu_type] = runs_per_gpu(load, most_by_cpu)
    for gpu_type, load in loads.items():
        screen.print(
            f"{gpu_type or 'GPU'}: the largest run does not fit; not used."
            if load is None
            else describe_load(load, packed[gpu_type])
        )
    if not packed:
        raise UserError(
            "the largest run of the space does not fit on any GPU; use a space with smaller batches"
            " or heads, or a smaller --image-size."
        )
    chosen = plan_resources(study.config, machines.with_gpus(packed), min(packed.values()))
    return chosen if len(packed) == len(loads) else replace(chosen, gpu_types=tuple(packed))


def measure_loads(
    study: Study, machines: Machines, training: "ray.ObjectRef[TrainingArrays]"
) -> dict[str, Load | None]:
    """Measure the load of the largest run on each GPU type; None if it does not fit."""
    settings = run_settings(study, Resources(1, 1.0, 1))
    one_of_each = {node.gpu_type: node for node in machines.nodes if node.gpus}
    pending = {}
    for gpu_type, node in one_of_each.items():
        # One call per process, so that the GPU's memory is free again for the search.
        task = ray.remote(max_calls=1)(run_load_measurement).options(
            num_cpus=1, num_gpus=1, scheduling_strategy=on_node(node)
        )
        pending[gpu_type] = task.remote(largest_run(study.space), [training], settings)
    loads: dict[str, Load | None] = {}
    for gpu_type, answer in pending.items():
        try:
            load = ray.get(answer)
            loads[gpu_type] = load if fits_on_gpu(load) else None
        except RayTaskError as error:
            if failure_of(error).kind != "memory":
                raise
            loads[gpu_type] = None
    return loads


def describe_load(load: Load, runs: int) -> str:
    """Describe the measured load and the resulting runs per GPU, in a sentence."""
    return (
        f"{load.device}: the largest run takes {load.peak / 2**30:.1f} of"
        f" {load.memory / 2**30:.0f} GiB and {1000 * load.step_seconds:.1f} ms a step"
        f" ({load.images_per_second:,.0f} images/s), and keeps the GPU {100 * load.busy:.0f} %"
        f" busy: {count(runs, 'run')} at once per GPU."
    )
