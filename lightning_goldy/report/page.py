"""A run directory as one HTML file that needs nothing else: no server, no network."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lightning_goldy.core.store import atomic_write
from lightning_goldy.report.builders import Lines, Series, lines
from lightning_goldy.report.descriptions import Description, description_of
from lightning_goldy.report.figures import (
    TABLES,
    THEMES,
    Entry,
    Figure,
    ReportError,
    Row,
    figures_of,
    plain_columns,
    range_params,
    widest_ranges,
)
from lightning_goldy.report.formatting import (
    MISSING,
    format_bytes,
    format_number,
    format_percent,
    format_seconds,
    remarks,
    script_json,
    table_html,
)
from lightning_goldy.report.rendering import page_script, require_drawing
from lightning_goldy.report.run import AnalysisRows, Run, TrainingCurves, read_run


@dataclass(frozen=True)
class Frame:
    """A figure at one step.

    Args:
        label: Shown beside the slider, for example ``step 40``.
        figure: The figure, or a sentence that says why there is none.
    """

    label: str
    figure: Figure | str


def figure_html(heading: str, frames: Sequence[Frame]) -> str:
    """A figure of the page; with several frames it has a slider that starts at the last.

    Args:
        heading: Text above the figure.
        frames: At least one, in the order of the slider.

    Example:
        >>> from lightning_goldy.report.builders import lines
        >>> page = figure_html("Loss <nats>", [Frame("step 1", lines({"loss": ([1], [2.0])}))])
        >>> "<h4>Loss &lt;nats&gt;</h4>" in page, "<input" in page
        (True, False)
    """
    figures = [frame.figure for frame in frames if isinstance(frame.figure, Figure)]
    if not figures:
        return f'<figure><h4>{escape(heading)}</h4><p class="note">{escape(str(frames[-1].figure))}</p></figure>'
    captions = [frame.figure.caption if isinstance(frame.figure, Figure) else frame.figure for frame in frames]
    last, slider = len(frames) - 1, ""
    if last:
        slider = (
            f'<label class="steps"><span>Analysis</span><input type="range" min="0" max="{last}" value="{last}" '
            f'step="1" aria-label="Step of {escape(heading)}"><output>{escape(frames[-1].label)}</output></label>'
        )
    caption = f"<figcaption>{escape(captions[-1])}</figcaption>" if any(captions) else ""
    return (
        f'<figure class="chart"><h4>{escape(heading)}</h4>{slider}<div class="plot"></div>{caption}'
        f'<script type="application/json">{script_json(_packed(frames))}</script></figure>'
    )


def _packed(frames: Sequence[Frame]) -> dict[str, Any]:
    """What the script needs: charts, columns that most frames have in common, and what is each frame's own."""
    # One range of colours for all steps, so that moving the slider compares.
    ranges = widest_ranges(frame.figure for frame in frames if isinstance(frame.figure, Figure))
    specs: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    packed = []
    for frame in frames:
        content: dict[str, Any] = {"label": frame.label}
        packed.append(content)
        if isinstance(frame.figure, str):
            content["none"] = frame.figure
            continue
        spec = frame.figure.bare()
        if spec not in specs:
            specs.append(spec)
        content |= {"caption": frame.figure.caption, "spec": specs.index(spec), "data": {}}
        for name, columns in frame.figure.data.items():
            own = {column: _short(values) for column, values in plain_columns(columns).items()}
            common = shared.setdefault(name, own)
            # 0 stands for a column that is the same as in the first frame.
            content["data"][name] = {
                column: 0 if common.get(column) == values else values for column, values in own.items()
            }
    return {"specs": specs, "params": range_params(ranges), "shared": shared, "frames": packed}


def _short(values: Sequence[Any]) -> Sequence[Any] | Mapping[str, Any]:
    """A column of texts that repeat as the texts and their places."""
    if not values or not isinstance(values[0], str):
        return values
    places = {text: place for place, text in enumerate(dict.fromkeys(values))}
    if len(places) > len(values) / 2:
        return values
    return {"of": list(places), "at": [places[text] for text in values]}


# Every frame of a slider is in the page, so their number decides its size.
_MOST_FRAMES = 40
# Points of a line over the training.
_MOST_POINTS = 400


