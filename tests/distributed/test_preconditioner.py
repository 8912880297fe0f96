"""Preconditioners of a model in shards or replicas are those of one process."""

from __future__ import annotations

from tests.distributed.launch import run_processes
from tests.distributed.preconditioner_checks import check_diagonal, check_kronecker


def checks() -> tuple[bool, bool]:
    return check_diagonal(), check_kronecker()


def test_two_processes_equal_one_with_shards_and_with_replicas() -> None:
    assert run_processes(checks, 2) == [(True, True)] * 2
