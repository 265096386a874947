"""Early stopping: how many trials of each arm reached each rung, and were promoted from it."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.words import count

#: Opacity of the bar of trials that reached a rung, behind the bar of promoted ones.
REACHED_ALPHA = 0.3


@dataclass(frozen=True)
class ArmRungs:
    """The trials of one arm at every rung.

    Attributes:
        arm: Its name.
        trials: Number of trials.
        reached: Per rung, number of trials that ASHA decided on.
        survived: Per rung, number of trials that ASHA promoted.
        completed: Number of trials that reached the last epoch.
    """

    arm: str
    trials: int
    reached: tuple[int, ...]
    survived: tuple[int, ...]
    completed: int


@dataclass(frozen=True)
class Rungs:
    """The trials of a study at every rung.

    Attributes:
        epochs: The epochs after which ASHA decided.
        arms: In the study's order.
    """

    epochs: tuple[int, ...]
    arms: tuple[ArmRungs, ...]


def make_rungs(frames: StudyFrames) -> Picture | None:
    """Make the figure: a group of bars per rung and one for the last epoch, a bar per arm."""
    rungs = compute_rungs(frames)
    if not rungs.epochs or not rungs.arms:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure()
        draw_rungs(rungs, colours(frames), figure.subplots())
    return Picture(
        "rungs",
        "Trials that reached each ASHA rung, and those promoted from it",
        _caption(rungs),
        figure,
    )


def compute_rungs(frames: StudyFrames) -> Rungs:
    """Count ASHA's decisions by arm and rung; empty before the search has ended."""
    decided = frames.epochs[frames.epochs["rung"].isin(["continue", "stop"])]
    epochs = sorted(decided["epoch"].unique())
    arms = []
    for arm, trials in frames.trials.groupby("arm", sort=False):
        of_arm = decided[decided["arm"] == arm]
        at = [of_arm.loc[of_arm["epoch"] == epoch, "rung"] for epoch in epochs]
        arms.append(
            ArmRungs(
                arm=str(arm),
                trials=len(trials),
                reached=tuple(len(rung) for rung in at),
                survived=tuple(int((rung == "continue").sum()) for rung in at),
                completed=int((trials["state"] == "completed").sum()),
            )
        )
    return Rungs(tuple(map(int, epochs)), tuple(arms))


def draw_rungs(rungs: Rungs, ink: Mapping[str, str], ax: Axes) -> None:
    """Draw solid bars of promoted trials in front of light bars of all that reached the rung.

    Args:
        rungs: At least one rung and one arm.
        ink: The colour of every arm.
        ax: The axes to draw on.
    """
    places, width = np.arange(len(rungs.epochs) + 1), 0.8 / len(rungs.arms)
    for index, arm in enumerate(rungs.arms):
        colour = ink[arm.arm]
        middles = places + (index - (len(rungs.arms) - 1) / 2) * width
        reached, promoted = (*arm.reached, arm.completed), (*arm.survived, arm.completed)
        ax.bar(middles, reached, 0.92 * width, color=colour, alpha=REACHED_ALPHA)
        ax.bar(middles, promoted, 0.92 * width, color=colour)
        texts = [
            *(f"{n} of {among}" for n, among in zip(arm.survived, arm.reached, strict=True)),
            str(arm.completed),
        ]
        for middle, height, text in zip(middles, reached, texts, strict=True):
            ax.annotate(
                text if len(rungs.arms) <= 3 else text.replace(" of ", "/"),
                (middle, height),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
            )
    ax.set_xticks(places, [*(f"rung after epoch {e}" for e in rungs.epochs), "last epoch"])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("trials")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    # The counts at the bars are easier to read without grid lines behind them.
    ax.grid(visible=False)
    ax.margins(y=0.1)
    keys = [Patch(color=ink[arm.arm], label=arm.arm) for arm in rungs.arms]
    light = Patch(color=MUTED, alpha=REACHED_ALPHA, label="stopped at the rung")
    ax.legend(
        handles=[*keys, light],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(keys) + 1,
        borderaxespad=0,
    )


def _caption(rungs: Rungs) -> str:
    parts = []
    for arm in rungs.arms:
        promoted = [
            f"{survived} at epoch {epoch}"
            for survived, epoch in zip(arm.survived, rungs.epochs, strict=True)
        ]
        parts.append(
            f"{arm.arm} {' and '.join(promoted)}, of {count(arm.trials, 'trial')}"
            f" ({arm.completed} reached the last epoch)"
        )
    return f"Promoted by ASHA: {'; '.join(parts)}."
