"""Heads are scored, cut, frozen and grown alike on any number of processes."""

from __future__ import annotations

import pytest

from tests.distributed.head_checks import check_all
from tests.distributed.launch import run_processes


def test_two_processes_decide_as_one() -> None:
    assert run_processes(check_all, 2, True) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_family_and_layout(world_size: int) -> None:
    assert run_processes(check_all, world_size, False) == list(range(world_size))
