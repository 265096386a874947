"""Which classes are taken for which, by the runs that are best on `val`."""

from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from analysis.figures.classes import class_names
from analysis.figures.style import GRID, INK, MUTED, STYLE, Picture, colours, new_figure
from analysis.frames import StudyFrames
from analysis.rundir.metric import mode
from analysis.rundir.predictions import Predictions, load_predictions
from analysis.words import count

#: Of more classes than this, only the most frequent confusions are drawn.
MOST_CLASSES = 15
MOST_CONFUSIONS = 15


@dataclass(frozen=True)
class Confusion:
    """The answers on the test images, mean over the runs of one recipe and setting.

    Attributes:
        recipe: The recipe.
        setting: The setting.
        n: Number of runs.
        names: Of the classes, in the order of their numbers.
        shares: [true class, answer], in per cent of the true class; NaN where it has no image.
    """

    recipe: str
    setting: str
    n: int
    names: tuple[str, ...]
    shares: NDArray[np.float64]

    @property
    def errors(self) -> NDArray[np.float64]:
        """The shares without the right answers and the unknown, which count as zero."""
        errors = np.nan_to_num(self.shares)
        np.fill_diagonal(errors, 0)
        return errors


def make_confusion(frames: StudyFrames) -> Picture | None:
    """The confusion matrix; of many classes, the most frequent confusions."""
    confusion = compute_confusion(frames)
    if confusion is None:
        return None
    colour = colours(frames).get(confusion.setting, MUTED)
    with mpl.rc_context(STYLE):
        if len(confusion.names) <= MOST_CLASSES:
            figure = new_figure(1.4 + 0.34 * len(confusion.names))
            draw_confusion(confusion, colour, figure.subplots())
        else:
            figure = new_figure(0.9 + 0.25 * MOST_CONFUSIONS)
            draw_confusions(confusion, colour, figure.subplots())
    return Picture("confusion", _title(confusion), _caption(confusion), figure)


def compute_confusion(frames: StudyFrames) -> Confusion | None:
    """The mean confusion matrix of the best cell; None without its stored predictions."""
    cell = best_cell(frames)
    if cell is None:
        return None
    recipe, setting = cell
    runs = frames.confirm.query("recipe == @recipe and setting == @setting")
    loaded = (load_predictions(frames.path, run_id) for run_id in runs["run_id"])
    tables = [confusion_shares(predictions) for predictions in loaded if predictions is not None]
    if not tables:
        return None
    names = class_names(frames, len(tables[0]))
    return Confusion(recipe, setting, len(tables), names, np.mean(tables, axis=0))


def best_cell(frames: StudyFrames) -> tuple[str, str] | None:
    """Recipe and setting of the best mean score, which is measured on `val`; None without one."""
    scores = frames.confirm.dropna(subset="score").groupby(["recipe", "setting"], sort=False)
    means = scores["score"].mean().reset_index()
    if means.empty:
        return None
    best = means["score"].argmin() if mode(frames.metric) == "min" else means["score"].argmax()
    return str(means["recipe"].iloc[best]), str(means["setting"].iloc[best])


def confusion_shares(predictions: Predictions) -> NDArray[np.float64]:
    """How often each class is taken for each, in per cent of the true class: [true, answer]."""
    classes = predictions.logits.shape[1]
    pairs = predictions.labels * classes + predictions.guesses
    counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * counts / counts.sum(axis=1, keepdims=True), np.float64)


def draw_confusion(confusion: Confusion, colour: str, ax: Axes) -> None:
    """Draw a cell per true class and answer; the more frequent an error, the darker.

    Args:
        confusion: Of few classes.
        colour: Of the setting.
        ax: Where to draw.
    """
    names, errors = confusion.names, confusion.errors
    cells = np.tile(mpl.colors.to_rgba(colour), (*errors.shape, 1))
    cells[..., 3] = 0.65 * errors / max(errors.max(), 1e-9)
    # Right answers stand apart in grey: on one scale with them no error would be seen.
    cells[np.diag_indices(len(names))] = mpl.colors.to_rgba(GRID, 0.6)
    ax.pcolormesh(range(len(names)), range(len(names)), cells, shading="nearest", linewidth=0)
    for (true, answer), share in np.ndenumerate(confusion.shares):
        right = true == answer
        # Numbers that would read 0.0 hide the others.
        if np.isfinite(share) and (right or share >= 0.05):
            ax.text(
                answer,
                true,
                f"{share:.1f}",
                ha="center",
                va="center",
                color=INK,
                weight="bold" if right else "normal",
                fontsize=8.5 if len(names) <= 12 else 7,
            )
    limits = (-0.5, len(names) - 0.5)
    ax.set(xlim=limits, ylim=limits[::-1], xlabel="answer", ylabel="true class")
    slant = 45 if max(map(len, names)) > 6 and len(names) > 12 else 0
    ax.set_xticks(range(len(names)), names, rotation=slant)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def draw_confusions(confusion: Confusion, colour: str, ax: Axes) -> None:
    """Draw a bar for each of the most frequent confusions.

    Args:
        confusion: Of many classes.
        colour: Of the setting.
        ax: Where to draw.
    """
    errors, names = confusion.errors, confusion.names
    most = np.argsort(-errors, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(cell), len(names)) for cell in most]
    ax.barh(range(len(pairs)), [errors[pair] for pair in pairs], color=colour, height=0.7)
    labels = [f"{names[true]} taken for {names[answer]}" for true, answer in pairs]
    ax.set_yticks(range(len(pairs)), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x")
    ax.set_xlabel("per cent of the true class")


def _title(confusion: Confusion) -> str:
    drawn = "" if len(confusion.names) <= MOST_CLASSES else f", the {MOST_CONFUSIONS} most frequent"
    return f"Confusions on the test images, in per cent of each true class{drawn}"


def _caption(confusion: Confusion) -> str:
    """The most frequent confusion, and whose answers these are."""
    basis = (
        f"recipe {confusion.recipe}, setting {confusion.setting}, the best on val;"
        f" mean of {count(confusion.n, 'run')}"
    )
    errors, names = confusion.errors, confusion.names
    true, answer = divmod(int(errors.argmax()), len(names))
    if errors[true, answer] == 0:
        return f"No test image is taken for another class ({basis})."
    return (
        f"The most frequent confusion: {errors[true, answer]:.1f} % of the images of {names[true]}"
        f" are taken for {names[answer]}, and {errors[answer, true]:.1f} % the other way round"
        f" ({basis})."
    )
