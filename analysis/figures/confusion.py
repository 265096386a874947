"""Confusion matrix on test of the recipe and setting that are best on `val`."""

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

#: With more classes, only the most frequent confusions are drawn.
CLASSES_AS_MATRIX = 15
MOST_CONFUSIONS = 15


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix on test, a mean over the runs of one recipe and setting.

    Attributes:
        recipe: The recipe.
        setting: The setting.
        n: Number of runs.
        names: Class names, by class index.
        shares: [true class, predicted class], in per cent of the true class; NaN for a class
            without images.
    """

    recipe: str
    setting: str
    n: int
    names: tuple[str, ...]
    shares: NDArray[np.float64]

    @property
    def errors(self) -> NDArray[np.float64]:
        """The shares with correct predictions and NaN set to zero."""
        errors = np.nan_to_num(self.shares)
        np.fill_diagonal(errors, 0)
        return errors


def make_confusion(frames: StudyFrames) -> Picture | None:
    """Make the figure: the confusion matrix; for many classes, the most frequent confusions."""
    confusion = compute_confusion(frames)
    if confusion is None:
        return None
    colour = colours(frames).get(confusion.setting, MUTED)
    with mpl.rc_context(STYLE):
        if len(confusion.names) <= CLASSES_AS_MATRIX:
            figure = new_figure(1.4 + 0.34 * len(confusion.names))
            draw_confusion(confusion, colour, figure.subplots())
        else:
            figure = new_figure(0.9 + 0.25 * MOST_CONFUSIONS)
            draw_confusions(confusion, colour, figure.subplots())
    return Picture("confusion", _title(confusion), _caption(confusion), figure)


def compute_confusion(frames: StudyFrames) -> Confusion | None:
    """Return the mean confusion matrix of the best cell; None without stored predictions."""
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
    """Return recipe and setting with the best mean score on `val`; None without scores."""
    scores = frames.confirm.dropna(subset="score").groupby(["recipe", "setting"], sort=False)
    means = scores["score"].mean().reset_index()
    if means.empty:
        return None
    best = means["score"].argmin() if mode(frames.metric) == "min" else means["score"].argmax()
    return str(means["recipe"].iloc[best]), str(means["setting"].iloc[best])


def confusion_shares(predictions: Predictions) -> NDArray[np.float64]:
    """Return the confusion matrix in per cent of the true class: [true, predicted]."""
    classes = predictions.logits.shape[1]
    pairs = predictions.labels * classes + predictions.guesses
    counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * counts / counts.sum(axis=1, keepdims=True), np.float64)


def draw_confusion(confusion: Confusion, colour: str, ax: Axes) -> None:
    """Draw a cell per true and predicted class, darker for more frequent errors.

    Args:
        confusion: At most `CLASSES_AS_MATRIX` classes.
        colour: The colour of the setting.
        ax: The axes to draw on.
    """
    names, errors = confusion.names, confusion.errors
    cells = np.tile(mpl.colors.to_rgba(colour), (*errors.shape, 1))
    cells[..., 3] = 0.65 * errors / max(errors.max(), 1e-9)
    # Correct predictions are grey: on a scale shared with them, errors would be invisible.
    cells[np.diag_indices(len(names))] = mpl.colors.to_rgba(GRID, 0.6)
    ax.pcolormesh(range(len(names)), range(len(names)), cells, shading="nearest", linewidth=0)
    for (true, answer), share in np.ndenumerate(confusion.shares):
        right = true == answer
        # Numbers that would read 0.0 only clutter the matrix.
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
    ax.set(xlim=limits, ylim=limits[::-1], xlabel="predicted class", ylabel="true class")
    slant = 45 if max(map(len, names)) > 6 and len(names) > 12 else 0
    ax.set_xticks(range(len(names)), names, rotation=slant)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def draw_confusions(confusion: Confusion, colour: str, ax: Axes) -> None:
    """Draw a bar for each of the most frequent confusions.

    Args:
        confusion: More than `CLASSES_AS_MATRIX` classes.
        colour: The colour of the setting.
        ax: The axes to draw on.
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
    ax.set_xlabel("% of the true class")


def _title(confusion: Confusion) -> str:
    few = len(confusion.names) <= CLASSES_AS_MATRIX
    drawn = "Confusion matrix" if few else f"The {MOST_CONFUSIONS} most frequent confusions"
    return f"{drawn} on the test images, in % of each true class"


def _caption(confusion: Confusion) -> str:
    """Name the most frequent confusion, and the runs that it is from."""
    basis = (
        f"recipe {confusion.recipe}, setting {confusion.setting}, the best on val;"
        f" mean of {count(confusion.n, 'run')}"
    )
    errors, names = confusion.errors, confusion.names
    true, answer = divmod(int(errors.argmax()), len(names))
    if errors[true, answer] == 0:
        return f"No test image is misclassified ({basis})."
    return (
        f"The most frequent confusion: {errors[true, answer]:.1f} % of the images of {names[true]}"
        f" are classified as {names[answer]}, and {errors[answer, true]:.1f} % the other way round"
        f" ({basis})."
    )
