"""Count the looks at the test set: after an extension, a verdict is no longer the first one."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.rundir import RunDir, write_atomically
from analysis.rundir.codec import from_json, to_json
from analysis.stats.article import ArticleGain, describe_article_gain
from analysis.stats.verdict import Verdict


def record_verdict(path: Path, verdict: Verdict, gain: ArticleGain | None = None) -> int:
    """Write verdict.json, and return the number of this look at the test set.

    Only different confirmation runs count as another look, so rewriting the report does not.
    The verdicts of earlier looks stay in the file.

    Args:
        path: The run directory.
        verdict: The verdict on its confirmation runs.
        gain: Their evidence on the article's gain; None if the study does not test it.

    Returns:
        The number of the look, from 1; 0 if the test set has not been used.

    Raises:
        RunDirError: An existing verdict.json is unreadable.
    """
    directory = RunDir(path)
    looks = _earlier_looks(directory.verdict)
    known_looks = {look["evidence"] for look in looks}
    for file in directory.archived_confirms:
        evidence = hashlib.sha256(file.read_bytes()).hexdigest()
        if evidence not in known_looks:
            looks.append({"evidence": evidence, "outcome": "lost", "sentence": f"See {file.name}."})
    if directory.confirm.is_file():
        evidence = hashlib.sha256(directory.confirm.read_bytes()).hexdigest()
        look = {"evidence": evidence, "outcome": verdict.outcome, "sentence": verdict.sentence}
        known = [index for index, old in enumerate(looks) if old["evidence"] == evidence]
        if known:
            looks[known[0]] = look
        else:
            looks.append(look)
        number = known[0] + 1 if known else len(looks)
    else:
        number = 0
    record = {
        **_record(verdict),
        "article_gain": _record_gain(gain),
        "look": number,
        "looks": looks,
    }
    write_atomically(directory.verdict, to_json(record, indent=2))
    return number


def _record_gain(gain: ArticleGain | None) -> Mapping[str, Any] | None:
    return {"sentence": describe_article_gain(gain), **asdict(gain)} if gain else None


def _earlier_looks(file: Path) -> list[dict[str, Any]]:
    record = from_json(file.read_bytes(), str(file)) if file.is_file() else {}
    return list(record.get("looks", []))


def _record(verdict: Verdict) -> Mapping[str, Any]:
    record = asdict(verdict)
    for comparison, row in zip(verdict.comparisons, record["comparisons"], strict=True):
        row["outcome"] = comparison.outcome
    return record
