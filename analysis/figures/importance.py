"""Hyperparameter importance in each arm, by Optuna's PED-ANOVA."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib.axes import Axes
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from analysis.figures.style import MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.rundir.optuna_db import load_searches

#: Arms with fewer completed trials are omitted.
FEWEST_FOR_IMPORTANCE = 5

#: PED-ANOVA compares the best trials with all: a tenth of them, but at least as many as Optuna's
#: documentation asks for, and at most half.
TOP_SHARE, FEWEST_TOP, MOST_TOP_SHARE = 0.1, 5, 0.5


@dataclass(frozen=True)
class ArmImportance:
    """The importance of the hyperparameters in one arm.

    Attributes:
        arm: Its name.
        completed: Number of completed trials.
        top: Number of best trials that are compared with all completed ones.
        shares: By searched hyperparameter; they add up to 1.
    """

    arm: str
    completed: int
    top: int
    shares: Mapping[str, float]


def make_importance(frames: StudyFrames) -> Picture | None:
    """Make the figure: a group of bars per hyperparameter, a bar per arm."""
    arms = compute_importance(frames)
    if not arms:
        return None
    names = _names(arms)
    with mpl.rc_context(STYLE):
        figure = new_figure(1.3 + 0.25 * len(names) * (len(arms) + 0.5))
        draw_importance(arms, colours(frames), figure.subplots())
    return Picture(
        "importance",
        "Hyperparameter importance by arm (PED-ANOVA)",
        _caption(arms),
        figure,
    )


def compute_importance(frames: StudyFrames) -> tuple[ArmImportance, ...]:
    """Return the importances of every arm with enough completed trials, in the study's order."""
    searches = load_searches(frames.path)
    arms = [str(arm) for arm in frames.trials["arm"].unique()]
    found = [_importance(arm, searches[arm]) for arm in arms if arm in searches]
    return tuple(arm for arm in found if arm is not None)


def _importance(arm: str, study: optuna.Study) -> ArmImportance | None:
    """Return None with too few trials, or if the best trials do not stand out."""
    completed = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    if completed < FEWEST_FOR_IMPORTANCE:
        return None
    share = max(TOP_SHARE, min(MOST_TOP_SHARE, FEWEST_TOP / completed))
    with warnings.catch_warnings():
        # Optuna warns if all trials are equally good; the sum below covers that case.
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
        raw = get_param_importances(study, evaluator=evaluator, normalize=False)
    total = sum(raw.values())
    if not total > 0:
        return None
    shares = {name: value / total for name, value in raw.items()}
    return ArmImportance(arm, completed, math.ceil(share * completed), shares)


def _names(arms: tuple[ArmImportance, ...]) -> list[str]:
    """Return the hyperparameters by decreasing importance, averaged over the arms with them."""
    names = dict.fromkeys(name for arm in arms for name in arm.shares)
    return sorted(
        names, key=lambda name: -fmean(arm.shares[name] for arm in arms if name in arm.shares)
    )


def draw_importance(arms: tuple[ArmImportance, ...], ink: Mapping[str, str], ax: Axes) -> None:
    """Draw a bar per arm and hyperparameter, labelled with its share.

    Args:
        arms: At least one.
        ink: The colour of every arm.
        ax: The axes to draw on.
    """
    names, height = _names(arms), 0.8 / len(arms)
    for index, arm in enumerate(arms):
        rows = np.arange(len(names)) + (index - (len(arms) - 1) / 2) * height
        shares = [100 * arm.shares.get(name, 0) for name in names]
        label = f"{arm.arm} ({arm.completed} completed trials)"
        ax.barh(rows, shares, 0.92 * height, color=ink[arm.arm], label=label)
        for row, name, share in zip(rows, names, shares, strict=True):
            ax.annotate(
                f"{share:.0f} %" if name in arm.shares else "not searched",
                (share, row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=ink[arm.arm] if name in arm.shares else MUTED,
            )
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x")
    ax.margins(x=0.1)
    ax.set_xlabel("share of total importance (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(arms), 2), borderaxespad=0)


def _caption(arms: tuple[ArmImportance, ...]) -> str:
    parts = []
    for arm in arms:
        first = max(arm.shares, key=lambda name: arm.shares[name])
        parts.append(
            f"{first} in {arm.arm} ({100 * arm.shares[first]:.0f} %, best {arm.top} against all"
            f" {arm.completed} completed trials)"
        )
    return (
        f"The most important hyperparameter is {' and '.join(parts)}; with few trials this is only"
        " a hint, and trials stopped by ASHA do not count."
    )
