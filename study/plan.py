"""What a study will do, said before it does it."""

from rich.table import Table

from study.config import Study
from study.errors import UserError
from study.hardware import cpu_count, gpu_count


def concurrency(study: Study) -> int:
    """Runs that this machine runs at once.

    Raises:
        UserError: Not even one fits.
    """
    config = study.config
    for option, wanted, have, kind in (
        ("cpus-per-trial", config.cpus_per_trial, cpu_count(), "CPU cores"),
        ("gpus-per-trial", config.gpus_per_trial, gpu_count(), "GPUs"),
    ):
        if wanted > have:
            raise UserError(
                f"--{option} {wanted:g}: this machine has {have} {kind}; give {have} or less."
            )
    fit = int(cpu_count() / config.cpus_per_trial)
    if config.gpus_per_trial:
        # A run cannot span two GPUs, so runs are counted per GPU.
        fit = min(fit, gpu_count() * int(1 / config.gpus_per_trial))
    return fit if config.max_concurrent is None else min(fit, config.max_concurrent)


def plan_table(study: Study) -> Table:
    """The plan: what is compared, searched and confirmed, with what, and where it goes.

    Raises:
        UserError: This machine cannot run a single trial.
    """
    config, space = study.config, study.space
    at_once = concurrency(study)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("question", space.question)
    for arm in space.arms:
        count = study.trials_per_arm[arm.name]
        work = f"{count} trials" if count else "nothing to search"
        factor = ", ".join(f"{name} {values}" for name, values in arm.factor.items())
        table.add_row(f"arm {arm.name}", f"{work}, {factor}")
    recipe = (
        f"{name} {values}"
        for name, values in space.ranges(space.arms[0]).items()
        if name not in space.factor_names
    )
    table.add_row("recipe", "; ".join(recipe))
    table.add_row(
        "data", f"{config.data}, {config.images or 'all'} images, resized to {config.image_size} px"
    )
    table.add_row(
        "backbone",
        f"ResNet50, weights {config.weights}, preprocess {config.preprocess}, {config.transfer}",
    )
    if any(study.trials_per_arm.values()):
        rungs = ", ".join(map(str, study.rungs)) or "none"
        table.add_row(
            "search",
            f"{config.epochs} epochs; ASHA decides after epochs {rungs}; by {config.metric}",
        )
    table.add_row("confirmation", _confirmation(study))
    gpus = f", {config.gpus_per_trial:g} GPU" if config.gpus_per_trial else ""
    table.add_row(
        "resources",
        f"{config.cpus_per_trial:g} CPU{gpus} per run, {at_once} at once "
        f"({cpu_count()} CPUs, {gpu_count()} GPUs here)",
    )
    if config.time_budget:
        table.add_row(
            "time budget", f"the search starts no trial after {config.time_budget:g} minutes"
        )
    table.add_row("run directory", str(study.rundir.path))
    return table


def _confirmation(study: Study) -> str:
    config, space = study.config, study.space
    if not config.seeds:
        return "none (--seeds 0)"
    settings = len(space.settings or space.arms)
    recipes = len(space.arms) if any(study.trials_per_arm.values()) else 1
    return (
        f"{recipes} recipe{'s' * (recipes > 1)} × {settings} settings × {config.seeds} seeds = "
        f"{recipes * settings * config.seeds} runs of {config.epochs} epochs, no early stopping"
    )
