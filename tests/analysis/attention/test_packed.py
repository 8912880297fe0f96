"""Statistics of packed rows against the same documents one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_goldy.analysis import attention_statistics
from lightning_goldy.analysis.attention.patterns import STATISTICS, Tokens
from lightning_goldy.training.subject import find_prompts
from tests.references.models import VOCABULARY, build

BOUNDS = ((0, 4), (4, 9), (9, 12))
IDS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])
NUMBERS = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
SEEN = ((NUMBERS[:, :, None] == NUMBERS[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"attention_mask": SEEN},
        {"attention_mask": torch.zeros(1, 1, 12, 12).masked_fill(~SEEN, torch.finfo(torch.float32).min)},
        {"cu_seq_lens_q": torch.tensor([0, 4, 9, 12], dtype=torch.int32)},
    ],
)
def test_packed_documents_count_as_they_do_alone(told: dict[str, Any]) -> None:
    model = build("llama").eval()
    whole = attention_statistics(model, [{"input_ids": IDS, "position_ids": POSITIONS, **told}])
    parts = [attention_statistics(model, [{"input_ids": IDS[:, start:stop]}]) for start, stop in BOUNDS]
    for index, name in enumerate(STATISTICS):
        counts = [part.queries[:, index, None] for part in parts]
        sums = [part.statistic(name).nan_to_num(0.0) * count for part, count in zip(parts, counts, strict=True)]
        assert torch.equal(whole.queries[:, index, None], sum(counts)), name
        expected = sum(sums) / sum(counts)  # type: ignore[arg-type]
        torch.testing.assert_close(whole.statistic(name), expected, rtol=0, atol=1e-6, equal_nan=True, msg=name)


def test_padding_beside_packed_documents() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    tokens = Tokens(torch.arange(12).view(2, 6), valid, documents)
    first = [row[kept].tolist() for row, kept in zip(tokens.first, valid, strict=True)]
    assert first == [[2, 2, 4, 4], [0, 1, 1, 1]]
    assert tokens.first_document(0).tolist() == [2, 3]
    assert tokens.rows(1, 2).first[0, :4].tolist() == [0, 1, 1, 1]


def test_the_prompt_that_the_probe_gives_is_its_first_document() -> None:
    model, trainer = build("llama"), type("Trainer", (), {"lightning_module": None, "datamodule": None})()
    (prompt,) = find_prompts(trainer, model, None, [{"input_ids": IDS, "position_ids": POSITIONS}], 32)
    assert torch.equal(prompt.batch["input_ids"], IDS[:, :4])
