"""A training that is killed at any instant, and resumed until it ends, is the one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.callbacks.killed import Kind, interrupted, outcome, started
from tests.callbacks.training import differences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "count"),
    [
        ("plain", signal.SIGKILL, 10),
        ("accumulated", signal.SIGKILL, 9),
        ("plasticity", signal.SIGKILL, 6),
        ("plain", signal.SIGTERM, 4),
        ("accumulated", signal.SIGTERM, 4),
        ("plasticity", signal.SIGTERM, 2),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_run_that_was_struck_ends_as_one_that_was_not(
    tmp_path: Path, kind: Kind, number: signal.Signals, count: int
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    process = started(whole, kind)
    process.join()
    assert process.exitcode == 0, (whole / "console").read_text()[-3000:]
    seconds = torch.load(whole / "final", weights_only=False)["seconds"]
    expected, expected_rows = outcome(whole)
    assert all(expected_rows.values())
    for run in interrupted(tmp_path, kind, number, count, seconds):
        found, rows = outcome(run)
        assert differences(expected, found) == []
        assert rows == expected_rows
