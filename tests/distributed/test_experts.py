"""Stacked experts are analysed one by one, however their first dimension is spread over processes."""

from __future__ import annotations

import pytest

from tests.distributed.expert_checks import check_all, results
from tests.distributed.launch import run_processes


@pytest.mark.parametrize("layout", ["rows", pytest.param("columns", marks=pytest.mark.slow)])
def test_four_experts_on_three_processes_are_those_of_one(layout: str) -> None:
    assert run_processes(check_all, 3, layout, results("alone")) == [0, 1, 2]
