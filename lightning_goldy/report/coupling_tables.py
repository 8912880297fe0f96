"""What a coupling can be trusted for and its strongest pairs, as console tables and as parts of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_goldy.report.formatting import format_number, printable, texts_html
from lightning_goldy.report.registry import ReportError, Row

_CHECKS = ("check", "value", "asked for", "", "what it means")
_PAIRS = ("cosine", "question", "answer", "question", "answer", "same")
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "not measured": "dim"}


def readiness_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """The checks for the console.

    Args:
        checks: Each ``check``, ``value``, ``threshold``, ``rule``, ``status``, ``meaning``.

    Raises:
        ReportError: A check lacks something.

    Example:
        >>> check = {"check": "pieces", "value": 9, "threshold": 50, "rule": "at least", "status": "warn"}
        >>> readiness_table([{**check, "meaning": "few", "next_step": "take more"}]).row_count
        1
    """
    table = Table(title="Can this be trusted?", title_justify="left", box=SIMPLE_HEAD)
    for heading in _CHECKS[:-1]:
        table.add_column(heading, overflow="fold")
    for each in checks:
        *cells, status, _ = _check_cells(each)
        table.add_row(*map(Text, cells), Text(status, style=_COLOURS.get(status, "")))
    return table


def readiness_lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the checks that did not pass mean, and what to do.

    Args:
        checks: As for ``readiness_table``.

    Example:
        >>> check = {"check": "pieces", "value": 9, "threshold": 50, "rule": "at least", "status": "warn"}
        >>> readiness_lines([{**check, "meaning": "Few.", "next_step": "Take more."}])
        ['pieces: Few. Next: Take more.']
    """
    return [f"{each['check']}: {_check_cells(each)[-1]}" for each in checks if each["status"] in ("warn", "fail")]


def coupling_tables_html(row: Row) -> str:
    """Readiness and strongest pairs as parts of the page; nothing when the row has neither.

    Args:
        row: Its result may hold ``readiness`` (``verdict``, ``checks``) and ``top`` (pairs with their texts).

    Raises:
        ReportError: A check or a pair lacks something.

    Example:
        >>> pair = {"cosine": 0.5, "first": {"id": "1", "question": "<b>", "answer": "A"}, "same": ["answer"]}
        >>> page = coupling_tables_html({"result": {"top": [{**pair, "second": pair["first"]}]}})
        >>> "&lt;b&gt;" in page, coupling_tables_html({"result": {}})
        (True, '')
    """
    result, parts = row["result"], []
    readiness = result.get("readiness")
    if isinstance(readiness, Mapping) and readiness.get("checks"):
        heading = f"<h3>Can this be trusted? {escape(str(readiness.get('verdict', '')))}</h3>"
        parts.append(heading + texts_html(_CHECKS, map(_check_cells, readiness["checks"]), wrap="normal"))
    pairs = result.get("top")
    if isinstance(pairs, Sequence) and not isinstance(pairs, str) and pairs and "first" in pairs[0]:
        parts.append("<h3>Strongest pairs</h3>" + texts_html(_PAIRS, map(_pair_cells, pairs)))
    return "".join(parts)


def _check_cells(check: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        meaning = check["meaning"]
        if check["status"] in ("warn", "fail") and check["next_step"]:
            meaning = f"{meaning} Next: {check['next_step']}"
        asked = f"{check['rule']} {format_number(check['threshold'])}"
        return check["check"], format_number(check["value"]), asked, check["status"], meaning
    except (KeyError, TypeError) as error:
        raise ReportError(f"a check of the coupling's readiness lacks or spoils {error}") from error


def _pair_cells(pair: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        texts = []
        for side in (pair["first"], pair["second"]):
            # Batches have no texts.
            asked = side["question"] if side["question"] is not None else side["id"]
            texts += [printable(asked), printable(side["answer"] or "")]
        return format_number(pair["cosine"]), *texts, ", ".join(pair["same"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"a pair of the coupling lacks or spoils {error}") from error
