"""A rank that fails leaves no other one waiting, and an analysis is not seen by the reducer of gradients."""

from __future__ import annotations

from tests.distributed.fault_checks import left_behind, reducers, survived
from tests.distributed.launch import run_processes


def checks() -> tuple[dict[str, object], dict[str, bool]]:
    """All of it in one world; the case that breaks the group of the ranks comes last."""
    counted = reducers()
    return survived(), counted


def test_the_others_hear_of_a_failure_and_go_on_together() -> None:
    ranks = run_processes(checks, 2)
    for _, counted in ranks:
        assert set(counted.values()) == {True}, counted
    (first, _), (second, _) = ranks
    places = [name for name in first if name.startswith(("before", "inside"))]
    assert len(places) == 7
    for name in places:
        assert first[name] == "RankError: the work failed on rank 1: MemoryError: no room", name
        assert second[name] == "MemoryError: no room", name
    for rank in (first, second):
        assert "different places" in rank["elsewhere"]
        assert "rank 0 at the sum of (3,)" in rank["elsewhere"]
        assert "rank 1 at the sum of (2,)" in rank["elsewhere"]
        assert "the probe differs between ranks: ranks [1]" in rank["another value"]
        assert rank["in time"] == [0, 1]
    assert first["a signal"] == second["a signal"] == ["2.0", "heard", "2.0"]
    assert first["alone"] is None
    assert first["waited"] < 15


def test_a_rank_that_ends_before_the_first_analysis_is_not_waited_for() -> None:
    waited = run_processes(left_behind, 2, timeout=60)[0]
    assert waited < 30
