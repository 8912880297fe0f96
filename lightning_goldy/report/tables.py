"""Tables of texts that a model or data may have written, for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal


def texts_html(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers_from: int | None = None,
    wrap: Literal["anywhere", "normal"] = "anywhere",
) -> str:
    """A table whose every cell is escaped, and kept from reordering its neighbours.

    Args:
        headings: Plain texts.
        rows: Plain texts, one per heading.
        numbers_from: The first of the columns that hold numbers, which are the last ones; none by default.
        wrap: Where long words may break.

    Example:
        >>> page = texts_html(["asked", "times"], [["<b>", "3"]], numbers_from=1)
        >>> "&lt;b&gt;" in page, page.count('class="number"')
        (True, 2)
    """
    first = len(headings) if numbers_from is None else numbers_from
    marks = ["" if place < first else ' class="number"' for place in range(len(headings))]
    head = "".join(f'<th scope="col"{mark}>{escape(text)}</th>' for mark, text in zip(marks, headings, strict=True))

    def cell(mark: str, text: str) -> str:
        # Left-to-right marks and the like stay within their cell.
        return f'<td{mark}><bdi style="overflow-wrap:{wrap}">{escape(text)}</bdi></td>'

    lines = ("".join(cell(mark, text) for mark, text in zip(marks, cells, strict=True)) for cells in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
