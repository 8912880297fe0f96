"""What the page says of metrics: one name has one meaning, whichever analysis logs it."""

from __future__ import annotations

import pytest

import lightning_goldy.report  # noqa: F401  (describes every analysis)
from lightning_goldy.report import descriptions
from lightning_goldy.report.descriptions import Description


def differing(described: dict[str, Description]) -> dict[str, set[str]]:
    """Names with several meanings: what differs before the first semicolon; after it stands how they are split up."""
    meanings: dict[str, set[str]] = {}
    for description in described.values():
        for name, text in description.metrics.items():
            meanings.setdefault(name, set()).add(text.partition(";")[0])
    return {name: texts for name, texts in meanings.items() if len(texts) > 1}


def test_a_name_means_the_same_in_every_analysis() -> None:
    assert len(descriptions._DESCRIPTIONS) > 10
    assert differing(descriptions._DESCRIPTIONS) == {}


@pytest.mark.parametrize(
    ("second", "found"), [("a ratio; by block", {}), ("mean ratio", {"x": {"a ratio", "mean ratio"}})]
)
def test_two_meanings_are_noticed(second: str, found: dict[str, set[str]]) -> None:
    described = [Description("", "", "", {"x": text}) for text in ("a ratio", second)]
    assert differing(dict(zip("ab", described, strict=True))) == found


def test_every_analysis_says_how_it_was_done() -> None:
    silent = {name for name, described in descriptions._DESCRIPTIONS.items() if not described.method}
    # What these tell is in their rows: differences of weights, texts, and losses of models that others describe.
    assert silent == {"golden_snapshot", "continuations", "variant_losses"}
