"""Error messages for names that do not exist: what was given, what is close to it, what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, valid: Iterable[str], listed: int = 40) -> str:
    """The message for a name that is not among the valid ones.

    Args:
        kind: What the name stands for, e.g. ``"country"``.
        name: The name that was given.
        valid: The valid names.
        listed: At most this many valid names are listed.

    Returns:
        One line with the close matches first, then the valid names.

    Example:
        >>> unknown_name("relation", "captial", ["capital", "currency"])
        "unknown relation 'captial'; did you mean 'capital'? Valid: capital, currency"
    """
    names = list(valid)
    by_case = {candidate.casefold(): candidate for candidate in names}
    close = [by_case[match] for match in difflib.get_close_matches(str(name).casefold(), by_case, n=3, cutoff=0.6)]
    hint = f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else "."
    rest = f", ... ({len(names)} in all)" if len(names) > listed else ""
    return f"unknown {kind} {name!r}{hint} Valid: {', '.join(names[:listed])}{rest}"
