"""A run directory as one HTML file that needs nothing else: no server, no network."""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from lightning_goldy.core.store import atomic_write
from lightning_goldy.report.curves import TrainingCurves
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import lines_html
from lightning_goldy.report.formatting import MISSING, format_bytes, format_number, format_percent, format_seconds
from lightning_goldy.report.registry import ReportError, require
from lightning_goldy.report.run import AnalysisRows, Run, read_run
from lightning_goldy.report.sections import analysis_html, table_html


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
        ImportError: plotly is not installed.

    Example:
        >>> import json, tempfile
        >>> row = {"format": 2, "analysis": "tiny", "name": "tiny", "step": 1, "epoch": 0, "trigger": "end"}
        >>> row |= {"metrics": {"count": 3}, "result": {}, "headline": "", "cost": {"seconds": 0.1}, "files": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = atomic_write(f"{folder}/goldy/tiny/results.jsonl", json.dumps(row) + "\n")
        ...     write_report(folder).name
        'report.html'
    """
    plotly_script = require("plotly.offline").get_plotlyjs()
    run = read_run(run_directory)
    target = run.directory / "report.html" if output is None else Path(output)
    if target.is_dir():
        raise ReportError(f"output {target} is a directory; give the file to write, such as {target / 'report.html'}")
    page = string.Template(_asset("page.html")).substitute(
        title=escape(f"{run.directory.name}: what did this finetune change?"),
        run=escape(f"{run.directory.parent.name}/{run.directory.name}"),
        style=_asset("style.css"),
        body=_body(run),
        plotly=plotly_script,
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
        sections["settings"] = "Settings of the run", _settings(run)
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
    charts = []
    for quantity, curves in training.by_quantity().items():
        series = {tag: (curve.steps, curve.values) for tag, curve in curves.items()}
        charts.append(lines_html(quantity, series))
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
        body.append(
            [
                escape(analysis.name),
                format_number(count),
                format_seconds(seconds),
                format_seconds(None if seconds is None else seconds / count),
                *(format_number(_total(analysis, name)) for name in passes),
                format_bytes(max(_costs(analysis, "peak_memory_bytes"), default=None)),
                _share(seconds, everything),
                _share(seconds, run.training.seconds),
            ]
        )
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


def _settings(run: Run) -> str:
    files = "".join(
        f"<details><summary><code>{escape(name)}</code></summary><pre>{escape(text)}</pre></details>"
        for name, text in run.settings.items()
    )
    return f'<section id="settings"><h2>Settings of the run</h2>{files}</section>'


def _costs(analysis: AnalysisRows, name: str) -> Sequence[float]:
    return [row["cost"][name] for row in analysis.rows if row["cost"].get(name) is not None]


def _total(analysis: AnalysisRows, name: str) -> float | None:
    costs = _costs(analysis, name)
    return sum(costs) if costs else None


def _share(part: float | None, whole: float | None) -> str:
    return format_percent(part / whole) if part is not None and whole else MISSING
