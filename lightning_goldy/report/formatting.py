"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "–"  # noqa: RUF001


def format_number(value: float | None) -> str:
    """Four significant digits; whole numbers in full with thousands separators.

    Args:
        value: None stands for a number that is not there.

    Example:
        >>> [format_number(value) for value in (1234567, 0.031249, 4e-7, 16.0, float("nan"), None)]
        ['1,234,567', '0.03125', '4e-07', '16', 'nan', '–']
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"


def format_cell(value: float) -> str:
    """Three digits, short enough for a cell of a heat map; a number that is not finite is missing.

    Example:
        >>> [format_cell(value) for value in (0.02437, 100.0, 1234.5, 4e7, float("nan"))]
        ['0.0244', '100', '1,234', '4e+07', '–']
    """
    if not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e5 else f"{value:.3g}"


def format_percent(share: float | None) -> str:
    """A share as a percentage with three significant digits.

    Example:
        >>> format_percent(0.0312), format_percent(3.9e-11), format_percent(None)
        ('3.12 %', '3.9e-09 %', '–')
    """
    return MISSING if share is None else f"{100 * share:.3g} %"


def format_seconds(seconds: float | None) -> str:
    """A duration in the units of a clock.

    Example:
        >>> [format_seconds(value) for value in (0.0123, 7.25, 125, 7260, None)]
        ['12.3 ms', '7.25 s', '2 min 5 s', '2 h 1 min', '–']
    """
    if seconds is None:
        return MISSING
    if 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def format_bytes(count: float | None) -> str:
    """A size in binary units.

    Example:
        >>> [format_bytes(value) for value in (0, 1536, 3 * 2**30, None)]
        ['0 B', '1.5 KiB', '3 GiB', '–']
    """
    if count is None:
        return MISSING
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
