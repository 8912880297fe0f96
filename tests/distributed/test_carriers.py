"""What carries a change is the same on any number of processes."""

from __future__ import annotations

from tests.distributed.carrier_checks import check_all
from tests.distributed.launch import run_processes


def test_two_processes_find_what_one_finds() -> None:
    assert run_processes(check_all, 2) == [0, 1]
