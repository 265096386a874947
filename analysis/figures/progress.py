"""Search progress: the best score so far, by finished trials and by time."""

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
    """The search in one arm, trial by trial in the order in which they finished.

    Attributes:
        arm: Its name.
        minutes: [trials], end of each trial, since the search began.
        best: [trials], the best score of a completed trial so far; NaN before the first.
    """

    arm: str
    minutes: NDArray[np.float64]
    best: NDArray[np.float64]


@dataclass(frozen=True)
class Progress:
    """The search in every arm.

    Attributes:
        metric: The study's metric: `val_accuracy` (a fraction) or `val_loss`.
        arms: Those with a completed trial, in the study's order.
        equal_n: The smallest number of trials in any arm.
    """

    metric: str
    arms: tuple[ArmProgress, ...]
    equal_n: int


def make_progress(frames: StudyFrames) -> Picture | None:
    """Make the figure: by finished trials, equally many per arm, and by time."""
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
        by_trials.set_title("By finished trials, equally many per arm")
        by_time.set_title("By time")
        # The panels share their limits, and the placement of the names depends on them.
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
    """Return the running best of every arm; trials cut short count as trials but do not score."""
    # A trial that failed in its first epoch has no times: it ended soon after the previous one.
    ends = frames.trials.groupby("arm")["end"].transform(lambda arm: arm.ffill().bfill())
    trials = frames.trials.assign(end=ends).sort_values("end", kind="stable")
    by_arm = {str(arm): rows for arm, rows in trials.groupby("arm", sort=False)}
    order = [str(arm) for arm in frames.trials["arm"].unique()]
    # The row of a trial covers its last attempt only; its epochs also cover the earlier ones.
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
    """Draw the best score so far against the number of finished trials.

    Args:
        progress: At least one arm.
        ink: The colour of every arm.
        ax: The axes to draw on.
    """
    numbers = np.arange(1, progress.equal_n + 1)
    for index, arm in enumerate(progress.arms):
        _draw_steps(progress, index, numbers, arm.best[: progress.equal_n], ink[arm.arm], ax)
    ax.set_xlabel("finished trials")
    ax.set_xlim(0, progress.equal_n)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_by_time(progress: Progress, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw the best score so far against the time since the search began, as `draw_by_trials`."""
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
    parts = []
    for arm in progress.arms:
        best = float(arm.best[-1])
        at = int(np.flatnonzero(arm.best == best)[0])
        parts.append(
            f"{arm.arm} reaches {describe_measured(progress.metric, best)} at trial {at + 1} of"
            f" {len(arm.best)}, after {arm.minutes[at]:.1f} of {arm.minutes[-1]:.1f} minutes"
        )
    return f"In the order in which trials finished, {'; '.join(parts)}."
