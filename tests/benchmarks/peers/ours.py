"""This project's search with predefined trials.

Covers what a study does before and in its search: Ray, which starts while PyTorch is imported;
images, weights and features from the cache; `study.search.tune.run_search`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from search_spaces import Arm, Choice, Float, Space
from study.cluster.resources import plan_cores
from study.cluster.session import find_machines, ray_started_early
from study.config import StudyConfig
from study.study import resolve_study
from tests.benchmarks.peers.work import TRIALS, Work, answer, parser

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
        study = resolve_study(study_config(work, folder))
        study.rundir.path.mkdir()
        with ray_started_early(plan_cores(study.config, find_machines(None))):
            from tests.benchmarks.peers.given_trials import search_given

            rows = search_given(study, work)
    by_run: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.run_id, row.epoch)):
        by_run.setdefault(row.run_id, []).append(row.val_accuracy)
    training = max(row.end for row in rows) - min(row.start for row in rows)
    answer(list(by_run.values()), training, ["ray", "optuna", "torch"])


def study_config(work: Work, folder: str | Path) -> StudyConfig:
    """Return the options of the study."""
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


if __name__ == "__main__":
    main()
