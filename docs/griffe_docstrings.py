"""Docstrings as the pages of the API show them: cross-references as links, equations as mathematics."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

import lightning_goldy

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
_EQUATION = re.compile(r"^\.\. math::[ ]*(.*)\n((?:[ \t]*\n|[ \t]+.*(?:\n|\Z))*)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")
# What the parser knows as a section of examples, whose code it sets as code.
_EXAMPLE = re.compile(r"^Example:$", re.M)


class Docstrings(griffe.Extension):
    """Turns the roles and equations of docstrings into Markdown.

    Example:
        >>> to_markdown(":func:`~lightning_goldy.analysis.taylor_diff` of :math:`x`")
        '<autoref optional identifier="lightning_goldy.analysis.taylor_diff"><code>taylor_diff</code></autoref> of $x$'
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class and function."""
        if obj.docstring is None:
            return
        text = to_markdown(obj.docstring.value)
        if isinstance(obj, griffe.Class) and any(str(base).endswith("NamedTuple") for base in obj.bases):
            # Its signature is not in the source, so that the parser finds no arguments to describe.
            text = text.replace("Args:\n", "Attributes:\n")
        obj.docstring.value = text


def to_markdown(text: str) -> str:
    """A docstring with links and dollar signs."""

    def link(match: re.Match[str]) -> str:
        shortened, target = match.groups()
        label = target.rpartition(".")[2] if shortened else target
        name = target.removeprefix("lightning_goldy.")
        if name in lightning_goldy._EXPORTS:
            target = f"lightning_goldy.{lightning_goldy._EXPORTS[name]}.{name}"
        if not target.startswith("lightning_goldy."):
            return f"`{label}`"
        # Optional: what has no entry of its own stays a name.
        return f'<autoref optional identifier="{target}"><code>{label}</code></autoref>'

    def display(match: re.Match[str]) -> str:
        lines = textwrap.dedent(f"{match[2]}").strip() or ""
        return f"$$\n{' '.join(part for part in (match[1].strip(), lines) if part)}\n$$\n\n"

    text = _EXAMPLE.sub("Examples:", _EQUATION.sub(display, text))
    return _ROLE.sub(link, _INLINE.sub(lambda match: f"${match[1]}$", text))
