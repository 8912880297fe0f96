"""Ripple effects do not depend on how many processes made the edits."""

from __future__ import annotations

import pytest
import torch

from lightning_goldy.analysis.ripple import RippleResult
from tests.distributed.launch import run_processes
from tests.distributed.ripple_checks import CASES, effects, replicas, shards


@pytest.mark.slow
def test_replicas_share_edits_and_find_the_same() -> None:
    expected = [effects(*case) for case in CASES]
    assert all(bool((alone.delta_norm > 0).all()) for alone in expected)
    for texts in run_processes(replicas, 2):
        for text, alone in zip(texts, expected, strict=True):
            found = RippleResult.from_json(text)
            for name, value in vars(alone).items():
                mine = getattr(found, name)
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-6, msg=name)
                else:
                    assert mine == value, name


@pytest.mark.slow
def test_shards_are_refused_by_name() -> None:
    for message in run_processes(shards, 2):
        assert "'model.embed_tokens.weight' is a DTensor, sharded by FSDP2 (fully_shard)" in message
        assert "load the weights into a plain copy of the model" in message
