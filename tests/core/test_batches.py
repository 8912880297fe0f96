from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from lightning_goldy.core.batches import batch_tensors, map_batch, split_batch

Pair = namedtuple("Pair", ["x", "y"])


def test_splitting_keeps_the_structure() -> None:
    batch = {"a": torch.arange(6).view(2, 3), "rest": [Pair(torch.tensor([1, 2]), "text"), (torch.ones(2, 1), None)]}
    parts = list(split_batch(batch))
    assert len(parts) == 2
    assert parts[1]["a"].tolist() == [[3, 4, 5]]
    assert isinstance(parts[1]["rest"][0], Pair)
    assert parts[1]["rest"][0].x.tolist() == [2]
    assert parts[1]["rest"][0].y == "text"
    assert parts[1]["rest"][1] == (torch.ones(1, 1), None)
    assert len(list(batch_tensors(batch))) == 3
    encoding = BatchEncoding({"input_ids": torch.arange(4).view(2, 2)})
    assert [part["input_ids"].tolist() for part in split_batch(encoding)] == [[[0, 1]], [[2, 3]]]
    assert [part.tolist() for part in split_batch(torch.arange(2))] == [[0], [1]]


@pytest.mark.parametrize(
    "batch",
    [{"text": "no tensor"}, {}, (torch.zeros(2), torch.zeros(3)), torch.tensor(1.0), (torch.zeros(2), torch.tensor(0))],
)
def test_batches_that_cannot_be_split(batch: Any) -> None:
    with pytest.raises(ValueError, match="must share their first dimension; found shapes"):
        list(split_batch(batch))


def test_mapping_leaves_other_values() -> None:
    found = map_batch({"x": torch.ones(2), "n": 3, "s": ["a", torch.zeros(1)]}, lambda tensor: tensor + 1)
    assert found["x"].tolist() == [2, 2]
    assert found["n"] == 3
    assert found["s"][0] == "a"
    assert found["s"][1].item() == 1
