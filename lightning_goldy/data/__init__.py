"""Lightning data modules, each with a probe set that analyses use."""

from __future__ import annotations

from lightning_goldy.core.pieces import KnowledgePiece, PadCollator, encode_pairs
from lightning_goldy.data.atlas import AtlasDataModule, Edit, apply_edits, random_edits
from lightning_goldy.data.base import ProbeDataModule, ResumableDataLoader, SeededShuffle, Splits
from lightning_goldy.data.knowledge import KnowledgeDataModule, read_pieces
from lightning_goldy.data.prompt_pairs import (
    PairTask,
    TextPair,
    TooFewPairsError,
    atlas_pairs,
    greater_than_pairs,
    indirect_object_pairs,
    induction_pairs,
    pairs_of_task,
    split_of_task,
    text_pairs,
)
from lightning_goldy.data.readers import PieceSet, load_pieces, write_pieces
from lightning_goldy.data.relations import (
    RELATIONS,
    Country,
    Fact,
    Question,
    Relation,
    country_facts,
    load_countries,
    one_hop_questions,
    two_hop_questions,
)
from lightning_goldy.data.text import PackedBlocks, TextDataModule, pack
from lightning_goldy.data.tokenization import byte_tokenizer, load_tokenizer, word_tokenizer

__all__ = [
    "RELATIONS",
    "AtlasDataModule",
    "Country",
    "Edit",
    "Fact",
    "KnowledgeDataModule",
    "KnowledgePiece",
    "PackedBlocks",
    "PadCollator",
    "PairTask",
    "PieceSet",
    "ProbeDataModule",
    "Question",
    "Relation",
    "ResumableDataLoader",
    "SeededShuffle",
    "Splits",
    "TextDataModule",
    "TextPair",
    "TooFewPairsError",
    "apply_edits",
    "atlas_pairs",
    "byte_tokenizer",
    "country_facts",
    "encode_pairs",
    "greater_than_pairs",
    "indirect_object_pairs",
    "induction_pairs",
    "load_countries",
    "load_pieces",
    "load_tokenizer",
    "one_hop_questions",
    "pack",
    "pairs_of_task",
    "random_edits",
    "read_pieces",
    "split_of_task",
    "text_pairs",
    "two_hop_questions",
    "word_tokenizer",
    "write_pieces",
]
