from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_goldy.data import PackedBlocks, pack

documents_of_tokens = st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=8)


@settings(max_examples=300, deadline=None)
@given(documents_of_tokens, st.integers(2, 9), st.sampled_from(["keep", "drop"]))
def test_blocks_in_a_row_are_the_documents_with_eos(
    documents: list[list[int]], block_size: int, last_block: str
) -> None:
    expected = [token for document in documents for token in [*document, 0]]
    options = {"block_size": block_size, "eos_token_id": 0, "last_block": last_block}
    if len(expected) < block_size:
        with pytest.raises(ValueError, match=f"block_size={block_size} is longer than the text"):
            pack(documents, **options)  # type: ignore[arg-type]
        return
    stream = pack(documents, **options)  # type: ignore[arg-type]
    n_blocks = -(-len(stream) // block_size)
    blocks = [PackedBlocks(stream, block_size, range(n_blocks), pad_token_id=100)[index] for index in range(n_blocks)]

    tokens = torch.cat([block["input_ids"][block["attention_mask"] == 1] for block in blocks]).tolist()
    short = len(expected) % block_size
    missing = short if last_block == "drop" or short == 1 else 0
    assert tokens == expected[: len(expected) - missing]
    for block in blocks:
        assert all(value.shape == (block_size,) and value.dtype == torch.int64 for value in block.values())
        real = block["attention_mask"] == 1
        assert torch.equal(block["labels"][real], block["input_ids"][real])
        assert (block["labels"][~real] == -100).all()
        assert (block["input_ids"][~real] == 100).all()
        assert real.sum() >= 2  # there is something to predict
    assert all(block["attention_mask"].all() for block in blocks[:-1])


def test_subset_and_order_of_blocks() -> None:
    blocks = PackedBlocks(torch.arange(9), 3, [2, 0], pad_token_id=0)
    assert [block["input_ids"].tolist() for block in (blocks[0], blocks[1])] == [[6, 7, 8], [0, 1, 2]]
    assert len(blocks) == 2


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="block_size=1 must be at least 2"):
        pack([[1, 2]], block_size=1, eos_token_id=0)
    with pytest.raises(ValueError, match="unknown last_block 'kept'; did you mean 'keep'"):
        pack([[1, 2]], block_size=2, eos_token_id=0, last_block="kept")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which has 3 tokens in 1 documents"):
        pack([[1, 2]], block_size=4, eos_token_id=0)
