"""Masks and masked training do not depend on how many processes hold the parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_processes
from tests.distributed.masked_checks import all_cases, mask_answers, resumed_cases


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return all_cases("one process", str(tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(
    "cases", [all_cases, pytest.param(resumed_cases, marks=pytest.mark.slow)], ids=["uninterrupted", "resumed"]
)
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_two_processes_train_as_one(tmp_path, alone, layout, cases):
    for found in run_processes(cases, 2, layout, str(tmp_path)):
        for mine, expected in zip(found, alone, strict=True):
            # The mean over two processes of one gradient is that gradient, to the last bit.
            assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_masks_on_shards_answer_as_whole_ones():
    expected = mask_answers()
    assert run_processes(mask_answers, 2) == [expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_masked_run_of_two_processes(tmp_path, strategy):
    """Scored by a callback, resumed from its checkpoint; what is outside keeps its bits on both ranks."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.masked_two_processes", strategy, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["world_size"] == 2
        assert found["changed_outside"] == 0
        assert found["changed_inside"] > 0.9 * found["inside"]
        assert found["mask_is_sharded"] == (strategy == "fsdp2")
        assert found["resumed_equals_uninterrupted"] is True
