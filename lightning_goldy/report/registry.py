"""Which plotly and matplotlib figures belong to which analysis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lightning_goldy.report.figures import ReportError, Row, require
from lightning_goldy.report.history import with_history

__all__ = ["FigureRegistry", "ReportError", "Row", "require"]
Figure = TypeVar("Figure")


class FigureRegistry(Generic[Figure]):
    """Functions that turn a row of ``results.jsonl`` into a figure, by analysis and figure name.

    Args:
        kind: What the figures are made with; it appears in error messages.

    Example:
        >>> registry = FigureRegistry("text")
        >>> @registry.register("golden_parameters", "count")
        ... def count(row):
        ...     return f"{row['metrics']['count']} golden"
        >>> registry.draw({"analysis": "golden_parameters", "metrics": {"count": 3}})
        {'count': '3 golden'}
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, dict[str, Callable[[Row], Figure]]] = {}

    def register(self, analysis: str, name: str) -> Callable[[Callable[[Row], Figure]], Callable[[Row], Figure]]:
        """Decorator that adds a figure to an analysis.

        Args:
            analysis: The ``analysis`` field of the rows that it draws.
            name: Name of the figure, unique within the analysis.

        Raises:
            ValueError: The analysis has a figure of that name.
        """

        def add(function: Callable[[Row], Figure]) -> Callable[[Row], Figure]:
            figures = self._functions.setdefault(analysis, {})
            if name in figures:
                known = f"{figures[name].__module__}.{figures[name].__qualname__}"
                raise ValueError(f"analysis {analysis!r} has a {self.kind} figure {name!r} already: {known}")
            figures[name] = function
            return function

        return add

    def names(self, analysis: str) -> tuple[str, ...]:
        """Names of the figures of an analysis, in the order of their registration; none when it is unknown."""
        return tuple(self._functions.get(analysis, ()))

    def draw(self, row: Row, earlier: Sequence[Row] = ()) -> dict[str, Figure]:
        """Draws every figure of the row's analysis; an analysis without figures gives an empty dict.

        Args:
            row: What is drawn.
            earlier: Rows of the same analysis before it, for the figures over the run.

        Raises:
            ReportError: The row lacks what a figure needs.
        """
        functions = self._functions.get(row["analysis"], {})
        drawn = with_history(row, earlier) if functions else row
        return {name: function(drawn) for name, function in functions.items()}
