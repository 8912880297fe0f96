from __future__ import annotations

import json

import pytest

from lightning_goldy.analysis import parameter_distribution
from lightning_goldy.callbacks import GoldenSnapshot, ParameterDistribution
from lightning_goldy.report.figures import draw_figures
from tests.callbacks.training import fit


def test_it_logs_what_the_function_finds_and_rows_can_be_drawn(tmp_path) -> None:
    snapshot, shape = GoldenSnapshot(), ParameterDistribution(top=3, at=("start", "end"))
    _, module, _ = fit(tmp_path, [snapshot, shape], max_epochs=1)
    first, last = (json.loads(line) for line in (shape.folder / "results.jsonl").read_text().splitlines())
    expected = parameter_distribution(module.model, snapshot.base, top=3)
    found = {row["name"]: row for row in last["result"]["tensors"]}
    for row in expected.rows:
        change = found[row["name"]]["relative_change"]
        # A bias that starts at zero has no relative change.
        assert change is None if row["relative_change"] is None else change == pytest.approx(row["relative_change"])
        if "stable_rank" in row:
            assert found[row["name"]]["stable_rank"] == pytest.approx(row["stable_rank"], rel=1e-6)
            assert found[row["name"]]["alignment_over_chance"] == pytest.approx(
                row["alignment"] / row["alignment_chance"], rel=1e-6
            )
    for block, value in expected.by_block("stable_rank").items():
        assert last["metrics"][f"stable_rank/{block}"] == pytest.approx(value, rel=1e-6)
    assert last["metrics"]["stable_rank"] > 1
    assert first["metrics"]["stable_rank"] is None
    for row in (first, last):
        assert set(draw_figures(row)) == {"blocks"}


def test_the_relative_change_is_that_of_the_snapshot(tmp_path) -> None:
    snapshot, shape = GoldenSnapshot(at=("end",)), ParameterDistribution(at=("end",))
    fit(tmp_path, [snapshot, shape], max_epochs=1)
    ours, theirs = (
        json.loads((callback.folder / "results.jsonl").read_text().splitlines()[-1])["metrics"]
        for callback in (shape, snapshot)
    )
    names = {name for name in theirs if name.startswith("relative_change")}
    assert len(names) > 3
    assert {name for name in ours if name.startswith("relative_change")} == names
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


def test_it_needs_a_snapshot(tmp_path) -> None:
    with pytest.raises(ValueError, match="add GoldenSnapshot"):
        fit(tmp_path, [ParameterDistribution()])
    with pytest.raises(ValueError, match="exact_below must be at least 1"):
        ParameterDistribution(exact_below=0)
