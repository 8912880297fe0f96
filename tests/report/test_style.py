"""Colours that everybody can read, definitions under every heading, and paper."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_goldy.report import ReportError
from lightning_goldy.report.descriptions import _ORDER, DOUBTS, PAGES, anchor_of, page_of, section_of
from lightning_goldy.report.formatting import GLOSSARY, prose_html, table_html, texts_html
from lightning_goldy.report.page import _asset, reference_html
from lightning_goldy.report.topics import coupling, text
from tests.house import ROOT

CSS = _asset("style.css")
PAIRS = [(ink, paper, 4.5) for ink in ("text", "soft", "accent", "good") for paper in ("page", "card")]
# What is drawn, not read.
PAIRS += [("bar", "card", 3.0), ("bar", "line", 3.0)]


def colours() -> dict[str, dict[str, str]]:
    """Variables by scheme; what a scheme does not set is the light one's."""
    found = re.findall(r"(@media [^{]*\{\s*)?:root \{([^}]*)\}", CSS)
    schemes = {}
    for media, body in found:
        name = "dark" if "dark" in media else "print" if "print" in media else "light"
        schemes[name] = dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6})", body))
    return {name: {**schemes["light"], **own} for name, own in schemes.items()}


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_the_standard_says() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_texts_stand_out_from_their_ground(scheme: str) -> None:
    known = colours()[scheme]
    for ink, paper, least in PAIRS:
        assert contrast(known[ink], known[paper]) >= least, (scheme, ink, paper)


def test_paper_has_no_controls_and_cuts_no_figure() -> None:
    (body,) = re.findall(r"@media print \{(.*)\}\s*\Z", CSS, re.S)
    (hidden,) = re.findall(r"([^}]*)\{ display: none; \}", body)
    assert {"nav", ".download", ".steps input"} <= {part.strip() for part in hidden.split(",")}
    assert re.search(r"figure, tr, \.answer.*break-inside: avoid", body)


class Headings(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.titles: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "th" and dict(attrs).get("scope") == "col":
            self.titles.append(dict(attrs).get("title"))


TABLES = {
    "cost": ["analysis", "#times", "#time", "#each", "#forward", "#backward", "#evaluations", "#peak memory"],
    "shares": ["analysis", "#of all analyses", "#of the run"],
    "metrics": ["metric", "#step 10", "#step 1,200 (end)", "meaning"],
    "comparison": ["quantity", "#difference", "#95 % interval", "remark"],
    "facts": list(coupling._MOVED),
    "checks": list(coupling._CHECKS),
    "pairs": list(coupling._PAIRS),
    "generations": list(text._GENERATIONS.values()),
    "continuations": list(text._CONTINUATIONS.values()),
    "activations": [
        *("block", "most promoted tokens", "text", "base says", "now says", "KL, nats"),
        *("model", "prompt", "plain", "steered", "strength"),
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_every_column_tells_its_unit_and_definition(name: str) -> None:
    headings = TABLES[name]
    assert headings
    cells = ["x"] * len(headings)
    pages = [table_html(headings, [cells]), texts_html([heading.removeprefix("#") for heading in headings], [cells])]
    for page in pages:
        told = Headings(page).titles
        assert len(told) == len(headings)
        assert all(told), dict(zip(headings, told, strict=True))


def test_the_glossary_has_no_word_to_spare() -> None:
    used = {heading.removeprefix("#") for headings in TABLES.values() for heading in headings}
    assert {word.removeprefix("#") for word in GLOSSARY} <= used


@pytest.mark.parametrize("analysis", _ORDER)
def test_every_analysis_is_defined_and_doubted_by_its_page(analysis: str) -> None:
    name, _, heading = page_of(analysis).partition("#")
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    anchors = {
        anchor_of(text) for text in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.M)
    }
    assert {DOUBTS, *([heading] if heading else [])} <= anchors
    for anchor in (heading, DOUBTS):
        said = section_of(name, anchor)
        assert len(said) > 150
        assert said in page
    # What the page of the run says is what the documentation says.
    shown = html.unescape(re.sub(r"<[^>]*>", "", reference_html(page_of(analysis), "analysis-1")))
    assert " ".join(section_of(name, DOUBTS).split()[1:9]).replace("`", "").replace("**", "") in " ".join(shown.split())


def test_definitions_are_on_the_page_and_link_to_the_documentation_where_it_has_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOLDY_DOCS", raising=False)
    alone = reference_html("attention.md", "analysis-3")
    assert 'id="analysis-3-definition"' in alone
    assert 'id="analysis-3-doubt"' in alone
    assert "href" not in alone
    monkeypatch.setenv("GOLDY_DOCS", "https://example.org/goldy/")
    links = re.findall(r'<a href="([^"]*)" rel="noopener">', reference_html("attention.md", "analysis-3"))
    assert links == ["https://example.org/goldy/attention/", f"https://example.org/goldy/attention/#{DOUBTS}"]
    links = re.findall(r'<a href="([^"]*)"', reference_html(PAGES["parameter_distribution"], "a"))
    assert links[0] == "https://example.org/goldy/golden_snapshot/#the-shape-of-the-change"
    assert reference_html("", "a") == ""
    monkeypatch.setenv("GOLDY_DOCS", "javascript:alert(1)")
    with pytest.raises(ReportError, match="GOLDY_DOCS must be an address"):
        reference_html("attention.md", "a")


def test_prose_runs_nothing() -> None:
    told = prose_html("<script>x</script> [<b>](javascript:x) `</code><i>` **<u>**\n\n```\n</pre><p>\n```\n\n| <td> |")
    assert not re.search(r"<(script|b|i|u|td)>|javascript|href", told)


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts of a module's code with their lines, docstrings aside; a value in one is a 0, with its form's sign."""
    commented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [each.body[0].value for each in ast.walk(tree) if isinstance(each, commented) and _begins(each)]
    parts = [part for each in ast.walk(tree) if isinstance(each, ast.JoinedStr) for part in ast.walk(each)]
    aside = {id(each) for each in (*docstrings, *parts)}
    for each in ast.walk(tree):
        if isinstance(each, ast.JoinedStr):
            yield each.lineno, "".join(map(_shown, each.values))
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in aside:
            yield each.lineno, each.value


def _begins(each: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    return bool(each.body) and isinstance(each.body[0], ast.Expr) and isinstance(each.body[0].value, ast.Constant)


def _shown(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    form = getattr(part, "format_spec", None)
    return "0%" if form is not None and "%" in ast.unparse(form) else "0"


def _glued(code: str) -> list[int]:
    """Lines whose text has a percentage sign right behind its number."""
    return [line for line, text in _texts(ast.parse(code)) if re.search(r"\d%(?!\w)", text)]


@pytest.mark.parametrize("place", sorted((ROOT / "lightning_goldy").rglob("*.py")), ids=lambda path: path.stem)
def test_a_percentage_has_a_space_before_its_sign(place: Path) -> None:
    assert _glued(place.read_text(encoding="utf-8")) == []


def test_a_percentage_without_a_space_is_found() -> None:
    lines = [
        '"""5%"""',
        'f"{share:.1%} of it"',
        'f"{100 * share:.0f}% of it"',
        '"5% of it"',
        'f"{share} %"',
        '"%s 5 %"',
    ]
    assert set(_glued("\n".join(lines))) == {2, 3, 4}
