"""A volume does not depend on how many processes measured it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_processes
from tests.distributed.volume_checks import all_cases, bridged, replicas_cases


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("replicas", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("shards", 2), ("replicas", 3)])],
)
def test_any_number_of_processes_gives_the_estimates_of_one(layout: str, world_size: int, tmp_path: Path) -> None:
    expected = all_cases("replicas")
    if layout == "replicas":
        processes, bridges, resumed = zip(*run_processes(replicas_cases, world_size, str(tmp_path)), strict=True)
        for bridge, again in zip(bridges, resumed, strict=True):
            assert (again["numbers"], again["gradients"]) == (bridge["numbers"], bridge["gradients"])
            assert again["passed"] < 0.8 * bridge["passed"]
        assert not list(tmp_path.iterdir())
        one = bridged()
        for bridge in bridges:
            assert bridge["numbers"] == pytest.approx(one["numbers"], rel=1e-3)
            assert (bridge["gradients"], bridge["cost"], bridge["same"]) == (one["gradients"], one["cost"], True)
        assert one["cost"][0] == one["passed"]
        assert max(bridge["passed"] for bridge in bridges) < 0.9 * one["passed"]
    else:
        processes = run_processes(all_cases, world_size, layout)
    for found in processes:
        for mine, alone in zip(found, expected, strict=True):
            assert mine["same"]
            assert mine["estimates"] == pytest.approx(alone["estimates"], rel=1e-6)
            assert mine["radii"] == pytest.approx(alone["radii"], rel=1e-6)
            assert mine["evaluations"] == alone["evaluations"]
    for number, case in enumerate(expected):
        assert case["cost"] == case["passed"]
        # What every process repeats, such as the predictions at the anchor, counts once.
        assert {found[number]["cost"] for found in processes} == {case["cost"]}
        passed = [found[number]["passed"] for found in processes]
        # Sharded processes take part in every forward of every sample together.
        assert sum(passed) >= case["cost"] if layout == "replicas" else set(passed) == {case["cost"]}
