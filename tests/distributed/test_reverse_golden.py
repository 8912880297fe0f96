"""What a model hangs on does not depend on how many processes looked for it."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_processes
from tests.distributed.reverse_golden_checks import all_cases


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("replicas", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("shards", 2), ("replicas", 3)])],
)
def test_any_number_of_processes_finds_the_mask_of_one(layout: str, world_size: int) -> None:
    expected = all_cases("replicas")
    for found in run_processes(all_cases, world_size, layout):
        for mine, alone in zip(found, expected, strict=True):
            assert mine["same"]
            assert mine["count"] == alone["count"]
            # Gradients are summed in another order, which may swap elements that score the same to six digits.
            swapped = int((mine["mask"] & ~alone["mask"]).sum())
            assert swapped <= 0.02 * alone["count"]
            assert mine["single_shots"] == pytest.approx(alone["single_shots"], rel=1e-3)
            assert mine["kl"] == pytest.approx(alone["kl"], rel=1e-3)
            assert mine["kls"] == pytest.approx(alone["kls"], rel=1e-3)
