"""A run directory as one HTML file that needs nothing else: no server, no network."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_goldy import __version__
from lightning_goldy.core.files import finite
from lightning_goldy.core.store import atomic_write
from lightning_goldy.report import sentences as sentences  # what answers are made of, by analysis
from lightning_goldy.report.answers import QUESTIONS, Answer, Bar, Waiting, answers_of, question_of, small_print
from lightning_goldy.report.builders import Lines, Series, lines
from lightning_goldy.report.descriptions import (
    DOUBTS,
    Description,
    description_of,
    documentation,
    page_of,
    section_of,
)
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
    percent,
    prose_html,
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


def figure_html(heading: str, frames: Sequence[Frame], note: str = "") -> str:
    """A figure of the page; with several frames it has a slider that starts at the last.

    Args:
        heading: Text above the figure.
        frames: At least one, in the order of the slider.
        note: Beside the heading, in small type.

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
    small = f' <small class="soft">{escape(note)}</small>' if note else ""
    caption = f"<figcaption>{escape(captions[-1])}</figcaption>" if any(captions) else ""
    return (
        f'<figure class="chart"><h4>{escape(heading)}{small}</h4>{slider}<div class="plot"></div>{caption}'
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


# Figures that an analysis shows at once; the others are folded under its details.
_MOST_FIGURES = 3
# Every frame of a slider is in the page, so their number decides its size.
_MOST_FRAMES = 40
# A model of many layers and heads has large frames, of which fewer are kept.
_MOST_BYTES = 400_000
# Steps without numbers that are listed.
_MOST_NAMED = 8
# Analyses whose time the console names.
_MOST_NAMED_COSTS = 3
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
    title = f"{run.directory.name}: what did this finetune change?"
    return atomic_write(target, page_html(title, f"{run.directory.parent.name}/{run.directory.name}", _body(run)))


def page_html(title: str, name: str, body: str) -> bytes:
    """A whole page around its body, with everything that it needs.

    Args:
        title: Of the window, as text.
        name: Below the heading, as text.
        body: HTML.

    Raises:
        ImportError: altair or vl-convert is not installed.
    """
    require_drawing()
    page = string.Template(_asset("page.html")).substitute(
        title=escape(title),
        run=escape(name),
        style=_asset("style.css"),
        body=body,
        themes=script_json(THEMES),
        drawing=page_script(),
        script=_asset("figures.js"),
    )
    # JSON can hold half a surrogate pair, which UTF-8 cannot.
    return page.encode("utf-8", "replace")


def answers_json(run_directory: str | os.PathLike[str]) -> str:
    """The answers to the five questions, and the latest headline and metrics of every analysis, as JSON.

    Args:
        run_directory: As :func:`write_report` takes it.

    Returns:
        An object with ``run``, ``answers`` (question, sentence, interval, null, doubts, trust) and ``analyses`` (name,
        analysis, step, headline, metrics; a metric that is not finite is null).

    Raises:
        ReportError: As :func:`write_report` does.
    """
    run = read_run(run_directory)
    analyses = [
        {
            "name": analysis.name,
            **{field: analysis.rows[-1].get(field) for field in ("analysis", "step", "trigger", "headline")},
            "metrics": {name: finite(value) for name, value in analysis.rows[-1]["metrics"].items()},
        }
        for analysis in run.analyses
    ]
    answers = [answer.to_json() for answer in answers_of_run(run)]
    told = {"run": str(run.directory), "version": __version__, "answers": answers, "analyses": analyses}
    return json.dumps(told, indent=2, allow_nan=False)


def answers_of_run(run: Run) -> tuple[Answer, ...]:
    """The five questions, answered by a run."""
    analyses = ((analysis.name, analysis.analysis, analysis.rows) for analysis in run.analyses)
    return answers_of(analyses, Waiting(run.waiting, run.last_step))


def _asset(name: str) -> str:
    return resources.files("lightning_goldy.report").joinpath(name).read_text(encoding="utf-8")


def _body(run: Run) -> str:
    sections = {}
    anchors = {analysis.name: f"analysis-{index}" for index, analysis in enumerate(run.analyses, 1)}
    answers = answers_of_run(run)
    for analysis in run.analyses:
        anchor = anchors[analysis.name]
        title = description_of(analysis.analysis).title
        if analysis.name != analysis.analysis:
            title = f"{title} ({analysis.name})"
        sections[anchor] = title, analysis_html(analysis, anchor)
    sections["training"] = "Training", _training(run.training)
    if methods := methods_html(run):
        sections["methods"] = "Methods", methods
    sections["cost"] = "What the analyses cost", _cost(run)
    if run.settings:
        files = "".join(
            f"<details><summary><code>{escape(name)}</code></summary><pre>{escape(text)}</pre></details>"
            for name, text in run.settings.items()
        )
        page = f'<section id="settings"><h2>Settings of the run</h2>{files}</section>'
        sections["settings"] = "Settings of the run", page
    contents = _contents(run, {anchor: title for anchor, (title, _) in sections.items()})
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    doubted = [name for name, anchor in anchors.items() if f'id="{anchor}-doubt"' in sections[anchor][1]]
    parts = (
        answers_html(answers, anchors, doubted),
        _summary(run),
        notes,
        f'<nav aria-label="Contents">{contents}</nav>',
    )
    return "\n".join([*parts, *(section for _, section in sections.values())])


def _contents(run: Run, titles: Mapping[str, str]) -> str:
    """Links to the sections, those of analyses under the question that they serve."""
    asked: dict[str, list[str]] = {question.title: [] for question in QUESTIONS.values()}
    for index, analysis in enumerate(run.analyses, 1):
        question = question_of(analysis.analysis)
        heading = QUESTIONS[question].title if question else "Other analyses"
        asked.setdefault(heading, []).append(f"analysis-{index}")
    listed = {anchor for anchors in asked.values() for anchor in anchors}
    asked["The run"] = [anchor for anchor in titles if anchor not in listed]
    groups = []
    for heading, anchors in asked.items():
        links = "".join(f'<li><a href="#{anchor}">{escape(titles[anchor])}</a></li>' for anchor in anchors)
        groups += [f'<div><p class="group">{escape(heading)}</p><ul>{links}</ul></div>'] if links else []
    return "".join(groups)


def answers_html(answers: Sequence[Answer], anchors: Mapping[str, str], doubted: Collection[str] = ()) -> str:
    """The answers, each with its interval, its null, its trust and a picture of its number.

    Args:
        answers: In the order of the page.
        anchors: Name of an instance to the identifier of its section.
        doubted: Names of the instances whose sections say when not to believe them.

    Example:
        >>> page = answers_html(answers_of([]), {})
        >>> page.count("Not measured"), page.count('class="answer"')
        (5, 5)
    """
    cards = []
    for answer in answers:
        finding = answer.finding
        small = [*small_print(finding), *([f"Step {answer.step:,}."] if answer.step is not None else [])]
        told = _unbroken(escape(" ".join(small)))
        links = [(name, name) for name in (answer.analysis, *answer.more) if name in anchors]
        more = ", ".join(f'<a href="#{anchors[name]}">{escape(label)}</a>' for name, label in links)
        if answer.analysis in doubted:
            more += f'; <a href="#{anchors[answer.analysis]}-doubt">when not to believe it</a>'
        picture = _bar_svg(finding.bar) if finding.bar else _course_svg(answer.course)
        mark = answer.trust.replace(" ", "-")
        cards.append(
            f'<div class="answer"><div class="asked"><h3>{escape(answer.title)}</h3>'
            f'<span class="trust {mark}">{escape(answer.trust)}</span></div>'
            f'<div class="told"><p class="sentence">{_unbroken(escape(finding.sentence))}</p>'
            f'<p class="small">{told}{f" See {more}." if more else ""}</p></div>'
            f'<div class="picture">{picture}</div></div>'
        )
    key = '<p class="small key">Pictures: the number, its 95 % interval (thin line) and its null (dashed).</p>'
    cards += [key] if any(answer.finding.bar for answer in answers) else []
    return f'<section id="answers" aria-label="Answers">{"".join(cards)}</section>'


def _unbroken(text: str) -> str:
    """No line ends between a number and its percentage sign."""
    return text.replace(" %", "&nbsp;%")


def _bar_svg(bar: Bar) -> str:
    """A share as a bar from 0 to 1, its interval as a line and its null as a tick."""

    def at(share: float) -> str:
        return f"{2 + 156 * min(1.0, max(0.0, share)):.1f}"

    words = [f"{format_percent(bar.value)}"]
    parts = ['<rect class="ground" x="2" y="10" width="156" height="12"/>']
    parts.append(f'<rect class="value" x="2" y="10" width="{float(at(bar.value)) - 2:.1f}" height="12"/>')
    if bar.low is not None and bar.high is not None:
        low, high = at(bar.low), at(bar.high)
        parts.append(f'<path class="interval" d="M{low} 16H{high}M{low} 6v20M{high} 6v20"/>')
        words.append(f"interval {format_percent(bar.low)} to {format_percent(bar.high)}")
    if bar.null is not None:
        parts.append(f'<path class="null" d="M{at(bar.null)} 5v22"/>')
        words.append(f"null {format_percent(bar.null)}")
    # What lies outside is drawn at the edge, which an arrow tells.
    known = [end for end in (bar.value, bar.low, bar.high) if end is not None]
    ends = ("\u2190 0" if min(known) < 0 else "0", "100 % \u2192" if max(known) > 1 else "100 %")
    return (
        f'<svg viewBox="0 0 160 44" role="img" aria-label="{escape(", ".join(words))}">{"".join(parts)}'
        f'<text x="2" y="40">{ends[0]}</text><text x="158" y="40" text-anchor="end">{ends[1]}</text></svg>'
    )


def _course_svg(course: Sequence[tuple[int, float]]) -> str:
    """The course of a number over the run; nothing for fewer than three points."""
    if len(course) < 3:
        return ""
    course = [course[place] for place in _spaced(len(course), 60)]
    steps, values = ([point[side] for point in course] for side in (0, 1))
    width, height = max(steps) - min(steps) or 1, max(values) - min(values) or 1.0
    points = " ".join(
        f"{2 + 156 * (step - min(steps)) / width:.1f},{28 - 24 * (value - min(values)) / height:.1f}"
        for step, value in course
    )
    words = f"from {format_number(values[0])} at step {steps[0]:,} to {format_number(values[-1])} at step {steps[-1]:,}"
    ends = f'<text x="2" y="40">{steps[0]:,}</text><text x="158" y="40" text-anchor="end">step {steps[-1]:,}</text>'
    return f'<svg viewBox="0 0 160 44" role="img" aria-label="{words}"><polyline points="{points}"/>{ends}</svg>'


def methods_html(run: Run) -> str:
    """How the numbers were obtained, as a paragraph with its sources that can be pasted into a paper."""
    said: dict[str, str] = {}
    for analysis in run.analyses:
        method = description_of(analysis.analysis).method
        if method:
            said.setdefault(analysis.analysis, method)
    if not said:
        return ""
    text = f"We analysed the finetune with lightning_goldy {__version__}. {' '.join(said.values())}"
    return f'<section id="methods"><h2>Methods</h2><p class="methods">{escape(text)}</p></section>'


def _summary(run: Run) -> str:
    seconds = sum(_total(analysis, "seconds") or 0.0 for analysis in run.analyses)
    share = f"{format_percent(seconds / run.training.seconds)} of the run" if run.training.seconds else ""
    results = sum(len(analysis.rows) for analysis in run.analyses)
    last = max(row["step"] for analysis in run.analyses for row in analysis.rows)
    steps = run.last_step
    base, data = _named_settings(run.settings)
    size = _size(run)
    kind = "adapters on the base" if (run.model_class or "").startswith("Peft") else ""
    facts = (
        ("Run", run.directory.name, f"data: {data}" if data else ""),
        ("Training steps", format_number(steps), f"last analysis at step {last:,}"),
        ("Model", run.model_class or MISSING, kind if run.model_class else "no tensor file names it"),
        ("Base", base or MISSING, "" if base else "the settings do not name it"),
        ("Trained parameters", format_number(size), "" if size else "no analysis counts them"),
        ("Analyses", format_number(len(run.analyses)), f"{results:,} results"),
        ("Time of the analyses", format_seconds(seconds), share),
    )
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="summary">{cells}</dl>'


def _named_settings(settings: Mapping[str, str]) -> tuple[str, str]:
    """The base model and the data, as far as the files of settings name them."""
    base = data = ""
    for text in settings.values():
        try:
            # Everything is text to this loader, whatever its tag.
            told = yaml.load(text, Loader=yaml.BaseLoader)
        except yaml.YAMLError:
            continue
        if not isinstance(told, Mapping):
            continue
        model, module = told.get("model"), told.get("data")
        options = model.get("init_args") if isinstance(model, Mapping) else None
        model = options.get("model", model) if isinstance(options, Mapping) else model
        if isinstance(model, Mapping):
            model = model.get("class_path") or model.get("model_type") or ""
        model, module = ("" if value in ("null", "~") else value for value in (model, module))
        base = base or "/".join(Path(str(model or told.get("goldy/base") or "")).parts[-2:])
        name = module.get("class_path") if isinstance(module, Mapping) else module
        data = data or str(name or "").rpartition(".")[2] or str(told.get("goldy/data") or "")
    return base, data


def _size(run: Run) -> int | None:
    """How many parameters train, by an analysis that lists all their tensors."""
    for wanted in ("golden_snapshot", "change_attribution", "parameter_distribution"):
        for analysis in run.analyses:
            tensors = analysis.rows[-1]["result"].get("tensors")
            if analysis.analysis == wanted and isinstance(tensors, list):
                counts = [tensor.get("numel") for tensor in tensors if isinstance(tensor, Mapping)]
                known = [count for count in counts if isinstance(count, int)]
                if known and len(known) == len(tensors):
                    return sum(known)
    return None


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


def costs_in_words(run: Run) -> str:
    """What the analyses took, in all and those that took longest, in one line for the console.

    Example:
        >>> row = {"step": 4, "cost": {"seconds": 90.0}}
        >>> rows = AnalysisRows("taylor", "taylor_diff", Path("results.jsonl"), (row,), (1,))
        >>> costs_in_words(Run(Path("run"), (rows,), TrainingCurves({}, 600.0, ()), {}, None, ()))
        'The analyses took 1 min 30 s, 15 % of the run: taylor 1 min 30 s.'
    """
    seconds = {analysis.name: _total(analysis, "seconds") or 0.0 for analysis in run.analyses}
    whole = sum(seconds.values())
    share = f", {percent(whole / run.training.seconds)} of the run" if run.training.seconds else ""
    most = sorted(seconds, key=lambda name: -seconds[name])[:_MOST_NAMED_COSTS]
    told = [f"{name} {format_seconds(seconds[name])}" for name in most]
    if len(most) < len(seconds):
        rest = format_seconds(whole - sum(seconds[name] for name in most))
        told.append(f"{len(seconds) - len(most)} other{'s' if len(seconds) - len(most) > 1 else ''} {rest}")
    return f"The analyses took {format_seconds(whole)}{share}: {', '.join(told)}."


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
    parts.append(reference_html(page_of(analysis.analysis), anchor))
    if lost := [row for row in analysis.rows if row["result"].get("undefined")]:
        steps = ", ".join(f"{row['step']:,}" for row in lost[:_MOST_NAMED]) + (", ..." if lost[_MOST_NAMED:] else "")
        told = f"Undefined at step {steps}: {lost[-1]['result']['undefined']}. Figures and numbers are of other steps."
        parts.append(f'<p class="note">{escape(told)}</p>')
        analysis = analysis.defined()
        if not analysis.rows:
            return "\n".join([*filter(None, parts), "</section>"])
    parts += [f'<p class="note">{escape(text)}</p>' for text in remarks(analysis.rows[-1])]
    shown, folded = _figures(analysis)
    parts.append(shown)
    parts += [table(analysis.rows[-1]) for table in TABLES]
    series, constant = _told_apart(_grouped_series(analysis.rows))
    charts = [_lines_html(heading, drawn) for heading, drawn in series.items()]
    details = [folded, f'<h3>Over the training</h3><div class="charts">{"".join(charts)}</div>' if charts else ""]
    if constant:
        told = ", ".join(f"{name} ({format_number(value)})" for name, value in constant.items())
        details.append(f'<p class="note">The same at every step: {escape(told)}.</p>')
    details.append(_metric_table(analysis.rows, description))
    content = "\n".join(filter(None, details))
    if content:
        count = len(_metric_names(analysis.rows))
        summary = f"Details: {count} metric{'s' if count != 1 else ''} at {len(analysis.rows)} "
        summary += "steps" if len(analysis.rows) != 1 else "step"
        parts.append(f'<details class="more"><summary>{summary}</summary>{content}</details>')
    return "\n".join([*filter(None, parts), "</section>"])


def reference_html(page: str, anchor: str) -> str:
    """How an analysis is defined and when not to believe it, in the documentation's words, with links to its pages.

    The words are on the page, which needs nothing from outside; links are there where the documentation has an address.

    Args:
        page: Of the documentation, with the anchor of a heading where it defines several analyses; or nothing.
        anchor: Identifier of the analysis's section, which begins those of the two parts.

    Raises:
        ReportError: The address of the documentation that the environment states is none.
    """
    name, _, heading = page.partition("#")
    address = f"{documentation()}/{name.removesuffix('.md')}/" if documentation() else ""
    folded = []
    for title, what, of in (("Definition", "definition", heading), ("When not to believe it", "doubt", DOUBTS)):
        text = section_of(name, of) if name else ""
        link = f"{address}#{of}" if of else address
        more = (
            f'<p><a href="{escape(link)}" rel="noopener">{escape(name)} in the documentation</a></p>' if address else ""
        )
        if text:
            folded.append(
                f'<details class="told" id="{escape(anchor)}-{what}"><summary>{title}</summary>{prose_html(text)}{more}'
                "</details>"
            )
    return "".join(folded)


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


def _figures(analysis: AnalysisRows) -> tuple[str, str]:
    """The figures that carry the answer, and those that are folded."""
    count = len(analysis.rows)
    shown = _spaced(count, _MOST_FRAMES)
    parts = [part for entry in figures_of(analysis.analysis) if (part := _figure(analysis, entry, shown))]
    if not parts:
        return "", ""
    note = ""
    if len(shown) < count:
        note = (
            f'<p class="note">The figures show {len(shown)} of {count} results, evenly spaced; '
            f"the lines show {min(count, _MOST_POINTS)}.</p>"
        )
    first, rest = parts[:_MOST_FIGURES], parts[_MOST_FIGURES:]
    folded = f'<div class="figures">{"".join(rest)}</div>' if rest else ""
    return f'{note}<div class="figures">{"".join(first)}</div>', folded


def _figure(analysis: AnalysisRows, entry: Entry, shown: Sequence[int]) -> str:
    frames: list[Frame] = []
    kept = places = list(shown if entry.over == "step" else shown[-1:])
    # The last first: its size tells how many there is room for.
    for index in reversed(places):
        if index not in kept:
            continue
        row = analysis.rows[index]
        try:
            drawn = entry.draw([row] if entry.over == "step" else analysis.rows)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            where = analysis.where(index) if entry.over == "step" else f"{analysis.path}"
            raise ReportError(f"{where}: cannot be drawn: {error}") from error
        if isinstance(drawn, Figure) and _has_no_course(entry, drawn):
            drawn = f"One step has no course to draw. {drawn.caption[:1].upper()}{drawn.caption[1:]}".strip()
        if drawn is not None:
            frames.append(Frame(label_of(row), drawn))
            if len(frames) == 1:
                room = max(2, _MOST_BYTES // len(script_json(_packed(frames))))
                kept = [places[place] for place in _spaced(len(places), room)]
    frames.reverse()
    note = f"{len(frames)} of {len(analysis.rows)} steps" if len(kept) < len(places) else ""
    return figure_html(entry.heading, frames, note) if frames else ""


def _has_no_course(entry: Entry, figure: Figure) -> bool:
    """Whether lines over the run have one point each; somebody else's figures are drawn as they are."""
    if entry.over != "run" or not entry.function.__module__.startswith("lightning_goldy."):
        return False
    tables = [columns for columns in figure.data.values() if "line" in columns and "x" in columns]
    return len(tables) == len(figure.data) > 0 and all(len(set(columns["x"])) < 2 for columns in tables)


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


def _told_apart(
    groups: Mapping[str, Mapping[str, Series]],
) -> tuple[dict[str, dict[str, Series]], dict[str, float | None]]:
    """Series that move, by heading, and the value of those that are the same at every step."""
    moving: dict[str, dict[str, Series]] = {}
    constant: dict[str, float | None] = {}
    for heading, series in groups.items():
        for label, (steps, values) in series.items():
            if len(set(values)) == 1:
                constant[label if label == heading else f"{heading}/{label}"] = values[0]
            else:
                moving.setdefault(heading, {})[label] = (steps, values)
    return moving, constant


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
        meaning = escape(description.meaning(name))
        body.append([escape(name), *values, *([meaning] if meanings else [])])
    return f"<h3>Latest numbers</h3>{table_html([escape(text) for text in header], body)}"


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def _lines_html(heading: str, series: Mapping[str, Series]) -> str:
    return figure_html(heading, [Frame("", lines(series, Lines(x="step", height=190)))])
