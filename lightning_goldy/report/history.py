"""The rows of a run before the one that is drawn, thinned, and the lines over the run that some figures read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_goldy.core.files import finite
from lightning_goldy.report import figures

Row = Mapping[str, Any]

MOST_ROWS = 200
"""Rows that a history holds at most."""

_READS: Mapping[str, frozenset[str]] = {
    "basin_volume": frozenset({"volumes"}),
    "head_plasticity": frozenset({"timeline", "curve"}),
}
_TAYLOR = ("change", "first_order", "nonlinearity")
_VOLUME = ("log_volume", "interval_low", "interval_high", "sigma", "preconditioner")
_CURVE = ("steps", "loss", "multiplier", "active_heads")


def reads_of(analysis: str) -> frozenset[str]:
    """Entries of ``result`` in earlier rows that the analysis's figures over the run read, beside the metrics.

    Args:
        analysis: As its rows are called.

    Example:
        >>> sorted(reads_of("head_plasticity")), sorted(reads_of("golden_parameters"))
        (['curve', 'timeline'], [])
    """
    return _READS.get(analysis, frozenset()) | figures.reads_of(analysis)


class RowHistory:
    """Rows of one analysis in the order of the run, at most 200, evenly spaced from the first on.

    Of each it holds step, trigger, metrics and what :func:`reads_of` names. When it is full every second row goes and
    only every second of those that follow is taken, so memory and time per row do not grow with the run.

    Args:
        rows: To begin with.

    Example:
        >>> rows = ({"analysis": "tiny", "step": step, "trigger": "step", "metrics": {}} for step in range(1000))
        >>> history = RowHistory(rows)
        >>> len(history.rows), [row["step"] for row in history.rows[:3]], history.rows[-1]["step"]
        (125, [0, 8, 16], 992)
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: list[Row] = []
        self._stride = 1
        self._seen = 0
        for row in rows:
            self.add(row)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What is held."""
        return tuple(self._rows)

    def add(self, row: Row) -> None:
        """Takes in the next row, as ``results.jsonl`` would give it back."""
        taken, self._seen = self._seen % self._stride == 0, self._seen + 1
        if not taken:
            return
        reads = reads_of(row["analysis"])
        result = {name: value for name, value in row.get("result", {}).items() if name in reads}
        kept = {name: row[name] for name in ("analysis", "step", "trigger", "metrics")}
        self._rows.append(finite({**kept, "result": result}))
        if len(self._rows) > MOST_ROWS:
            self._rows, self._stride = self._rows[::2], 2 * self._stride


def with_history(row: Row, earlier: Sequence[Row] = ()) -> Row:
    """The row with the lines over the run that its figures read, made of earlier rows and of itself.

    Args:
        row: The row that is drawn; lines that it holds already are left alone.
        earlier: Rows of the same analysis before it, ascending.

    Example:
        >>> rows = [{"analysis": "variant_losses", "step": step, "metrics": {"loss/full": 2.0 - step}, "result": {}}
        ...         for step in (0, 1)]
        >>> with_history(rows[1], rows[:1])["result"]["trajectory"]
        {'steps': [0, 1], 'losses': {'full': [2.0, 1.0]}}
    """
    build = _BUILDERS.get(row["analysis"])
    if build is None or not isinstance(row.get("result"), Mapping):
        return row
    return {**row, "result": {**row["result"], **build(row, [*earlier, row])}}


def without_history(analysis: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result of format 1 as one of format 2, which holds its own step only.

    Args:
        analysis: As its rows are called.
        result: Of a row of format 1.

    Example:
        >>> without_history("attention_tracker", {"spectra": [{"prompt": "a", "steps": [0, 5], "values": [[1], [2]]}]})
        {'spectra': [{'prompt': 'a', 'values': [2]}]}
    """
    if analysis in ("taylor_diff", "basin_volume", "coupling_drift", "variant_losses"):
        return {name: value for name, value in result.items() if name != "trajectory"}
    if analysis == "attention_tracker" and "spectra" in result:
        latest = [{"prompt": line["prompt"], "values": line["values"][-1]} for line in result["spectra"]]
        return {**result, "spectra": latest}
    # The parts of head plasticity are put together by their steps, so those that hold the whole run do no harm.
    return dict(result)


def _taylor(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    if "trajectory" in row["result"]:
        return {}
    lines: dict[str, list[Any]] = {"steps": [each["step"] for each in rows]}
    for name in _TAYLOR:
        lines[name] = _metric(rows, name)
    names = {name for each in rows for name in each["metrics"] if name.startswith("loss/order")}
    for name in sorted(names):
        lines[name.removeprefix("loss/")] = [
            None if value is None else value - each["metrics"]["base_loss"]
            for each, value in zip(rows, _metric(rows, name), strict=True)
        ]
    return {"trajectory": lines}


def _volumes(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    if "trajectory" in row["result"]:
        return {}
    lines: dict[str, dict[str, list[Any]]] = {}
    for each in rows:
        for volume in each["result"].get("volumes", ()):
            line = lines.setdefault(volume["label"], {name: [] for name in ("steps", *_VOLUME)})
            line["steps"].append(each["step"])
            for name in _VOLUME:
                line[name].append(volume[name])
    return {"trajectory": [{"label": label, **line} for label, line in lines.items()]}


def _variants(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    if "trajectory" in row["result"]:
        return {}
    names = [name for name in row["metrics"] if name.startswith("loss/")]
    losses = {name.removeprefix("loss/"): _metric(rows, name) for name in names}
    return {"trajectory": {"steps": [each["step"] for each in rows], "losses": losses}}


def _plasticity(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    if len(rows) == 1:
        return {}
    timeline: list[Any] = []
    curve: dict[str, list[Any]] = {name: [] for name in _CURVE}
    for each in rows:
        result = each["result"]
        changed, measured = (found[-1] if found else -1 for found in ([c["step"] for c in timeline], curve["steps"]))
        timeline += [change for change in result.get("timeline", ()) if change["step"] > changed]
        points = result.get("curve", {name: [] for name in _CURVE})
        fresh = [index for index, step in enumerate(points["steps"]) if step > measured]
        for name in _CURVE:
            curve[name] += [points[name][index] for index in fresh]
    return {"timeline": timeline, "curve": curve}


def _metric(rows: Sequence[Row], name: str) -> list[Any]:
    return [row["metrics"].get(name) for row in rows]


_BUILDERS: Mapping[str, Callable[[Row, Sequence[Row]], dict[str, Any]]] = {
    "basin_volume": _volumes,
    "head_plasticity": _plasticity,
    "taylor_diff": _taylor,
    "variant_losses": _variants,
}
