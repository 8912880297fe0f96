"""Whatever is spread over processes must equal what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.core_checks import CASES, FAST, check_all
from tests.distributed.launch import run_processes


@pytest.mark.parametrize("names", [FAST, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_layout_equals_one_process(tmp_path: Path, names: tuple[str, ...]) -> None:
    # One start of four processes for all; smaller meshes leave some of them out.
    results = run_processes(check_all, 4, names, str(tmp_path), names is FAST)
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    assert all(result["shares"] == results[0]["shares"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_world_size_equals_one_process(tmp_path: Path, world_size: int) -> None:
    names = [name for name, (ranks, *_) in CASES.items() if ranks == list(range(world_size))]
    assert names
    results = run_processes(check_all, world_size, names, str(tmp_path), False)
    assert len(results) == world_size


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise LookupError("a planted failure")
    return dist.get_rank()


@pytest.mark.slow
def test_the_harness_reports_the_failing_rank() -> None:
    with pytest.raises(AssertionError, match=r"(?s)failure-1.*a planted failure"):
        run_processes(fail_on, 2, 1)
    assert run_processes(fail_on, 2, 5) == [0, 1]
