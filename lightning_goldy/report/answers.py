"""What the finetune changed, in five sentences that its rows support.

Each of the five questions is answered by the analysis that answers it best of those that a run has. A sentence is
computed from the numbers of rows, with its interval, with what would have been seen without an effect (the null), and
with a mark of trust; it says no more than its interval does. The sentences are functions of rows, and of nothing else
(:mod:`lightning_goldy.report.sentences`); :func:`register_answer` adds one.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import zip_longest
from typing import Any, Literal, TypeAlias, get_args

from rich.table import Table
from scipy.special import stdtrit

from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import Row, naming
from lightning_goldy.report.formatting import console_table

QuestionName: TypeAlias = Literal["carries", "kind", "robust", "touched", "needs"]
Trust: TypeAlias = Literal["solid", "weak", "not measured"]


@dataclass(frozen=True)
class Question:
    """One of the questions that unfold "what did this finetune change?".

    Args:
        title: As the page asks it.
        callbacks: What would measure it, the best first.
    """

    title: str
    callbacks: tuple[str, ...]


QUESTIONS: dict[QuestionName, Question] = {
    "carries": Question("Which parameters carry it?", ("ChangeAttribution", "GoldenSnapshot")),
    "kind": Question("What kind of change is it?", ("TaylorDiff", "ActivationDifferences", "AttentionTracker")),
    "robust": Question("How robust is it?", ("BasinVolume",)),
    "touched": Question("What else did it touch?", ("KnowledgeCoupling", "ActivationDifferences", "ChangeAttribution")),
    "needs": Question("Which heads does it need?", ("HeadPlasticity",)),
}

_NORMAL = 1.96
_TITLES = (*(question.title for question in QUESTIONS.values()), "Other analyses")


@dataclass(frozen=True)
class Bar:
    """A share beside its interval and its null, all fractions; what lies outside of 0 to 1 is drawn at the edge."""

    value: float
    low: float | None = None
    high: float | None = None
    null: float | None = None


@dataclass(frozen=True)
class Finding:
    """What the rows of one analysis say to a question.

    Args:
        sentence: The answer, with its number.
        interval: Of the number, in words with its unit, or that there is none.
        null: What would have been seen without an effect, in words.
        doubts: Why the sentence must not be trusted as it stands; none for a solid one.
        bar: The number as a picture, where it is a share.
        course: Name of the metric whose course over the run belongs to the sentence.
    """

    sentence: str
    interval: str = ""
    null: str = ""
    doubts: tuple[str, ...] = ()
    bar: Bar | None = None
    course: str = ""


@dataclass(frozen=True)
class Answer:
    """An answered, or unanswered, question.

    Args:
        question: Which.
        finding: Of the best analysis of it; for one that is not measured a sentence that says what would.
        trust: ``solid``, ``weak`` (there are doubts), or ``not measured``.
        analysis: Name of the instance whose rows speak, or nothing.
        step: Of the row, or None.
        course: (step, value) of the metric over the run.
        more: What other analyses say to the same question, by their names.
    """

    question: QuestionName
    finding: Finding
    trust: Trust
    analysis: str = ""
    step: int | None = None
    course: tuple[tuple[int, float], ...] = ()
    more: Mapping[str, Finding] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The question as the page asks it."""
        return QUESTIONS[self.question].title

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures.

        Example:
            >>> unanswered = answers_of([])[2].to_json()
            >>> unanswered["title"], unanswered["trust"]
            ('How robust is it?', 'not measured')
        """
        told = {name: getattr(self.finding, name) for name in ("sentence", "interval", "null")}
        told |= {"doubts": list(self.finding.doubts), "trust": self.trust, "analysis": self.analysis, "step": self.step}
        more = {name: finding.sentence for name, finding in self.more.items()}
        return {"question": self.question, "title": self.title, **told, "more": more}


Speaker: TypeAlias = Callable[[Sequence[Row]], "Finding | None"]
_SPEAKERS: dict[QuestionName, dict[str, Speaker]] = {name: {} for name in QUESTIONS}


def register_answer(analysis: str, question: QuestionName) -> Callable[[Speaker], Speaker]:
    """Registers a function of the rows of an analysis, ascending by step, as an answer to a question.

    It returns None where the rows hold nothing that answers it. Of several analyses the first registered speaks.

    Args:
        analysis: The ``analysis`` field of its rows.
        question: Which of the five.

    Raises:
        ValueError: The question is unknown, or the analysis answers it already.

    Example:
        >>> register_answer("taylor_diff", "kind")(lambda rows: None)
        Traceback (most recent call last):
        ValueError: taylor_diff answers 'kind' already: answer_by_expansion
    """
    if question not in _SPEAKERS:
        raise ValueError(f"question must be one of {', '.join(get_args(QuestionName))}, got {question!r}")

    def register(speaker: Speaker) -> Speaker:
        speakers = _SPEAKERS[question]
        if analysis in speakers:
            raise ValueError(f"{analysis} answers {question!r} already: {speakers[analysis].__name__}")
        speakers[analysis] = speaker
        return speaker

    return register


def question_of(analysis: str) -> QuestionName | None:
    """The question under which the page shows an analysis: the first that it answers, or that it belongs to.

    Example:
        >>> question_of("basin_volume"), question_of("golden_parameters"), question_of("some_analysis")
        ('robust', 'carries', None)
    """
    answered = next((name for name, speakers in _SPEAKERS.items() if analysis in speakers), None)
    return _BELONGS.get(analysis, answered)


# Analyses that no sentence is made of, or of another question than the one that they mostly serve.
_BELONGS: dict[str, QuestionName] = {
    "golden_snapshot": "carries",
    "golden_parameters": "carries",
    "reverse_golden_parameters": "carries",
    "parameter_distribution": "carries",
    "explain_change": "kind",
    "variant_losses": "kind",
    "continuations": "touched",
    "knowledge_coupling": "touched",
    "ripple_effects": "touched",
}


@dataclass(frozen=True)
class Waiting:
    """The callbacks of a run that were attached and have not fired.

    Args:
        callbacks: Name of the instance to its class; nothing for a class that is not known.
        step: Where the run stands, or was killed.
    """

    callbacks: Mapping[str, str] = field(default_factory=dict)
    step: int = 0

    def told(self, question: QuestionName) -> Finding | None:
        """That what would answer a question was attached and has not fired; None where nothing of the kind was.

        Example:
            >>> Waiting({"volumes": "BasinVolume"}, 1200).told("robust").sentence
            'Not measured: volumes was attached, and had not fired when the run stood at step 1,200.'
        """
        wanted = QUESTIONS[question].callbacks
        names = [name for name, of in self.callbacks.items() if (of or name.title().replace("_", "")) in wanted]
        if not names:
            return None
        were = "were" if len(names) > 1 else "was"
        sentence = (
            f"Not measured: {' and '.join(names)} {were} attached, and had not fired when the run stood at step "
            f"{self.step:,}."
        )
        return Finding(sentence, "the run was killed there before it came to it, or still goes on")


def answers_of(analyses: Iterable[tuple[str, str, Sequence[Row]]], waiting: Waiting = Waiting()) -> tuple[Answer, ...]:
    """The five questions, answered by what a run has measured.

    Args:
        analyses: Name, analysis and rows (ascending by step) of each instance.
        waiting: What was attached and has not fired.

    Returns:
        One answer to each question, in their order.

    Raises:
        ReportError: The rows of an instance lack what its answer is made of; the message names both.

    Example:
        >>> rows = [{"step": 4, "metrics": {"nonlinearity": 0.03}, "result": {"regime": "lazy", "n_targets": 40}}]
        >>> answers_of([("taylor", "taylor_diff", rows)])[1].finding.sentence
        'It is a small step: the first order explains all but 3 % of the change in logits.'
    """
    instances = [(name, analysis, rows) for name, analysis, rows in analyses if rows]
    return tuple(_answer(question, instances, waiting) for question in QUESTIONS)


def scalar_layout(instances: Iterable[tuple[str, str]], logged: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars: the questions as categories, with a chart for each headline that has been logged.

    All lines of a run have one colour there, and one axis: numbers of different units do not share a chart. An analysis
    whose description names no headlines has one chart. A headline that is off by an option, or has no value yet, has
    none: its chart would stay empty.

    Args:
        instances: Name and analysis of each.
        logged: Tags of the scalars that loggers have.

    Example:
        >>> volumes = scalar_layout([("volumes", "basin_volume")], ["goldy/volumes/log_volume/kl_1"])
        >>> volumes
        {'How robust is it?': {'volumes: log_volume/*': ['Multiline', ['^goldy/volumes/log_volume/.+$']]}}
        >>> scalar_layout([("mine", "some_analysis")], ["goldy/mine/loss"])
        {'Other analyses': {'mine': ['Multiline', ['^goldy/mine/[^/]+$']]}}
    """
    layout: dict[str, dict[str, list[Any]]] = {title: {} for title in _TITLES}
    for name, analysis in instances:
        question = question_of(analysis)
        charts = layout[QUESTIONS[question].title if question else _TITLES[-1]]
        place = f"^goldy/{re.escape(name)}"
        headline = description_of(analysis).headline
        patterns = {
            f"{name}: {metric}": f"{place}/{re.escape(metric).replace(re.escape('*'), '.+')}$" for metric in headline
        } or {name: f"{place}/[^/]+$"}
        for title, pattern in patterns.items():
            if any(re.match(pattern, tag) for tag in logged):
                charts[title] = ["Multiline", [pattern]]
    return {title: charts for title, charts in layout.items() if charts}


