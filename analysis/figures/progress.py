"""How the search went on: the best score so far, by trials ended and by time."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.figures.lines import dashes_of, name_ends
from analysis.figures.quantities import UNITS, describe_measured, quantity_of, scale_of
from analysis.figures.style import STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.rundir.metric import mode


@dataclass(frozen=True)
class ArmProgress:
    """The search in one arm, trial by trial in the order in which they ended.

    Attributes:
        arm: Its name.
        minutes: [trials], when each ended, since the search began.
        best: [trials], the best score of a completed trial so far; NaN before the first.
    """

    arm: str
    minutes: NDArray[np.float64]
    best: NDArray[np.float64]


@dataclass(frozen=True)
class Progress:
    """The search in every arm.

    Attributes:
        metric: What the scores measure: `val_accuracy` (a fraction) or `val_loss`.
        arms: Those with a completed trial, in the study's order.
        equal_n: The smallest number of trials that any arm has.
    """

    metric: str
    arms: tuple[ArmProgress, ...]
    equal_n: int


def make_progress(frames: StudyFrames) -> Picture | None:
    """By trials ended, as many in each arm; beside it by time."""
    progress = compute_progress(frames)
    if not progress.arms:
        return None
    ink = colours(frames)
    label = UNITS[quantity_of(progress.metric)][0]
    with mpl.rc_context(STYLE):
        figure = new_figure()
        by_trials, by_time = figure.subplots(1, 2, sharey=True)
        draw_by_trials(progress, ink, by_trials)
        draw_by_time(progress, ink, by_time)
        by_trials.set_ylabel(f"best val {label}")
        by_trials.set_title("By trials ended, equally many per arm")
        by_time.set_title("By time")
        # Where names must give way depends on the limits, which the panels share.
        scale, equal_n = scale_of(progress.metric), progress.equal_n
        name_ends({a.arm: scale * a.best[equal_n - 1] for a in progress.arms}, ink, by_trials)
        name_ends({a.arm: scale * a.best[-1] for a in progress.arms}, ink, by_time)
    return Picture(
        "progress",
        "Best score of a completed trial so far, by arm",
        _caption(progress),
        figure,
    )


def compute_progress(frames: StudyFrames) -> Progress:
    """The running best of every arm; trials that did not reach the last epoch count as trials."""
    # A trial that broke in its first epoch has no times: it ended soon after the one before it.
    ends = frames.trials.groupby("arm")["end"].transform(lambda arm: arm.ffill().bfill())
    trials = frames.trials.assign(end=ends).sort_values("end", kind="stable")
    by_arm = {str(arm): rows for arm, rows in trials.groupby("arm", sort=False)}
    order = [str(arm) for arm in frames.trials["arm"].unique()]
    # The row of a trial knows its last attempt only, the rows of its epochs the earlier ones too.
    searched = frames.epochs[frames.epochs["phase"] == "search"]
    began = pd.concat([frames.trials["start"], searched["start"]]).min()
    arms = [
        ArmProgress(
            arm=arm,
            minutes=(by_arm[arm]["end"].to_numpy(float) - began) / 60,
            best=_running_best(by_arm[arm], frames.metric),
        )
        for arm in order
    ]
    return Progress(
        metric=frames.metric,
        arms=tuple(arm for arm in arms if not np.isnan(arm.best).all()),
        equal_n=min((len(arm.best) for arm in arms), default=0),
    )


def _running_best(trials: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    scores = trials["score"].astype(float).where(trials["state"] == "completed")
    best = scores.cummin() if mode(metric) == "min" else scores.cummax()
    return np.asarray(best.ffill(), np.float64)


def draw_by_trials(progress: Progress, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the best score so far against the number of trials ended.

    Args:
        progress: At least one arm.
        ink: The colour of every arm.
        ax: Where to draw.
    """
    numbers = np.arange(1, progress.equal_n + 1)
    for index, arm in enumerate(progress.arms):
        _draw_steps(progress, index, numbers, arm.best[: progress.equal_n], ink[arm.arm], ax)
    ax.set_xlabel("trials ended")
    ax.set_xlim(0, progress.equal_n)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_by_time(progress: Progress, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the best score so far against the time since the search began; arguments as above."""
    for index, arm in enumerate(progress.arms):
        _draw_steps(progress, index, arm.minutes, arm.best, ink[arm.arm], ax)
    ax.set_xlabel("minutes since the search began")
    ax.set_xlim(0, max(arm.minutes[-1] for arm in progress.arms))


def _draw_steps(
    progress: Progress,
    index: int,
    places: NDArray[np.float64] | NDArray[np.int64],
    best: NDArray[np.float64],
    colour: str,
    ax: Axes,
) -> None:
    scale, dashes = scale_of(progress.metric), dashes_of(index, len(progress.arms))
    ax.step(places, scale * best, where="post", color=colour, linestyle=dashes, linewidth=1.8)
    better = np.flatnonzero(np.diff(best, prepend=np.nan) != 0)
    better = better[~np.isnan(best[better])]
    ax.plot(places[better], scale * best[better], "o", color=colour, markersize=4, clip_on=False)


def _caption(progress: Progress) -> str:
    said = []
    for arm in progress.arms:
        best = float(arm.best[-1])
        at = int(np.flatnonzero(arm.best == best)[0])
        said.append(
            f"{arm.arm} reaches {describe_measured(progress.metric, best)} with trial {at + 1} of"
            f" {len(arm.best)}, after {arm.minutes[at]:.1f} of {arm.minutes[-1]:.1f} minutes"
        )
    return f"In the order in which trials ended, {'; '.join(said)}."
