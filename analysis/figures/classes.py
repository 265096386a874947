"""Test accuracy by class, for every setting of the factor."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from analysis.figures.style import MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.rundir.predictions import Predictions, load_predictions
from analysis.words import signed

#: At most this many classes fit a screen; of more, those where settings differ most are shown.
CLASSES_DRAWN = 25

CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class SettingClasses:
    """The test accuracy of one setting by class, as fractions.

    Attributes:
        setting: Its name.
        n: Number of runs.
        mean: [classes], over runs; NaN for a class without test images.
        sd: [classes], over runs; NaN for a single run.
    """

    setting: str
    n: int
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """The test accuracy of a study's settings by class.

    Attributes:
        names: Class names, by class index.
        settings: In the study's order; those without stored predictions are omitted.
    """

    names: tuple[str, ...]
    settings: tuple[SettingClasses, ...]

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean accuracy: [settings, classes]."""
        return np.stack([setting.mean for setting in self.settings])


def class_names(frames: StudyFrames, classes: int) -> tuple[str, ...]:
    """Return the class names by index; "class N" where they are not recorded.

    Args:
        frames: The study.
        classes: Number of classes.
    """
    data = frames.record.get("data") or {}
    known = data.get("classes") or (CIFAR10 if data.get("name") == "cifar10" else ())
    if not isinstance(known, list | tuple) or len(known) != classes:
        return tuple(f"class {number}" for number in range(classes))
    return tuple(map(str, known))


def make_classes(frames: StudyFrames) -> Picture | None:
    """Make the figure: a row per class, a point per setting."""
    classes = compute_classes(frames)
    if classes is None:
        return None
    shown, ink = choose_classes(classes), colours(frames)
    with mpl.rc_context(STYLE):
        figure = new_figure(1.3 + 0.27 * len(shown))
        draw_classes(classes, shown, ink, figure.subplots())
    return Picture("classes", _title(classes, shown), _caption(classes), figure)


def compute_classes(frames: StudyFrames) -> Classes | None:
    """Return mean and sd over the runs of each setting; None without stored predictions."""
    settings = []
    for setting, runs in frames.confirm.groupby("setting", sort=False):
        loaded = (load_predictions(frames.path, run_id) for run_id in runs["run_id"])
        rows = [class_accuracy(predictions) for predictions in loaded if predictions is not None]
        if rows:
            table = np.stack(rows)
            mean = table.mean(axis=0)
            sd = table.std(axis=0, ddof=1) if len(rows) > 1 else np.full_like(mean, np.nan)
            settings.append(SettingClasses(str(setting), len(rows), mean, sd))
    if not settings:
        return None
    return Classes(class_names(frames, len(settings[0].mean)), tuple(settings))


def class_accuracy(predictions: Predictions) -> NDArray[np.float64]:
    """Return the accuracy per class; NaN for a class without images."""
    labels, classes = predictions.labels, predictions.logits.shape[1]
    right = np.bincount(labels[predictions.guesses == labels], minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(right / np.bincount(labels, minlength=classes), np.float64)


def choose_classes(classes: Classes) -> list[int]:
    """Return the indices of the classes to draw, in order of decreasing accuracy."""
    mean = classes.means.mean(axis=0)
    tested = np.flatnonzero(np.isfinite(mean))
    if len(tested) > CLASSES_DRAWN:
        # A single setting has no differences: show its hardest classes.
        relevance = -mean if len(classes.settings) == 1 else np.ptp(classes.means, axis=0)
        tested = tested[np.argsort(-relevance[tested], kind="stable")[:CLASSES_DRAWN]]
    return [int(number) for number in tested[np.argsort(-mean[tested], kind="stable")]]


def draw_classes(classes: Classes, shown: list[int], ink: Mapping[str, str], ax: Axes) -> None:
    """Draw a row per class: a point per setting, with its sd over runs as a line.

    Args:
        classes: At least one setting.
        shown: Indices of the classes, from the top.
        ink: The colour of every setting.
        ax: The axes to draw on.
    """
    settings = len(classes.settings)
    heights = np.linspace(-0.16, 0.16, settings) if settings > 1 else [0.0]
    for setting, height in zip(classes.settings, heights, strict=True):
        ax.errorbar(
            100 * setting.mean[shown],
            np.arange(len(shown)) + height,
            xerr=100 * setting.sd[shown] if _shows_sd(classes) else None,
            fmt="o",
            markersize=5 if settings <= 2 else 4,
            linewidth=1,
            color=ink.get(setting.setting, MUTED),
            label=setting.setting,
        )
    ax.set_yticks(range(len(shown)), [classes.names[number] for number in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(visible=True, axis="x")
    ax.set_xlabel("test accuracy (%)")
    if settings > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)


def _shows_sd(classes: Classes) -> bool:
    # With many settings the lines would overlap.
    return len(classes.settings) <= 2 and any(setting.n > 1 for setting in classes.settings)


def _title(classes: Classes, shown: list[int]) -> str:
    runs = " or ".join(map(str, sorted({setting.n for setting in classes.settings})))
    spread = "; line: ± sd" if _shows_sd(classes) else ""
    which = ""
    if len(shown) < len(classes.names):
        which = f"; {len(shown)} of {len(classes.names)} classes"
    return f"Test accuracy by class: mean of {runs} confirmation runs per setting{spread}{which}"


def _caption(classes: Classes) -> str:
    """Name the class on which settings differ most; for a single setting, the hardest class."""
    means = 100 * classes.means
    if len(classes.settings) == 1:
        at = int(np.nanargmin(means[0]))
        return f"The hardest class is {classes.names[at]}, with {means[0, at]:.1f} % accuracy."
    at = int(np.nanargmax(np.ptp(means, axis=0)))
    low, high = int(means[:, at].argmin()), int(means[:, at].argmax())
    if len(classes.settings) == 2:
        low, high = 0, 1
    first, second = classes.settings[low].setting, classes.settings[high].setting
    return (
        f"The settings differ most on {classes.names[at]}: {first} {means[low, at]:.1f} %,"
        f" {second} {means[high, at]:.1f} %,"
        f" {signed(means[high, at] - means[low, at], 1)} points."
    )
