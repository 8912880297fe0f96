"""Attention statistics do not depend on how many processes measured them."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.attention_checks import statistics
from tests.distributed.launch import run_processes


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("shards", 2), *(pytest.param("replicas", count, marks=pytest.mark.slow) for count in (2, 5))],
)
def test_any_number_of_processes_gives_the_statistics_of_one(layout: str, world_size: int) -> None:
    expected = statistics("replicas")
    results = run_processes(statistics, world_size, layout)
    for found in results:
        for which in ("statistics", "without_base"):
            for name, value in expected[which].items():
                torch.testing.assert_close(found[which][name], value, rtol=0, atol=1e-6, equal_nan=True, msg=name)
        assert torch.equal(found["queries"], expected["queries"])
        assert found["samples"] == expected["samples"] == (6, 5)
        torch.testing.assert_close(found["map"], expected["map"], rtol=0, atol=1e-6)
        assert found["same"]
        # Once for each sample and its base, however many processes share them or walk through them together.
        assert found["forwards"] == expected["forwards"] == 2 * 6
