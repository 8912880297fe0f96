"""Coupling does not depend on how many processes made it, nor on how they share the model."""

from __future__ import annotations

import pytest
import torch

from lightning_goldy.analysis import CouplingResult
from tests.distributed.coupling_checks import CASES, SHARDED_CASES, all_cases, alone, refusals, through_a_folder
from tests.distributed.launch import run_processes


def same(text: str, expected: CouplingResult) -> None:
    found = CouplingResult.from_json(text)
    for name in ("matrix", "norms", "log_probs"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12, equal_nan=True
        )
    for name in ("failed", "pieces", "parameters", "projection_error"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("replicas", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("shards", 2), ("replicas", 3)])],
)
def test_any_number_of_processes_gives_the_matrix_of_one(layout: str, world_size: int) -> None:
    cases = SHARDED_CASES if layout == "shards" else CASES
    expected = alone(cases)
    for texts in run_processes(all_cases, world_size, layout, cases):
        for text, result in zip(texts, expected, strict=True):
            same(text, result)
            cost = CouplingResult.from_json(text).cost
            # A pass that fails is repeated piece by piece, and which pieces share one depends on the number of
            # replicas; that its cost is what ran, every rank has checked against hooks.
            if not result.failed or world_size == 2:
                assert cost == result.cost


@pytest.mark.slow
def test_a_folder_is_shared_and_gone_on_with(tmp_path) -> None:
    (expected, *_) = alone([{}])
    for text in run_processes(through_a_folder, 2, str(tmp_path / "blocks")):
        same(text, expected)


@pytest.mark.slow
def test_what_cannot_be_done_is_said_on_every_rank() -> None:
    wanted = [
        "under tensor parallelism",
        "norm.weight' cannot be taken",
        "layer.weight' cannot be taken",
        "layer.weight' cannot be taken",
        "under FSDP2",
        "pass workspace=",
        "piece 1, id",
    ]
    for messages in run_processes(refusals, 2):
        assert len(messages) == len(wanted)
        for message, part in zip(messages, wanted, strict=True):
            assert part in message