def write_report(run_directory: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    r"""Writes one self-contained page about a run: training curves, every analysis, what each cost.

    Args:
        run_directory: Log directory of the run, its ``goldy`` folder, or a directory with several runs, of which the
            one with the newest results is taken (the page says so).
        output: Target file; by default ``report.html`` in the log directory of the run.

    Returns:
        The file, written whole or not at all.

    Raises:
        ReportError: The directory is missing, holds no analyses, or has a malformed file; the message names the place.
        ImportError: altair or vl-convert is not installed.

    Example:
        >>> import json, tempfile
        >>> row = {"format": 2, "analysis": "tiny", "name": "tiny", "step": 1, "epoch": 0, "trigger": "end"}
        >>> row |= {"metrics": {"count": 3}, "result": {}, "headline": "", "cost": {"seconds": 0.1}, "files": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = atomic_write(f"{folder}/goldy/tiny/results.jsonl", json.dumps(row) + "\n")
        ...     write_report(folder).name
        'report.html'
    """
    require_drawing()
    run = read_run(run_directory)
    target = run.directory / "report.html" if output is None else Path(output)
    if target.is_dir():
        raise ReportError(f"output {target} is a directory; give the file to write, such as {target / 'report.html'}")
    body = _body(run)
    page = string.Template(_asset("page.html")).substitute(
        title=escape(f"{run.directory.name}: what did this finetune change?"),
        run=escape(f"{run.directory.parent.name}/{run.directory.name}"),
        style=_asset("style.css"),
        body=body,
        themes=script_json(THEMES),
        drawing=page_script(),
        script=_asset("figures.js"),
    )
    # JSON can hold half a surrogate pair, which UTF-8 cannot.
    return atomic_write(target, page.encode("utf-8", "replace"))


def _asset(name: str) -> str:
    return resources.files("lightning_goldy.report").joinpath(name).read_text(encoding="utf-8")


def _body(run: Run) -> str:
    sections = {"training": ("Training", _training(run.training))}
    for index, analysis in enumerate(run.analyses, 1):
        anchor = f"analysis-{index}"
        title = description_of(analysis.analysis).title
        if analysis.name != analysis.analysis:
            title = f"{title} ({analysis.name})"
        sections[anchor] = title, analysis_html(analysis, anchor)
    sections["cost"] = "What the analyses cost", _cost(run)
    if run.settings:
        files = "".join(
            f"<details><summary><code>{escape(name)}</code></summary><pre>{escape(text)}</pre></details>"
            for name, text in run.settings.items()
        )
        page = f'<section id="settings"><h2>Settings of the run</h2>{files}</section>'
        sections["settings"] = "Settings of the run", page
    contents = "".join(f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, (title, _) in sections.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    parts = (_summary(run), notes, f'<nav aria-label="Contents"><ul>{contents}</ul></nav>')
    return "\n".join([*parts, *(section for _, section in sections.values())])


def _summary(run: Run) -> str:
    seconds = sum(_total(analysis, "seconds") or 0.0 for analysis in run.analyses)
    share = f"{format_percent(seconds / run.training.seconds)} of the run" if run.training.seconds else ""
    results = sum(len(analysis.rows) for analysis in run.analyses)
    last = max(row["step"] for analysis in run.analyses for row in analysis.rows)
    steps = max([last, *(curve.steps[-1] for curve in run.training.curves.values())])
    facts = (
        ("Run", run.directory.name, ""),
        ("Training steps", format_number(steps), f"last analysis at step {last:,}"),
        ("Model", run.model_class or MISSING, "" if run.model_class else "no tensor file names it"),
        ("Analyses", format_number(len(run.analyses)), f"{results:,} results"),
        ("Time of the analyses", format_seconds(seconds), share),
    )
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="summary">{cells}</dl>'


def _training(training: TrainingCurves) -> str:
    charts = [
        _lines_html(quantity, {tag: (curve.steps, curve.values) for tag, curve in curves.items()})
        for quantity, curves in training.by_quantity().items()
    ]
    content = f'<div class="charts">{"".join(charts)}</div>'
    if not charts:
        content = "<p>No curves: the run directory has neither TensorBoard event files nor a metrics.csv.</p>"
    return f'<section id="training"><h2>Training</h2>{content}</section>'


def _cost(run: Run) -> str:
    totals = {analysis.name: _total(analysis, "seconds") for analysis in run.analyses}
    everything = sum(seconds or 0.0 for seconds in totals.values())
    passes = {"forwards": "#forward", "backwards": "#backward"}
    old = any(_costs(analysis, "model_evaluations") for analysis in run.analyses)
    if old:
        passes["model_evaluations"] = "#evaluations"
    body = []
    for analysis in run.analyses:
        seconds, count = totals[analysis.name], len(analysis.rows)
        times = (seconds, None if seconds is None else seconds / count)
        counts = [format_number(_total(analysis, name)) for name in passes]
        peak = format_bytes(max(_costs(analysis, "peak_memory_bytes"), default=None))
        shares = [_share(seconds, whole) for whole in (everything, run.training.seconds)]
        body.append([escape(analysis.name), format_number(count), *map(format_seconds, times), *counts, peak, *shares])
    ends = ["#peak memory", "#of all analyses", "#of the run"]
    header = ["analysis", "#times", "#time", "#each", *passes.values(), *ends]
    blank = [""] * (len(passes) + 3)
    footer = ["total", "", format_seconds(everything), *blank, _share(everything, run.training.seconds)]
    reading = "Forward and backward are passes of the model, each counted once per sample. "
    if old:
        reading += "Evaluations are what rows of an older format counted, in a unit that differs between analyses. "
    if run.training.seconds:
        reading += f"The run took {format_seconds(run.training.seconds)} from its first to its last logged scalar."
    else:
        reading += "How long the run took is unknown: there are no TensorBoard event files."
    return (
        f'<section id="cost"><h2>What the analyses cost</h2><p>{escape(reading)}</p>{table_html(header, body, footer)}'
        "</section>"
    )


def _costs(analysis: AnalysisRows, name: str) -> Sequence[float]:
    return [row["cost"][name] for row in analysis.rows if row["cost"].get(name) is not None]


def _total(analysis: AnalysisRows, name: str) -> float | None:
    costs = _costs(analysis, name)
    return sum(costs) if costs else None


def _share(part: float | None, whole: float | None) -> str:
    return format_percent(part / whole) if part is not None and whole else MISSING


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
    parts += [f'<p class="note">{escape(text)}</p>' for text in remarks(analysis.rows[-1])]
    parts.append(_figures(analysis))
    parts += [table(analysis.rows[-1]) for table in TABLES]
    charts = [_lines_html(heading, series) for heading, series in _grouped_series(analysis.rows).items()]
    parts.append(f'<h3>Over the training</h3><div class="charts">{"".join(charts)}</div>' if charts else "")
    parts.append(_metric_table(analysis.rows, description))
    return "\n".join([*filter(None, parts), "</section>"])


def label_of(row: Row) -> str:
    """What the slider and the tables call a row.

    Example:
        >>> label_of({"step": 1200, "trigger": "end"}), label_of({"step": 40, "trigger": "step"})
        ('step 1,200 (end)', 'step 40')
    """
    words = [row["trigger"]] if row["trigger"] != "step" else []
    if row.get("weights") in ("averaged", "replaced"):
        words.append(f"{row['weights']} weights")
    return f"step {row['step']:,}" + (f" ({', '.join(words)})" if words else "")


def _figures(analysis: AnalysisRows) -> str:
    count = len(analysis.rows)
    shown = _spaced(count, _MOST_FRAMES)
    parts = [_figure(analysis, entry, shown) for entry in figures_of(analysis.analysis)]
    if not any(parts):
        return ""
    note = ""
    if len(shown) < count:
        note = (
            f'<p class="note">The figures show {len(shown)} of {count} results, evenly spaced; '
            f"the lines show {min(count, _MOST_POINTS)}.</p>"
        )
    return f'{note}<div class="figures">{"".join(parts)}</div>'


def _figure(analysis: AnalysisRows, entry: Entry, shown: Sequence[int]) -> str:
    frames = []
    for index in shown if entry.over == "step" else shown[-1:]:
        row = analysis.rows[index]
        try:
            drawn = entry.draw([row] if entry.over == "step" else analysis.rows)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            where = analysis.where(index) if entry.over == "step" else f"{analysis.path}"
            raise ReportError(f"{where}: cannot be drawn: {error}") from error
        if drawn is not None:
            frames.append(Frame(label_of(row), drawn))
    return figure_html(entry.heading, frames) if frames else ""


def _grouped_series(rows: Sequence[Row]) -> dict[str, dict[str, Series]]:
    """Metrics measured at least twice; names that differ only after the last slash share a chart.

    Of more rows than a line can show, so many evenly spaced.
    """
    groups: dict[str, dict[str, Series]] = {}
    rows = [rows[index] for index in _spaced(len(rows), _MOST_POINTS)]
    steps = tuple(row["step"] for row in rows)
    courses = {name: tuple(row["metrics"].get(name) for row in rows) for name in _metric_names(rows)}
    drawn = {name: (steps, values) for name, values in courses.items() if len(values) - values.count(None) >= 2}
    headings = [name.rpartition("/")[0] for name in drawn]
    for name, series in drawn.items():
        heading, _, label = name.rpartition("/")
        alone = not heading or headings.count(heading) == 1
        groups.setdefault(name if alone else heading, {})[name if alone else label] = series
    return groups


def _spaced(count: int, most: int) -> list[int]:
    """At most so many places of ``count``, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


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
        values = [escape(format_number(row["metrics"].get(name))) for row in (*compared, latest)]
        body.append([escape(name), *values, *([escape(description.meaning(name))] if meanings else [])])
    return f"<h3>Latest numbers</h3>{table_html([escape(text) for text in header], body)}"


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def _lines_html(heading: str, series: Mapping[str, Series]) -> str:
    return figure_html(heading, [Frame("", lines(series, Lines(x="step", height=190)))])
