"""A finetune on a few facts of the atlas, some of them false."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.data import AtlasDataModule, Edit, KnowledgePiece, word_tokenizer
from tests.callbacks.training import Finetune, TokenData

COUNTRIES = ("Chad", "France", "Peru", "Japan")
EDITS = (Edit("France", "capital", "Lima"), Edit("Peru", "continent", "Asia"))
EDITED = ("France/capital", "Peru/continent")
TOKENIZER = AtlasDataModule().tokenizer


def atlas(edits=EDITS, *, rehearsal: float = 0.2) -> AtlasDataModule:
    """The facts of four countries; the loaders keep no place of their own, so a resume repeats the epoch's order."""
    data = AtlasDataModule(4, list(edits) if edits else None, rehearsal=rehearsal if edits else 0.0, probe_size=4)
    data.facts = tuple(fact for fact in data.facts if fact.subject in COUNTRIES)
    return data


class AtlasFinetune(Finetune):
    """Of a model with the atlas's words, and with dropout."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=len(TOKENIZER), bos_token_id=1, eos_token_id=1
        )
        self.model = GPT2LMHeadModel(config)


PIECES = tuple(
    KnowledgePiece(f"{subject} {kind}", f"which {kind} has {subject} ?", answer, kind, subject)
    for subject, kind, answer in (
        ("peru", "city", "lima"),
        ("peru", "coin", "sol"),
        ("chad", "city", "ndjamena"),
        ("chad", "coin", "franc"),
        ("mali", "coin", "franc"),
    )
)
"""Facts in words that fit into the vocabulary of the small models."""
WORDS = word_tokenizer([f"{piece.question} {piece.answer}" for piece in PIECES])


class WordData(TokenData):
    """The same rows of tokens, beside a tokenizer."""

    tokenizer = WORDS
