"""Pictures of one pixel: drawing takes half of a small run, and the tests of the report draw every kind."""

from __future__ import annotations

import pytest

from tests.references.common import one_pixel


@pytest.fixture(autouse=True)
def _pictures_of_one_pixel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.path.name != "test_log_row.py":
        monkeypatch.setattr("lightning_goldy.report.figures.png_of", one_pixel)
