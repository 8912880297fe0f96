"""What the page says of each analysis: what it measures and how to read it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from lightning_goldy.report.figures import ReportError


@dataclass(frozen=True)
class Description:
    """The words around an analysis on the report page.

    Args:
        title: Heading of its section.
        measures: A sentence that says what is measured.
        reading: A sentence that says how to read the numbers.
        metrics: Meaning of each metric; for names with a slash, of the part before the last slash.
        headline: The few metrics that loggers get as scalars by default, names or patterns of them; none are all
            without a slash.
        method: A sentence for a paper that says how the numbers were obtained, with its source.
        page: Of the documentation, where the definition stands; by default that of :data:`PAGES`.
    """

    title: str
    measures: str
    reading: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    method: str = ""
    page: str = ""

    def is_headline(self, metric: str) -> bool:
        """Whether a metric is among the few.

        Example:
            >>> described = Description("", "", "", headline=("loss", "error/*"))
            >>> [described.is_headline(name) for name in ("loss", "change", "error/order1")]
            [True, False, True]
            >>> Description("", "", "").is_headline("change"), Description("", "", "").is_headline("change/h.0")
            (True, False)
        """
        if not self.headline:
            return "/" not in metric
        return any(fnmatchcase(metric, pattern) for pattern in self.headline)

    def meaning(self, metric: str) -> str:
        """Meaning of a metric, or nothing where none is known.

        Example:
            >>> Description("", "", "", {"change": "by block"}).meaning("change/h.0")
            'by block'
        """
        return self.metrics.get(metric) or self.metrics.get(metric.rpartition("/")[0], "")


_DESCRIPTIONS: dict[str, Description] = {}

# Of the sections on the page.
_ORDER = (
    "change_attribution",
    "golden_snapshot",
    "parameter_distribution",
    "golden_parameters",
    "reverse_golden_parameters",
    "taylor_diff",
    "explain_change",
    "variant_losses",
    "activation_differences",
    "attention_tracker",
    "circuit_tracker",
    "basin_volume",
    "coupling_drift",
    "knowledge_coupling",
    "ripple_effects",
    "continuations",
    "head_plasticity",
    "plasticity_sweep",
)


def describe(analysis: str, description: Description) -> None:
    """Adds the description of an analysis; the page shows analyses of somebody else in the order of their descriptions.

    Args:
        analysis: The ``analysis`` field of its rows.
        description: The words.

    Raises:
        ValueError: It is described already.

    Example:
        >>> describe("golden_parameters", Description("Golden", "", ""))
        Traceback (most recent call last):
        ValueError: analysis 'golden_parameters' is described already: 'Golden parameters'
    """
    if analysis in _DESCRIPTIONS:
        raise ValueError(f"analysis {analysis!r} is described already: {_DESCRIPTIONS[analysis].title!r}")
    _DESCRIPTIONS[analysis] = description


def description_of(analysis: str) -> Description:
    """The description of an analysis; one that was never described gets its own name as the title.

    Example:
        >>> description_of("some_analysis").title
        'Some analysis'
    """
    return _DESCRIPTIONS.get(analysis) or Description(analysis.replace("_", " ").capitalize(), "", "")


def position_of(analysis: str) -> int:
    """Place of an analysis on the page; those without a description come last.

    Example:
        >>> position_of("golden_snapshot") < position_of("golden_parameters") < position_of("some_analysis")
        True
    """
    order = [*_ORDER, *(name for name in _DESCRIPTIONS if name not in _ORDER)]
    return order.index(analysis) if analysis in order else len(order)


PAGES = {
    "change_attribution": "change_attribution.md",
    "golden_snapshot": "golden_snapshot.md",
    "parameter_distribution": "golden_snapshot.md#the-shape-of-the-change",
    "golden_parameters": "golden_parameters.md",
    "reverse_golden_parameters": "reverse_golden_parameters.md",
    "taylor_diff": "taylor_diff.md",
    "explain_change": "linearized.md",
    "variant_losses": "linearized.md#training-them-side-by-side",
    "activation_differences": "activation_differences.md",
    "attention_tracker": "attention.md",
    "circuit_tracker": "circuits.md",
    "basin_volume": "basin_volume.md",
    "coupling_drift": "knowledge_coupling.md#during-a-finetune",
    "knowledge_coupling": "knowledge_coupling.md",
    "ripple_effects": "ripple_effects.md",
    "continuations": "analyze.md",
    "head_plasticity": "head_plasticity.md",
    "plasticity_sweep": "head_plasticity.md#strategies-compared",
}
"""The page of the documentation that defines each analysis, and its heading where others stand there, too."""


def page_of(analysis: str) -> str:
    """The page of the documentation that defines an analysis, or nothing.

    Example:
        >>> page_of("taylor_diff"), page_of("some_analysis")
        ('taylor_diff.md', '')
    """
    return description_of(analysis).page or PAGES.get(analysis, "")


DOUBTS = "when-not-to-believe-it"
"""Anchor of the heading, on each of these pages, under which stands when an analysis is not to be believed."""


def documentation() -> str:
    """Address of the documentation: ``GOLDY_DOCS`` of the environment, or as the installed distribution states it.

    Raises:
        ReportError: ``GOLDY_DOCS`` is no address.
    """
    told = os.environ.get("GOLDY_DOCS", "").rstrip("/")
    if told and not re.match(r"(https?|file)://\S+$", told):
        raise ReportError(f"GOLDY_DOCS must be an address that begins with https://, http:// or file://, got {told!r}")
    return told or _stated()


@functools.cache
def _stated() -> str:
    try:
        stated = metadata.metadata("lightning-goldy").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    addresses = dict(entry.split(", ", 1) for entry in stated if ", " in entry)
    return addresses.get("Documentation", "").rstrip("/")


def section_of(page: str, anchor: str = "") -> str:
    """What a page of the documentation says under a heading, as Markdown; nothing where it has no such heading.

    Args:
        page: Name of its file.
        anchor: The heading as links name it; by default what stands between the title and the first heading below it.

    Example:
        >>> section_of("taylor_diff.md", "when-not-to-believe-it").startswith("- Families compute norms")
        True
        >>> section_of("taylor_diff.md", "nowhere"), section_of("nowhere.md")
        ('', '')
    """
    kept: list[str] = []
    level, fenced = 0 if anchor else 1, False
    for line in _pages().get(page, "").splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.*)", line)
        if heading and level and (len(heading[1]) <= level or not anchor) and kept:
            break
        if heading and anchor == anchor_of(heading[2]):
            level = len(heading[1])
        elif level and not (heading and len(heading[1]) == 1):
            kept.append(line)
    return "\n".join(kept).strip()


def anchor_of(heading: str) -> str:
    """A heading as links name it.

    Example:
        >>> anchor_of("Coming from `golden_params`")
        'coming-from-golden_params'
    """
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@functools.cache
def _pages() -> dict[str, str]:
    package = Path(__file__).parents[1]
    for folder in (package / "_bundled" / "docs", package.parent / "docs"):
        if folder.is_dir():
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    return {}
