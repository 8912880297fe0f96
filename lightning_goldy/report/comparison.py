"""Several runs beside each other: the same five questions, one column per run, and differences where they are fair."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lightning_goldy.core.files import finite
from lightning_goldy.core.store import atomic_write
from lightning_goldy.report.answers import (
    QUESTIONS,
    Answer,
    interval_of_mean,
    paired_differences,
    small_print,
    unequal_settings,
)
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import ReportError, Row
from lightning_goldy.report.formatting import MISSING, format_number, format_percent, table_html
from lightning_goldy.report.page import answers_json, answers_of_run, page_html
from lightning_goldy.report.rendering import require_drawing
from lightning_goldy.report.run import AnalysisRows, Run, read_run
from lightning_goldy.report.sentences import few_directions


@dataclass(frozen=True)
class Difference:
    """What one run has more than another.

    Args:
        what: The quantity, with its unit.
        value: The difference, or None where the two must not be compared.
        low: Lower end of its 95 % interval, or None.
        high: Upper end, or None.
        remark: How it was taken, or why it was not.
    """

    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    remark: str = ""


def write_comparison(
    run_directories: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes one self-contained page about several runs: the five answers of each, and differences to the first.

    Args:
        run_directories: At least two, each as :func:`~lightning_goldy.report.write_report` takes it.
        output: Target file; by default ``comparison.html`` in the log directory of the first run.

    Returns:
        The file, written whole or not at all.

    Raises:
        ReportError: Fewer than two different runs are given, or one cannot be read.
        ImportError: altair or vl-convert is not installed.
    """
    require_drawing()
    runs = _different(run_directories)
    target = runs[0].directory / "comparison.html" if output is None else Path(output)
    if target.is_dir():
        raise ReportError(f"output {target} is a directory; give the file to write, such as {target / 'runs.html'}")
    names = names_of(runs)
    body = "\n".join(
        [_answers(runs, names), *(_differences(runs[0], run, names, at) for at, run in enumerate(runs) if at)]
    )
    title = f"{', '.join(names)}: what did these finetunes change?"
    return atomic_write(target, page_html(title, ", ".join(names), body))


def comparison_json(run_directories: Sequence[str | os.PathLike[str]]) -> str:
    """The answers of several runs, and what each has more than the first, as JSON.

    Args:
        run_directories: At least two, each as :func:`~lightning_goldy.report.write_report` takes it.

    Returns:
        An object with ``runs``, each as :func:`~lightning_goldy.report.page.answers_json` gives it, and
        ``differences``: the run's name, and what, value, low, high and remark of each.

    Raises:
        ReportError: Fewer than two different runs are given, or one cannot be read.
    """
    first, *others = runs = _different(run_directories)
    names = names_of(runs)
    told = [
        {"run": name, **asdict(difference)}
        for name, other in zip(names[1:], others, strict=True)
        for difference in differences(first, other)
    ]
    answers = {name: json.loads(answers_json(run.directory)) for name, run in zip(names, runs, strict=True)}
    return json.dumps(finite({"runs": answers, "differences": told}), indent=2, allow_nan=False)


def _different(run_directories: Sequence[str | os.PathLike[str]]) -> list[Run]:
    runs = [read_run(directory) for directory in run_directories]
    if len({run.directory for run in runs}) < len(runs) or len(runs) < 2:
        raise ReportError(f"a comparison needs at least two different runs, got {[str(run.directory) for run in runs]}")
    return runs


