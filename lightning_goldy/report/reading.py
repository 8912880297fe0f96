"""Entries of a row, checked: what is of another kind than the one wanted is named with its path and its value."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.figures import ReportError, Row


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Names, in front of the error, what was read when an entry is missing or of another kind.

    Example:
        >>> with naming("a row of tiny lacks what its figure needs:"):
        ...     {}["count"]
        Traceback (most recent call last):
        lightning_goldy.report.figures.ReportError: a row of tiny lacks what its figure needs: 'count'
    """
    try:
        yield
    except ReportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ReportError(f"{what} {error}") from error


def result_of(row: Row) -> Mapping[str, Any]:
    """The result of a row.

    Raises:
        ReportError: It is not an object.
    """
    result = row.get("result")
    if not isinstance(result, Mapping):
        raise ReportError(f"'result' must be an object, got {result!r:.60}")
    return result


def objects_of(row: Row, name: str, wanted: str, *, least: int = 1) -> list[Mapping[str, Any]]:
    """A list of objects in the result of a row.

    Args:
        row: With a result.
        name: Of the entry.
        wanted: What it must be, in words.
        least: How many there must be.

    Raises:
        ReportError: It is something else.

    Example:
        >>> objects_of({"result": {"runs": 3}}, "runs", "a list of runs")
        Traceback (most recent call last):
        lightning_goldy.report.figures.ReportError: 'result.runs' must be a list of runs, got 3
    """
    items = result_of(row).get(name)
    if not isinstance(items, list) or len(items) < least or not all(isinstance(item, Mapping) for item in items):
        raise ReportError(f"'result.{name}' must be {wanted}, got {items!r:.60}")
    return items


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A text of a record that stands at a path.

    Raises:
        ReportError: It is something else.
    """
    if not isinstance(record.get(name), str):
        raise ReportError(f"'{where}.{name}' must be text, got {record.get(name)!r:.60}")
    return str(record[name])


def number(value: Any, where: str) -> float:
    """A number; null, which stands for one that is not finite, is NaN.

    Args:
        value: As it was read.
        where: Path of it.

    Raises:
        ReportError: It is something else.

    Example:
        >>> number(3, "result.count"), number(None, "result.count")
        (3.0, nan)
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportError(f"'{where}' must be a number or null, got {value!r:.60}")
    return float(value)


def matrix(values: Any, where: str) -> NDArray[np.float64]:
    """A table of numbers; null is NaN.

    Args:
        values: As they were read.
        where: Path of them.

    Raises:
        ReportError: It is something else, or its rows differ in length.
    """
    if not isinstance(values, list) or not values or not all(isinstance(line, list) for line in values):
        raise ReportError(f"'{where}' must be a table of numbers, got {values!r:.60}")
    if len({len(line) for line in values}) != 1:
        raise ReportError(f"the rows of '{where}' differ in length")
    for value in (value for line in values for value in line):
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ReportError(f"'{where}' must hold numbers or null, got {value!r:.60}")
    return np.array(values, dtype=np.float64)
