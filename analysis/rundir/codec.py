"""Convert rows (flat dataclasses) to and from JSON and CSV; non-finite numbers become empty."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from analysis.rundir.errors import RunDirError
from search_spaces import PARAMETERS, Value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

#: The only mapping field; in CSV each of its keys is a column.
HYPERPARAMETERS = "hyperparameters"


def to_json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """Serialize a mapping as one JSON object and a newline; non-finite numbers become null."""
    return json.dumps(_without_nan(content), indent=indent, allow_nan=False) + "\n"


def from_json(text: bytes, place: str) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        text: The object.
        place: Its file and line, for the error message.

    Raises:
        RunDirError: The text is not a JSON object.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RunDirError(f"{place}: not a JSON object")
    return parsed


def row_from_json(kind: type[Row], text: bytes, place: str) -> Row:
    """Read a row that `to_json` wrote.

    Raises:
        RunDirError: The text is not a row of this kind.
    """
    return _to_row(kind, from_json(text, place), place)


def to_csv(kind: type[Row], rows: Sequence[Row]) -> str:
    """Serialize rows as CSV, a column per field; the hyperparameters expand to a column each."""
    names = dict.fromkeys(name for row in rows for name in getattr(row, HYPERPARAMETERS))
    columns: list[str] = []
    for field in fields(kind):
        columns += names if field.name == HYPERPARAMETERS else [field.name]
    lines: list[str] = []
    # With this terminator the writer quotes a lone \r or \n; readers take either for a line break.
    file = SimpleNamespace(write=lines.append)
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        values = _without_nan(asdict(row))
        writer.writerow(values.pop(HYPERPARAMETERS) | values)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def from_csv(kind: type[Row], text: bytes, place: str) -> list[Row]:
    """Read rows that `to_csv` wrote.

    Raises:
        RunDirError: Not a CSV file, or a line is not a row of this kind.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(text.decode(), newline="")))
    except (ValueError, csv.Error):
        raise RunDirError(f"{place}: not a CSV file") from None
    return [
        _row_from_csv(kind, line, f"{place}, row {number}")
        for number, line in enumerate(lines, start=1)
    ]


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _to_row(kind: type[Row], values: Mapping[str, Any], place: str) -> Row:
    expected = {field.name: field for field in fields(kind)}
    # Columns with a default may be missing.
    optional = {name for name, field in expected.items() if field.default is not MISSING}
    if wrong := (expected.keys() - optional) ^ (values.keys() - optional):
        raise RunDirError(f"{place}: missing or unknown fields: {', '.join(sorted(wrong))}")
    return kind(**{name: _checked(expected[name], value, place) for name, value in values.items()})


def _checked(field: Field[Any], value: Any, place: str) -> Any:
    if field.type is float:
        if value is None:
            return math.nan
        if type(value) is int and value.bit_length() < 1024:  # larger ones overflow a float
            return float(value)
        fits = type(value) is float
    elif get_origin(field.type) is Literal:
        fits = value in get_args(field.type)
    elif field.name == HYPERPARAMETERS:
        fits = isinstance(value, dict) and {*map(type, value.values())} <= {float, int, str}
    else:
        fits = type(value) is field.type
    if not fits:
        raise RunDirError(f"{place}: {field.name}: {value!r} is invalid")
    return value


def _row_from_csv(kind: type[Row], line: Mapping[str, str | None], place: str) -> Row:
    types = {field.name: field.type for field in fields(kind)}
    hyperparameters: dict[str, Value] = {}
    values: dict[str, Any] = {HYPERPARAMETERS: hyperparameters}
    for name, text in line.items():
        # DictReader uses None as name or text if a line is too long or too short.
        if name is None or text is None:
            raise RunDirError(f"{place}: number of values differs from the header")
        try:
            if name not in types:
                if text:
                    hyperparameters[name] = _hyperparameter(name, text)
            elif types[name] is float:
                values[name] = float(text) if text else None
            else:
                values[name] = int(text) if types[name] is int else text
        except ValueError:
            raise RunDirError(f"{place}: {name}: {text!r} is invalid") from None
    return _to_row(kind, values, place)


def _hyperparameter(name: str, text: str) -> Value:
    # CSV has no types: a head "256" is text, a batch size "256" is a number.
    return type(PARAMETERS[name].default)(text) if name in PARAMETERS else text