def names_of(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart.

    Example:
        >>> runs = [Run(Path(f"/logs/{name}/version_0"), (), None, {}, None, ()) for name in ("a", "b")]
        >>> names_of(runs)
        ['a/version_0', 'b/version_0']
    """
    for depth in range(1, max(len(run.directory.parts) for run in runs) + 1):
        names = ["/".join(run.directory.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.directory) for run in runs]


def differences(first: Run, second: Run) -> list[Difference]:
    """What the second run has more than the first, by the latest row of each analysis that both have.

    Metrics are subtracted where both rows saw as many samples and were measured with the same settings, and sample by
    sample, with an interval, where both rows hold their samples' values and the samples are the same; a volume is
    compared direction by direction, and only where both have the same prior, cutoff, measure, preconditioner and seed.

    Args:
        first: Subtracted.
        second: Of which it is subtracted.
    """
    told: list[Difference] = []
    known = {analysis.name: analysis for analysis in first.analyses}
    for analysis in second.analyses:
        other = known.get(analysis.name)
        if other is None or other.analysis != analysis.analysis:
            continue
        lost = [run.rows[-1]["result"].get("undefined") for run in (other, analysis)]
        if any(lost):
            reasons = " and ".join(dict.fromkeys(filter(None, lost)))
            told.append(Difference(analysis.name, None, remark=f"undefined: {reasons}"))
        elif analysis.analysis == "basin_volume":
            told += _volume_differences(other.rows[-1], analysis.rows[-1])
        else:
            told += _metric_differences(other, analysis)
    return told


@dataclass(frozen=True)
class Samples:
    r"""What a metric, :math:`(\sum_i a_i / \sum_i b_i)^p`, is of each sample.

    Args:
        values: a and b, by the samples' keys; samples that are alike have several.
        power: p.
    """

    values: Mapping[str, Sequence[tuple[float, float]]]
    power: float = 1.0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Samples:
        """Those of a row's record."""
        values: dict[str, list[tuple[float, float]]] = {}
        for key, *pair in zip(*(record[name] for name in ("keys", "numerators", "denominators")), strict=True):
            values.setdefault(key, []).append((pair[0], pair[1]))
        return cls(values, record.get("power", 1.0))

    def counts(self) -> dict[str, int]:
        """How many samples have each key."""
        return {key: len(pairs) for key, pairs in self.values.items()}


def samples_of(row: Row) -> dict[str, Samples]:
    """By metric what it is of each sample, as far as the row tells.

    Args:
        row: Of any analysis.

    Example:
        >>> record = {"keys": ["a", "b"], "numerators": [1.0, 2.0], "denominators": [1, 1]}
        >>> samples_of({"result": {"per_sample": {"kl": record}}})["kl"].counts()
        {'a': 1, 'b': 1}
    """
    result = row["result"]
    records = {**(result.get("per_sample") or {}), **((result.get("curve") or {}).get("per_sample") or {})}
    graft = result.get("graft") or {}
    for name, record in (graft.get("per_sample") or {}).items():
        metric, _, share = name.partition("/")
        records[f"{metric} by {format_percent(float(share))} of the {graft['pieces']}" if share else name] = record
    found = {name: Samples.of(record) for name, record in records.items()}
    points = result.get("points") or {}
    # Of more pieces than a row holds, means are of all, and points are not.
    if not {"piece", "class", "measured"} <= set(points) or len(points["piece"]) != result.get("n_pieces"):
        return found
    for metric, column in (("measured_change", points["measured"]), ("exact", points.get("exact") or ())):
        for name in dict.fromkeys(points["class"]):
            rows = zip(points["piece"], points["class"], column, strict=False)
            values = {piece: [(float(value), 1.0)] for piece, of, value in rows if of == name and value is not None}
            if values:
                found[f"{metric}/{name}"] = Samples(values)
    return found


def paired_interval(first: Samples, second: Samples) -> tuple[float, float, float]:
    r"""What the second has more than the first over the same samples, and its 95 % interval by the jackknife.

    .. math:: d = f(A', B') - f(A, B), \quad f(A, B) = (A / B)^p, \quad
        s^2 = \frac{n - 1}{n} \sum_i (d_{-i} - \bar d_-)^2

    with :math:`d_{-i}` the difference without sample i in both. Of means, where every b is 1, it is Student's paired
    interval.

    Args:
        first: Subtracted.
        second: Of which it is subtracted; of the same keys.

    Returns:
        Difference, and both ends; infinite ones of a single sample.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.

    Example:
        >>> first, second = (Samples({"ab"[i]: [(v, 1.0)] for i, v in enumerate(x)}) for x in ([1.0, 2.0], [2.0, 5.0]))
        >>> [round(number, 2) for number in paired_interval(first, second)]
        [2.0, -10.71, 14.71]
    """
    columns = []
    for samples in (first, second):
        pairs = np.array([pair for key in sorted(first.values) for pair in samples.values[key]], dtype=np.float64)
        sums, (powers, whole) = pairs.sum(0), (samples.power, len(pairs))
        left = sums - pairs if whole > 1 else pairs[:0]
        columns.append([(sums[0] / sums[1]) ** powers, (left[:, 0] / left[:, 1]) ** powers])
    (before, without_before), (after, without_after) = columns
    value, without = float(after - before), without_after - without_before
    if len(without) < 2:
        return value, -math.inf, math.inf
    count = len(without)
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    half = float(stdtrit(count - 1, 0.975)) * error
    return value, value - half, value + half


def _paired(what: str, first: Samples, second: Samples) -> Difference | None:
    """The difference over the samples that both saw; None where their numbers leave it undefined."""
    ours, theirs = first.counts(), second.counts()
    if ours != theirs:
        shared = sum(min(count, theirs.get(key, 0)) for key, count in ours.items())
        return Difference(what, None, remark=f"other samples: {shared} of {sum(ours.values())} are in both")
    if first.power != second.power:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value, low, high = paired_interval(first, second)
    count = sum(ours.values())
    if not math.isfinite(value):
        return None
    if not (math.isfinite(low) and math.isfinite(high)):
        return Difference(what, value, remark=f"no interval over {count} sample{'s' if count != 1 else ''}")
    remark = f"paired over {count} samples" + ("; the interval includes 0" if low <= 0 <= high else "")
    return Difference(what, value, low, high, remark)


def _metric_differences(first: AnalysisRows, second: AnalysisRows) -> list[Difference]:
    description, before, after = description_of(second.analysis), first.rows[-1], second.rows[-1]
    unequal, other_count = _unequal_settings(before, after), _other_count(before, after)
    fair = not (unequal or other_count)
    remark = other_count or ("no interval" if fair else f"not comparable: {', '.join(unequal)}")
    told = []
    ours, theirs = (samples_of(row) for row in (before, after))
    # What has no samples of its own in the row was of the same as what has.
    others = sum(ours[name].counts() != theirs[name].counts() for name in theirs if name in ours)
    alike = fair and not others
    if fair and others:
        remark = "other samples"
    for name, value in after["metrics"].items():
        if not description.is_headline(name) or value is None or before["metrics"].get(name) is None:
            continue
        what = f"{second.name}: {name}"
        pairs = _paired(what, ours[name], theirs[name]) if fair and name in ours and name in theirs else None
        if pairs is not None:
            told.append(pairs)
            continue
        difference = value - before["metrics"][name]
        if math.isfinite(difference):
            told.append(Difference(what, difference if alike else None, remark=remark))
        else:
            told.append(Difference(what, None, remark="at least one of them is no number"))
    for name in (name for name in theirs if name not in after["metrics"] and name in ours):
        pairs = _paired(f"{second.name}: {name}", ours[name], theirs[name]) if fair else None
        told += [pairs] if pairs else [] if fair else [Difference(f"{second.name}: {name}", None, remark=remark)]
    return told


def _other_count(first: Row, second: Row) -> str:
    """That two rows are of different numbers of samples; nothing where they are of as many."""
    counts = [row["result"].get("n_samples") for row in (first, second)]
    if counts[0] == counts[1]:
        return ""
    return "{} against {} samples".format(*("untold" if count is None else count for count in counts))


# What decides a number beside the samples, in the results of all analyses.
_SETTINGS = (
    *("seed", "top_k_percent", "score", "scope", "quorum", "metric", "measure", "strategy", "space", "positions"),
    *("n_passages", "n_tokens", "n_targets", "n_pieces", "n_eval_samples", "template", "tokens"),
)


def _unequal_settings(first: Row, second: Row) -> list[str]:
    pairs = [(name, first["result"].get(name), second["result"].get(name)) for name in _SETTINGS]
    return [f"{name} {before} against {after}" for name, before, after in pairs if before != after]


def _volume_differences(first: Row, second: Row) -> list[Difference]:
    told = []
    before = {volume.get("split"): volume for volume in first["result"].get("volumes") or ()}
    for after in second["result"].get("volumes") or ():
        other = before.get(after.get("split"))
        if other is not None:
            told.append(_volume_difference(other, after, _other_count(first, second)))
    return told


def _volume_difference(first: Mapping[str, Any], second: Mapping[str, Any], other_count: str) -> Difference:
    what = f"log volume, nats ({second.get('split', MISSING)})"
    if other_count:
        return Difference(what, None, remark=other_count)
    unequal = unequal_settings(first, second)
    if unequal:
        pairs = ", ".join(f"{name} {first.get(name)} against {second.get(name)}" for name in unequal)
        return Difference(what, None, remark=f"not comparable: {pairs}")
    values = paired_differences(first, second)
    if len(values) < 2:
        return Difference(what, None, remark="fewer than two directions in common")
    low, high = interval_of_mean(values)
    remark = f"paired over {len(values)} directions"
    if low <= 0 <= high:
        remark += "; the interval includes 0"
    if few := few_directions(first) or few_directions(second):
        remark += f"; weak: volumes rest on {few}, so it tells of the radii along them"
    return Difference(what, statistics.fmean(values), low, high, remark)


def _answers(runs: Sequence[Run], names: Sequence[str]) -> str:
    told = [answers_of_run(run) for run in runs]
    body = [
        [escape(QUESTIONS[question].title), *(_cell(answers[place]) for answers in told)]
        for place, question in enumerate(QUESTIONS)
    ]
    table = table_html(["question", *map(escape, names)], body)
    return f'<section id="answers"><h2>Answers</h2>{table}</section>'


def _cell(answer: Answer) -> str:
    mark = answer.trust.replace(" ", "-")
    small = escape(" ".join(small_print(answer.finding)))
    return (
        f'<span class="trust {mark}">{escape(answer.trust)}</span> {escape(answer.finding.sentence)}'
        f'<p class="small">{small}</p>'
    )


def _differences(first: Run, second: Run, names: Sequence[str], place: int) -> str:
    heading = f"{names[place]} minus {names[0]}"
    body = [
        [escape(difference.what), format_number(difference.value), _interval(difference), escape(difference.remark)]
        for difference in differences(first, second)
    ]
    content = "<p>The two runs have no analysis in common.</p>"
    if body:
        content = table_html(["quantity", "#difference", "#95 % interval", "remark"], body)
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return MISSING
    return f"{format_number(difference.low)} to {format_number(difference.high)}"
