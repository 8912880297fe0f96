"""The sections of the page that belong to one analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from lightning_goldy.report.charts import CHARTS, Series
from lightning_goldy.report.continuations import continuations_html
from lightning_goldy.report.coupling_drifts import moved_html
from lightning_goldy.report.coupling_tables import coupling_tables_html
from lightning_goldy.report.descriptions import Description, description_of
from lightning_goldy.report.figures import Frame, figure_html, lines_html
from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.generations import generations_html
from lightning_goldy.report.history import RowHistory
from lightning_goldy.report.registry import ReportError, Row
from lightning_goldy.report.run import AnalysisRows

# Every frame of a slider is in the page, so their number decides its size.
_MOST_FRAMES = 40


def analysis_html(analysis: AnalysisRows, anchor: str) -> str:
    """The section of one analysis: words, figures, metrics over the steps, a table of the latest.

    Args:
        analysis: With at least one row.
        anchor: Identifier of the section in the page.

    Raises:
        ReportError: A row lacks what a figure needs; the message names file and line.
    """
    description = description_of(analysis.analysis)
    name = "" if analysis.name == analysis.analysis else f' <span class="name">{escape(analysis.name)}</span>'
    parts = [f'<section id="{escape(anchor)}"><h2>{escape(description.title)}{name}</h2>']
    parts += [f"<p>{escape(text)}</p>" for text in (description.measures, description.reading) if text]
    parts.append(_figures(analysis))
    parts.append(generations_html(analysis.rows[-1]))
    parts.append(continuations_html(analysis.rows[-1]))
    parts.append(moved_html(analysis.rows[-1]))
    parts.append(coupling_tables_html(analysis.rows[-1]))
    parts.append(_metric_lines(analysis.rows))
    parts.append(_metric_table(analysis.rows, description))
    return "\n".join([*filter(None, parts), "</section>"])


def table_html(header: Sequence[str], body: Sequence[Sequence[str]], footer: Sequence[str] = ()) -> str:
    """A table whose first column names its rows; the cells are HTML already.

    A column whose heading begins with ``#`` holds numbers.

    Example:
        >>> table_html(["metric", "#latest"], [["count", "3"]]).count('class="number"')
        2
    """
    numeric = [text.startswith("#") for text in header]
    marks = [' class="number"' if number else "" for number in numeric]

    def line(cells: Sequence[str]) -> str:
        rest = (f"<td{mark}>{cell}</td>" for mark, cell in zip(marks[1:], cells[1:], strict=True))
        return f'<tr><th scope="row">{cells[0]}</th>{"".join(rest)}</tr>'

    head = "".join(
        f'<th scope="col"{mark}>{text.removeprefix("#")}</th>' for mark, text in zip(marks, header, strict=True)
    )
    foot = f"<tfoot>{line(footer)}</tfoot>" if footer else ""
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(map(line, body))}</tbody>'
        f"{foot}</table></div>"
    )


def label_of(row: Row) -> str:
    """What the slider and the tables call a row.

    Example:
        >>> label_of({"step": 1200, "trigger": "end"}), label_of({"step": 40, "trigger": "step"})
        ('step 1,200 (end)', 'step 40')
    """
    return f"step {row['step']:,}" + ("" if row["trigger"] == "step" else f" ({row['trigger']})")


def _figures(analysis: AnalysisRows) -> str:
    names = CHARTS.names(analysis.analysis)
    if not names:
        return ""
    count = len(analysis.rows)
    shown = {round(place) for place in np.linspace(0, count - 1, min(count, _MOST_FRAMES))}
    frames: dict[str, list[Frame]] = {name: [] for name in names}
    earlier = RowHistory()
    for index, row in enumerate(analysis.rows):
        try:
            figures = CHARTS.draw(row, earlier.rows) if index in shown else {}
            earlier.add(row)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ReportError) else f"{type(error).__name__}: {error}"
            raise ReportError(f"{analysis.where(index)}: cannot be drawn: {reason}") from error
        for name, figure in figures.items():
            frames[name].append(Frame(label_of(row), figure))
    note = ""
    if len(shown) < count:
        note = (
            f'<p class="note">The figures show {len(shown)} of {count} results, evenly spaced; the lines show all.</p>'
        )
    return f'{note}<div class="figures">{"".join(figure_html(name, frames[name]) for name in names)}</div>'


def _metric_lines(rows: Sequence[Row]) -> str:
    charts = [lines_html(heading, series) for heading, series in _grouped_series(rows).items()]
    return f'<h3>Over the training</h3><div class="charts">{"".join(charts)}</div>' if charts else ""


def _grouped_series(rows: Sequence[Row]) -> dict[str, dict[str, Series]]:
    """Metrics measured at least twice; names that differ only after the last slash share a chart."""
    groups: dict[str, dict[str, Series]] = {}
    drawn: dict[str, Series] = {}
    for name in _metric_names(rows):
        points = [(row["step"], row["metrics"].get(name)) for row in rows]
        if sum(value is not None for _, value in points) < 2:
            continue
        steps, values = zip(*points, strict=True)
        drawn[name] = steps, values
    headings = [name.rpartition("/")[0] for name in drawn]
    for name, series in drawn.items():
        heading, _, label = name.rpartition("/")
        alone = not heading or headings.count(heading) == 1
        groups.setdefault(name if alone else heading, {})[name if alone else label] = series
    return groups


def _metric_table(rows: Sequence[Row], description: Description) -> str:
    first, latest = rows[0], rows[-1]
    names = _metric_names(rows)
    if not names:
        return ""
    meanings = any(description.meaning(name) for name in names)
    compared = (first,) if len(rows) > 1 else ()
    header = ["metric", *(f"#{label_of(row)}" for row in (*compared, latest)), *(["meaning"] if meanings else [])]
    body = []
    for name in names:
        values = [_cell(row["metrics"], name) for row in (*compared, latest)]
        body.append([escape(name), *values, *([escape(description.meaning(name))] if meanings else [])])
    return f"<h3>Latest numbers</h3>{table_html([escape(text) for text in header], body)}"


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def _cell(metrics: Mapping[str, float | None], name: str) -> str:
    return escape(format_number(metrics.get(name)))
