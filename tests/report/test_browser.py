"""The page in a real browser: nothing fails, everything opens, and hostile texts stay texts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_goldy.report import Figure, register_figure, write_comparison, write_report
from lightning_goldy.report.figures import FIGURES

Build = Callable[..., dict[str, Any]]
RUN = Path(__file__).parent / "format1"
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all pages."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page file; at the end no error or warning may have been told, and nothing asked of a network."""
    told: list[str] = []
    contexts = []

    def open_file(path: Path, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda asked: told.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert told == []


@pytest.mark.parametrize("width", [1280, 400])
def test_all_answers_of_a_comparison_are_in_sight(
    opened: Callable[..., Any], tmp_path: Path, snapshot_row: Build, write_rows: Callable[..., Path], width: int
) -> None:
    runs = [write_rows(tmp_path / name / "version_0", snapshot_row(3)).parents[2] for name in "abcd"]
    page = opened(write_comparison(runs), width)
    # Five rows of four columns are taller than a box that scrolls, and words stay whole in narrow columns.
    assert page.evaluate("(t => t.scrollHeight - t.clientHeight)(document.querySelector('#answers .table'))") <= 1
    narrow = page.evaluate("Math.min(...[...document.querySelectorAll('tbody th')].map(th => th.clientWidth))")
    assert narrow >= 120
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture
def hostile(tmp_path: Path, golden_row: Build, snapshot_row: Build, write_rows: Callable[..., Path]) -> Path:
    """A run whose names and texts try to run."""
    rows = [golden_row(step, blocks=["h.0", EVIL]) for step in (1, 2, 3)]
    for row in rows:
        row["metrics"] |= {"count": row["step"], EVIL: row["step"]}
    write_rows(tmp_path, *rows, name="a'b")
    write_rows(tmp_path, *(snapshot_row(step, blocks=["h.0", EVIL]) for step in (1, 2)))
    (tmp_path / "config.yaml").write_text(f"prompt: {EVIL}\n")
    return write_report(tmp_path)


def test_answers_stand_on_the_first_screen(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    answers = page.locator("#answers .answer")
    assert answers.count() == 5
    ends = [answers.nth(place).bounding_box() for place in range(5)]
    assert max(box["y"] + box["height"] for box in ends) <= 900
    assert page.evaluate("window.evil") is None
    assert page.locator("img").count() == 0


def test_details_open_and_are_drawn_then(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    details = page.locator("#analysis-2 details.more")
    assert details.locator(".plot svg, .plot canvas").count() == 0
    details.locator("summary").click()
    details.locator(".plot svg, .plot canvas").first.wait_for()
    assert page.evaluate("window.evil") is None


def test_a_tooltip_shows_the_value(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    chart = page.locator("figure.chart").first
    chart.scroll_into_view_if_needed()
    cell = chart.locator(".mark-rect path").first
    cell.wait_for()
    # A number stands in the middle of the cell.
    cell.hover(position={"x": 3, "y": 3})
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert any(letter.isdigit() for letter in tooltip.inner_text())


def test_a_table_sorts_and_downloads(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    cost = page.locator("#cost")
    names = lambda: cost.locator("tbody th").all_inner_texts()  # noqa: E731
    before = names()
    head = cost.locator("thead th button").first
    head.click()
    assert names() == sorted(before)
    head.click()
    assert names() == sorted(before, reverse=True)
    assert cost.locator("thead th").first.get_attribute("aria-sort") == "descending"
    with page.expect_download() as download:
        cost.locator("button.download").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == len(before) + 2
    assert lines[1].startswith(f'"{names()[0]}"')


def test_numbers_sort_by_value_and_missing_ones_last(
    tmp_path: Path, golden_row: Build, write_rows: Callable[..., Path], opened: Callable[..., Any]
) -> None:
    row = golden_row(1) | {"analysis": "tiny"}
    row["metrics"] = {"a": 1200.0, "b": None, "c": -3e-7, "d": 90.0}
    write_rows(tmp_path, row, name="tiny")
    page = opened(write_report(tmp_path))
    page.locator("#analysis-1 summary").click()
    page.locator("#analysis-1 thead th.number button").click()
    assert page.locator("#analysis-1 tbody th").all_inner_texts() == ["c", "d", "a", "b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_does_not_scroll_sideways(hostile: Path, opened: Callable[..., Any], scheme: str) -> None:
    page = opened(hostile, width=400, color_scheme=scheme)
    page.locator("figure.chart").first.scroll_into_view_if_needed()
    page.locator("figure.chart .plot svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 24, 29)"}[scheme]


def test_words_without_an_end_do_not_widen_the_page(
    opened: Callable[..., Any], tmp_path: Path, golden_row: Build, write_rows: Callable[..., Path]
) -> None:
    folder = tmp_path / ("w" * 80) / ("v" * 80)
    row = golden_row(1, blocks=["h.0", "b" * 200])
    row["metrics"] |= {"m" * 150: 1.0, "a/" + "b" * 150: 2.0}
    row["result"]["notes"] = ["n" * 300]
    write_rows(folder, row, name="i" * 60)
    write_rows(folder, {**row, "analysis": "t" * 100}, name="u" * 60)
    (folder / "config.yaml").write_text(f"{'k' * 200}: {'z' * 500}\nmodel: {'M' * 200}\n")
    page = opened(write_report(folder), width=400)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.locator("figure.chart").first.scroll_into_view_if_needed()
    page.locator("figure.chart .plot svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_figures_of_several_parts_fit_a_narrow_window(
    opened: Callable[..., Any], tmp_path: Path, golden_row: Build, write_rows: Callable[..., Path]
) -> None:
    shares = {"loss_shares": {"h.0": -0.5, "h.1": 0.25}, "function_shares": {"h.0": 0.75, "h.1": 0.25}}
    result = {**shares, "regime": "lazy", "thresholds": {"lazy": 0.1, "nonlinear": 0.5}, "n_targets": 40, "fits": []}
    metrics = {"change": -1.0, "first_order": -0.9, "nonlinearity": 0.05, "loss": 1.0, "base_loss": 2.0}
    rows = [
        golden_row(step) | {"analysis": "taylor_diff", "name": "taylor_diff", "result": result, "metrics": metrics}
        for step in (1, 2)
    ]
    write_rows(tmp_path, *rows, name="taylor_diff")
    page = opened(write_report(tmp_path), width=400)
    figures = page.locator("#analysis-1 figure.chart .plot")
    assert figures.count() == 2
    for place in range(figures.count()):
        figures.nth(place).scroll_into_view_if_needed()
        figures.nth(place).locator("svg").first.wait_for()
    page.wait_for_function(
        "[...document.querySelectorAll('#analysis-1 .plot')].every(plot => plot.scrollWidth <= plot.clientWidth + 1)"
    )


def test_a_legend_of_long_names_is_not_cut(
    opened: Callable[..., Any], tmp_path: Path, golden_row: Build, write_rows: Callable[..., Path]
) -> None:
    names = [f"loss of the validation set number {number}" for number in range(4)]
    spec = {
        "data": {"name": "points"},
        "mark": "line",
        "encoding": {
            "x": {"field": "x", "type": "quantitative"},
            "y": {"field": "x", "type": "quantitative"},
            "color": {"field": "line", "legend": {"orient": "top", "columns": 2, "labelLimit": 180}},
        },
    }
    figure = Figure(spec, {"points": {"x": [1, 2] * 4, "line": [name for name in names for _ in range(2)]}})
    write_rows(tmp_path, golden_row(1) | {"analysis": "named", "metrics": {}, "result": {}}, name="named")
    register_figure("named", "lines", heading="Lines")(lambda row: figure)
    try:
        page = opened(write_report(tmp_path), width=400)
    finally:
        FIGURES.pop("named")
    plot = page.locator("#analysis-1 .plot")
    plot.locator("svg").wait_for()
    page.wait_for_function(
        "(() => { const svg = document.querySelector('#analysis-1 .plot svg');"
        " const labels = [...svg.querySelectorAll('.role-legend-label text')];"
        " const edge = svg.getBoundingClientRect().right + 1;"
        " return labels.length === 4 && labels.every(label => label.getBoundingClientRect().right <= edge); })()"
    )


def test_everything_is_reached_by_the_keyboard(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "SUMMARY", "INPUT", "BUTTON"} <= reached


def test_the_keyboard_goes_down_the_page(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    page.evaluate("window.last = null")
    for _ in range(25):
        page.keyboard.press("Tab")
        forward = page.evaluate(
            "() => { const now = document.activeElement, before = window.last; window.last = now;"
            " return !before || now === document.body || Boolean(before.compareDocumentPosition(now) & 4); }"
        )
        assert forward
    visible = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert visible != "none"


def test_paper_is_white_and_has_no_controls(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert not page.locator(".download").first.is_visible()
    # What is folded is named, and not printed.
    folded = page.locator("details.more").first
    assert "folded on the page" in folded.locator("summary").evaluate(
        "part => getComputedStyle(part, '::after').content"
    )
    assert not folded.locator(":scope > :not(summary)").first.is_visible()
    marks = page.evaluate(
        "['solid', 'weak', 'not-measured'].map(name => { const mark = document.createElement('span');"
        " mark.className = `trust ${name}`; document.body.append(mark); return getComputedStyle(mark).color; })"
    )
    # Dark enough for white paper, whatever the screen's colours are.
    assert all(max(int(part) for part in re.findall(r"\d+", mark)) <= 0x6B for mark in marks)


def test_what_is_printed_is_whole_and_light(hostile: Path, opened: Callable[..., Any]) -> None:
    # As wide as what margins leave of a letter's sheet, and as high.
    width, height = 710, 950
    page = opened(hostile, width=width, height=height, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "[...document.querySelectorAll('figure.chart')].every(figure => figure.closest('details:not([open])')"
        " || figure.querySelector('svg, canvas'))"
    )
    # Nobody waits for a figure that is folded.
    assert page.locator("details:not([open]) .plot svg, details:not([open]) .plot canvas").count() == 0
    inks = page.evaluate(
        "[...document.querySelectorAll('.plot svg .role-axis-label text')].map(text => text.getAttribute('fill'))"
    )
    assert inks
    assert all(max(int(ink[place : place + 2], 16) for place in (1, 3, 5)) < 0x80 for ink in inks), set(inks)
    answers = page.locator("#answers").bounding_box()
    assert answers["y"] + answers["height"] <= height
    kept = page.evaluate(
        "[...document.querySelectorAll('#answers, .answer, figure, .summary div, tr')]"
        ".filter(part => getComputedStyle(part).breakInside !== 'avoid').length"
    )
    assert kept == 0
    sheets = [part.bounding_box() for part in page.locator("figure.chart").all() if part.is_visible()]
    assert max(box["height"] for box in sheets) <= height
    assert max(box["x"] + box["width"] for box in sheets) <= width
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("width", [1280, 400])
def test_all_figures_are_drawn_and_nothing_is_told_on_the_console(
    opened: Callable[..., Any], tmp_path: Path, width: int
) -> None:
    page = opened(write_report(RUN, tmp_path / "report.html"), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    figures = page.locator("figure.chart:not(.old)")
    assert figures.count() >= 30
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        figure.locator(".plot svg, .plot canvas").first.wait_for()
        if figure.locator("input").count():
            figure.locator("input").evaluate("part => { part.value = 0; part.dispatchEvent(new Event('input')); }")
    assert page.locator(".plot", has_text="could not be drawn").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_heading_tells_its_definition(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile)
    heads = page.locator("#cost thead th")
    told = [heads.nth(place).get_attribute("title") for place in range(heads.count())]
    assert all(told)
    assert page.locator("summary", has_text="Definition").count() >= 2


@pytest.mark.parametrize("width", [1280, 400])
def test_a_link_to_when_not_to_believe_an_answer_opens_it(
    opened: Callable[..., Any], tmp_path: Path, width: int
) -> None:
    page = opened(write_report(RUN, tmp_path / "report.html"), width=width)
    link = page.get_by_text("when not to believe it", exact=True).first
    target = page.locator(str(link.get_attribute("href")))
    assert not target.locator("ul").is_visible()
    link.click()
    target.locator("ul").wait_for()
    page.evaluate("document.querySelectorAll('details.told').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
