"""Tables of the docs whose cells say how something went, and whose messages are notes below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Cells = Mapping[tuple[str, str], str]
"""By row and column: a manner, or a manner and a message after ``: ``."""


def render(introduction: str, corner: str, rows: Iterable[str], columns: Iterable[str], cells: Cells) -> str:
    """The page: a table whose cells carry the numbers of notes below it."""
    columns = list(columns)
    notes: dict[str, int] = {}
    lines = []
    for row in rows:
        words = [row]
        for column in columns:
            manner, _, message = cells[row, column].partition(": ")
            words.append(f"{manner} [{notes.setdefault(message, len(notes) + 1)}]" if message else manner)
        lines.append(f"| {' | '.join(words)} |")
    head = f"| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
    below = "\n".join(f"{number}. {message}" for message, number in notes.items())
    return "\n".join([introduction, head, *lines, "", "## Notes", "", below, ""])


def read(page: str) -> dict[tuple[str, str], str]:
    """The cells of a page, by row and column, with their notes written out."""
    notes = {match[1]: match[2] for match in re.finditer(r"^(\d+)\. (.*)$", page, re.MULTILINE)}
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    found = {}
    for row, *words in lines[1:]:
        for column, cell in zip(lines[0][1:], words, strict=True):
            manner, _, note = cell.partition(" [")
            found[row, column] = f"{manner}: {notes[note.rstrip(']')]}" if note else manner
    return found