def sorted_scalars(instances: Iterable[tuple[str, str]], logged: Collection[str]) -> list[str]:
    """Tags of the headlines by which runs can be sorted, the first of every question before the others.

    Those that have no value are left out, and so are patterns: each would be a column for every block or cutoff.

    Args:
        instances: Name and analysis of each.
        logged: Tags of the scalars that loggers have.

    Example:
        >>> tags = ["goldy/taylor/loss", "goldy/taylor/nonlinearity", "goldy/volumes/log_volume"]
        >>> sorted_scalars([("taylor", "taylor_diff"), ("volumes", "basin_volume")], tags)
        ['goldy/taylor/nonlinearity', 'goldy/volumes/log_volume', 'goldy/taylor/loss']
    """
    asked: dict[str | None, list[str]] = {question: [] for question in (*QUESTIONS, None)}
    for name, analysis in instances:
        tags = [f"goldy/{name}/{metric}" for metric in description_of(analysis).headline]
        asked[question_of(analysis)] += [tag for tag in tags if tag in logged]
    return [tag for tags in zip_longest(*asked.values()) for tag in tags if tag is not None]


def answers_text(answers: Iterable[Answer]) -> str:
    """Markdown for loggers that take text: what is measured, with its interval, its null and its trust.

    Example:
        >>> rows = [{"step": 4, "metrics": {"relative_change": 0.0}, "result": {}}]
        >>> print(answers_text(answers_of([("norms", "golden_snapshot", rows)])))
        **Which parameters carry it?** No parameter has moved. *(solid. Null: 0 without training.)*
    """
    lines = []
    for answer in answers:
        if answer.trust == "not measured":
            continue
        words = escape(answer.finding.sentence).replace("*", "&#42;").replace("_", "&#95;").replace("`", "&#96;")
        small = " ".join([f"{answer.trust}.", *small_print(answer.finding)])
        lines.append(f"**{answer.title}** {words} *({escape(small).replace('*', '&#42;')})*")
    return "\n\n".join(lines)


