"""Health checks: what could undermine a study's comparison, and what to do about it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from analysis.frames import StudyFrames, compute_champions
from analysis.rundir.metric import mode
from analysis.rundir.optuna_db import searched_ranges
from analysis.stats.verdict import Verdict
from analysis.words import count, signed

#: With fewer completed trials an arm has hardly been searched.
FEWEST_COMPLETED = 5

#: Fraction of a range at either end that counts as its edge (in log space if searched in log).
EDGE = 0.05

#: Classes count as imbalanced from this ratio of the largest to the smallest in train.
IMBALANCE = 2

#: Largest ratio between arms, in completed trials or epochs, that passes.
UNEVEN = 1.5

#: At most this many files are listed.
MOST_FILES = 10


@dataclass(frozen=True)
class Finding:
    """The result of a health check.

    Attributes:
        check: The problem that is checked for, a short phrase.
        passed: True if the problem was not found.
        seen: What was found, with its figures.
        meaning: Why it matters.
        remedy: What to do; empty if the check passed.
    """

    check: str
    passed: bool
    seen: str
    meaning: str
    remedy: str


def check_health(frames: StudyFrames, verdict: Verdict) -> tuple[Finding, ...]:
    """Run every check that the study has the data for."""
    return tuple(finding for check in CHECKS for finding in check(frames, verdict))


def _few_completed(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    completed = _completed(frames)
    if not completed:
        return
    arm = min(completed, key=lambda name: completed[name])
    yield _finding(
        "too few completed trials",
        completed[arm] >= FEWEST_COMPLETED,
        _each(completed, "completed trial"),
        "an arm's champion is picked from its completed trials; few trials leave little choice",
        f"increase --trials until every arm completes {FEWEST_COMPLETED} or more.",
    )


def _starved(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    completed = _completed(frames)
    if len(completed) < 2:
        return
    most, fewest = max(completed.values()), min(completed.values())
    yield _finding(
        "uneven early stopping",
        most <= UNEVEN * fewest,
        _each(completed, "completed trial"),
        "an arm whose trials are stopped more often is searched less thoroughly",
        "increase --trials; an arm that learns slowly also needs more --epochs.",
    )


def _epochs_spent(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    spent = {str(arm): int(rows["epochs"].sum()) for arm, rows in _by_arm(frames)}
    if len(spent) < 2:
        return
    yield _finding(
        "uneven search effort",
        max(spent.values()) <= UNEVEN * max(1, min(spent.values())),
        _each(spent, "epoch"),
        "arms get the same number of trials, but early stopping may give one arm more epochs than"
        " another",
        "increase --trials, and keep this in mind when comparing the champions' scores.",
    )


def _edge(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    ranges = searched_ranges(frames.path)
    champions = compute_champions(frames).to_dict("records")
    if not ranges or not champions:
        return
    at_edge = []
    for champion in champions:
        for name, r in ranges.get(str(champion["arm"]), {}).items():
            value = _number(champion.get(name))
            if not r.low <= value <= r.high:  # the storage belongs to other trials
                continue
            low, place, high = (math.log(x) if r.log else x for x in (r.low, value, r.high))
            if not EDGE < (place - low) / (high - low) < 1 - EDGE:
                at_edge.append(f"{champion['arm']}: {name} {value:.3g} in {r.low:g} to {r.high:g}")
    yield _finding(
        "a champion at the edge of its search range",
        not at_edge,
        "; ".join(at_edge) or "every champion is inside its ranges",
        "if the best value is at the edge of its range, a better one may lie beyond it",
        "widen that range in your own search space (docs/spaces.md).",
    )


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def _time_budget(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    wanted = {arm: plan["trials"] for arm, plan in frames.record.get("arms", {}).items()}
    done = {str(arm): len(rows) for arm, rows in _by_arm(frames)}
    missing = {arm: wanted[arm] - done[arm] for arm in done if arm in wanted}
    if not missing:
        return
    yield _finding(
        "missing trials",
        max(missing.values()) == 0,
        "; ".join(f"{arm}: {done[arm]} of {count(wanted[arm], 'trial')}" for arm in missing),
        "a time budget or an interruption that cuts one arm short favours the other",
        "resume with --resume and without --time-budget.",
    )


def _broken(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    trials = frames.trials
    if trials.empty:
        return
    broken = trials["state"].isin(["diverged", "failed"])
    seen = f"{broken.sum()} of {count(len(trials), 'trial')} diverged or failed"
    region = _region(trials, broken, frames.hyperparameters) if broken.any() else ""
    yield _finding(
        "failures in one region of the search space",
        not region,
        seen + region,
        "the search learns nothing where runs break, so the region is not part of the comparison",
        "look at the errors in trials.csv, and fix them or exclude the region from the space.",
    )


def _last_epoch(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    confirm = frames.confirm
    if confirm.empty:
        return
    share = {
        str(setting): float((rows["best_epoch"] == rows["epochs"]).mean())
        for setting, rows in confirm.groupby("setting", sort=False)
    }
    yield _finding(
        "runs still improving at the last epoch",
        max(share.values()) < 0.5,
        "best at the last epoch: "
        + ", ".join(f"{100 * value:.0f} % of the {name} runs" for name, value in share.items()),
        "a run that is best at its last epoch might improve further; then the number of epochs"
        " decides the comparison",
        "increase --epochs.",
    )


def _winners_curse(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    if frames.confirm.empty or frames.trials.empty:
        return
    by_loss = mode(frames.metric) == "min"
    scale, unit, digits = (-1, "nats", 3) if by_loss else (100, "points", 2)
    gaps, outside = [], False
    for champion in compute_champions(frames).to_dict("records"):
        arm = champion["arm"]
        same = (frames.confirm["recipe"] == arm) & (frames.confirm["setting"] == arm)
        again = scale * frames.confirm.loc[same, frames.metric]
        if len(again) < 2:
            continue
        gap = scale * champion["score"] - again.mean()
        outside = outside or gap > 2 * again.std()
        gaps.append(
            f"{arm}: {signed(gap, digits)} {unit} better than its confirmation runs"
            f" (sd {again.std():.{digits}f})"
        )
    if gaps:
        yield _finding(
            "winner's curse",
            not outside,
            "; ".join(gaps),
            "the best of many noisy scores is partly luck (winner's curse); retrained, the same"
            " hyperparameters score lower",
            "report the confirmation runs, not the champion's score.",
        )


def _val_and_test(frames: StudyFrames, verdict: Verdict) -> Iterator[Finding]:
    for comparison in verdict.comparisons:
        means = frames.confirm.groupby("setting")["val_accuracy"].mean()
        on_val = 100 * (means[comparison.setting] - means[comparison.baseline])
        agree = on_val * comparison.accuracy.mean >= 0
        yield _finding(
            f"disagreement between val and test for {comparison.setting}",
            agree or comparison.outcome not in ("helps", "hurts"),
            f"{signed(on_val)} points on val, {signed(comparison.accuracy.mean)} on test",
            "what is better on val should be better on test too; if not, the difference is noise or"
            " val is not representative of test",
            "increase --seeds, and check how val and test were drawn.",
        )


def _recipes_agree(_: StudyFrames, verdict: Verdict) -> Iterator[Finding]:
    for comparison in verdict.comparisons:
        effects = comparison.by_recipe
        if len(effects) < 2:
            continue
        clear = [e for e in effects.values() if e.p < 0.05]
        yield _finding(
            f"disagreement between recipes for {comparison.setting}",
            not (any(e.mean > 0 for e in clear) and any(e.mean < 0 for e in clear))
            and len({e.mean > 0 for e in effects.values()}) == 1,
            "; ".join(f"recipe {name}: {signed(e.mean)} points" for name, e in effects.items()),
            "effects of opposite sign mean that the answer depends on the recipe",
            "read the effect per recipe; the mean over recipes describes none of them.",
        )


def _class_balance(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    data = frames.record.get("data", {})
    names, in_train = data.get("classes"), data.get("images_per_class", {}).get("train")
    if not names or not in_train or len(names) != len(in_train):
        return
    by_class = dict(zip(names, in_train, strict=True))
    rarest, commonest = (f(by_class, key=lambda name: by_class[name]) for f in (min, max))
    most, fewest = by_class[commonest], by_class[rarest]
    seen = f"{most} training images of {commonest}, {fewest} of {rarest}"
    balanced = frames.metric == "val_balanced_accuracy"
    yield _finding(
        "class imbalance",
        balanced or most < IMBALANCE * fewest,
        (f"{most} training images per class" if most == fewest else seen)
        + ("; the metric weights all classes equally" if balanced else ""),
        "accuracy is dominated by the frequent classes; a model can score well and still miss the"
        " rare ones",
        "check the accuracy by class, or run the study with --metric val_balanced_accuracy.",
    )


def _duplicates(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    data = frames.record.get("data", {})
    if "duplicates" not in data:
        return
    duplicates = data["duplicates"]
    parts = [pair["part"] for pair in duplicates]
    pairs = "; ".join(f"{pair['file']} is like {pair['like']}" for pair in duplicates[:MOST_FILES])
    hidden = len(duplicates) - MOST_FILES
    more = f"; and {hidden} more" if hidden > 0 else ""
    yield _finding(
        "near-duplicate images across splits",
        not duplicates,
        f"{parts.count('test')} test and {parts.count('val')} val images look like an image of"
        f" another split{': ' * bool(duplicates)}{pairs}{more}",
        "a model may have memorised the images it was trained on; their copies in val or test then"
        " inflate its accuracy",
        "review the pairs (all are in study.json), and keep images that belong together, such as"
        " copies or pictures of one scene, in one split.",
    )


def _unreadable(frames: StudyFrames, _: Verdict) -> Iterator[Finding]:
    data = frames.record.get("data", {})
    if "unreadable" not in data:
        return
    files = data["unreadable"]
    hidden = len(files) - MOST_FILES
    more = f"; and {hidden} more" if hidden > 0 else ""
    listed = "; ".join(files[:MOST_FILES])
    yield _finding(
        "unreadable files",
        not files,
        f"{count(len(files), 'file')} skipped{': ' * bool(files)}{listed}{more}",
        "files that cannot be read are missing from the study",
        "fix or remove them.",
    )


CHECKS: tuple[Callable[[StudyFrames, Verdict], Iterator[Finding]], ...] = (
    _few_completed,
    _starved,
    _epochs_spent,
    _time_budget,
    _broken,
    _edge,
    _last_epoch,
    _winners_curse,
    _val_and_test,
    _recipes_agree,
    _class_balance,
    _duplicates,
    _unreadable,
)


def _finding(check: str, passed: bool, seen: str, meaning: str, remedy: str) -> Finding:
    return Finding(check, bool(passed), seen, meaning, "" if passed else remedy)


def _by_arm(frames: StudyFrames) -> list[tuple[object, pd.DataFrame]]:
    return list(frames.trials.groupby("arm", sort=False))


def _completed(frames: StudyFrames) -> dict[str, int]:
    return {str(arm): int((rows["state"] == "completed").sum()) for arm, rows in _by_arm(frames)}


def _each(numbers: Mapping[str, int], word: str) -> str:
    return "; ".join(f"{arm}: {count(number, word)}" for arm, number in numbers.items())


def _region(trials: pd.DataFrame, broken: "pd.Series[bool]", names: tuple[str, ...]) -> str:
    """Return where broken trials cluster, as the end of a sentence; empty if they do not."""
    from scipy import stats  # slow to import

    for name in names:
        values = pd.to_numeric(trials[name], errors="coerce")
        if values.notna().all() and values.min() < values.max():
            bad, good = values[broken], values[~broken]
            if len(good) and stats.mannwhitneyu(bad, good).pvalue < 0.01:
                where = "high" if bad.median() > good.median() else "low"
                return f", mostly at {where} {name} (median {bad.median():.3g})"
    return ""