def small_print(finding: Finding) -> list[str]:
    """Interval, null and doubts as sentences."""
    interval = f"{finding.interval[:1].upper()}{finding.interval[1:]}."
    told = [interval] if finding.interval else []
    told += [f"Null: {finding.null}."] if finding.null else []
    return told + ([f"Doubt: {'; '.join(finding.doubts)}."] if finding.doubts else [])


def answers_table(answers: Iterable[Answer]) -> Table:
    """The answers for the console.

    Example:
        >>> answers_table(answers_of([])).row_count
        5
    """
    rows = [(answer.title, answer.finding.sentence, answer.trust) for answer in answers]
    return console_table("What did this finetune change?", ["question", "answer", "trust"], rows)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean; infinite for a single value.

    Example:
        >>> [round(end, 2) for end in interval_of_mean([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def interval_of_share(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many samples.

    Example:
        >>> [round(end, 2) for end in interval_of_share(1.0, 10)]
        [0.72, 1.0]
    """
    square = _NORMAL**2 / count
    centre, half = share + square / 2, _NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def interval_of_turned(gained: int, lost: int, count: int) -> tuple[float, float]:
    r"""The 95 % interval of the difference of two shares of the same samples, by how many turned one way and the other.

    .. math:: \hat p_+ - \hat p_- \pm z \sqrt{\frac{\hat p_+ + \hat p_- - (\hat p_+ - \hat p_-)^2}{n + 2}}, \quad
        \hat p_+ = \frac{n_+ + 1}{n + 2}, \; \hat p_- = \frac{n_- + 1}{n + 2}

    Args:
        gained: Samples that have the property now and had it not before.
        lost: Samples that had it before and have it not now.
        count: All samples.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
        paired data" (2012).

    Example:
        >>> [round(end, 3) for end in interval_of_turned(1, 20, 98)]
        [-0.276, -0.104]
    """
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = _NORMAL * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def unequal_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two volumes of rows differ in that must be one for their directions to be the same vectors.

    Example:
        >>> unequal_settings({"sigma": 0.1, "seed": 0}, {"sigma": 0.2, "seed": 0})
        ['sigma']
    """
    names = ("sigma", "measure", "cutoff", "preconditioner", "seed", "first_direction", "dimension")
    return [name for name in names if first.get(name) != second.get(name)]


def paired_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[float]:
    """Second less first along each direction that both volumes of rows have an estimate of, nats.

    Example:
        >>> paired_differences({"estimates": [-5.0, None, -7.0]}, {"estimates": [-8.0, -9.0, -9.0]})
        [-3.0, -2.0]
    """
    pairs = zip(first.get("estimates") or (), second.get("estimates") or (), strict=False)
    kinds = (int, float)
    known = ((a, b) for a, b in pairs if isinstance(a, kinds) and isinstance(b, kinds))
    return [after - before for before, after in known if math.isfinite(before) and math.isfinite(after)]


def _undefined(rows: Sequence[Row]) -> Finding | None:
    """That the training has left nothing to measure, and since when; None where the last row has numbers."""
    reason, since = rows[-1]["result"].get("undefined"), rows[-1]["step"]
    if not reason:
        return None
    for row in reversed(rows):
        if not row["result"].get("undefined"):
            break
        since = row["step"]
    sentence = f"It is undefined since step {since:,}: {reason}."
    return Finding(sentence, doubts=("nothing can be measured on weights that are no numbers",))


def _answer(question: QuestionName, instances: Sequence[tuple[str, str, Sequence[Row]]], waiting: Waiting) -> Answer:
    said: dict[str, tuple[Finding, Sequence[Row]]] = {}
    for analysis, speaker in _SPEAKERS[question].items():
        for name, of, rows in instances:
            with naming(f"{name}: its rows do not hold what their answer is made of ({speaker.__name__}):"):
                finding = (_undefined(rows) or speaker(rows)) if of == analysis else None
            if finding is not None and name not in said:
                said[name] = finding, rows
    if not said:
        wanted = " or ".join(QUESTIONS[question].callbacks)
        unmeasured = waiting.told(question) or Finding(f"Not measured; {wanted} would tell.")
        return Answer(question, unmeasured, "not measured")
    (name, (finding, rows)), *others = said.items()
    points = ((row["step"], row["metrics"].get(finding.course)) for row in rows)
    course = tuple((step, value) for step, value in points if value is not None and math.isfinite(value))
    more = {other: finding for other, (finding, _) in others}
    return Answer(question, finding, "weak" if finding.doubts else "solid", name, rows[-1]["step"], course, more)
