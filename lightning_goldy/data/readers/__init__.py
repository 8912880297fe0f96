"""Readers of knowledge pieces: public multi-hop question sets, tables, JSON, datasets, the embedded atlas."""

from __future__ import annotations

from lightning_goldy.data.readers import builtin  # noqa: F401, it fills the registry
from lightning_goldy.data.readers.formats import FORMATS, Format, Reading
from lightning_goldy.data.readers.loading import OnMalformed, PieceSet, load_pieces, write_pieces
from lightning_goldy.data.readers.multihop import hop_question
from lightning_goldy.data.readers.records import Record, RecordError, SkippedRecord
from lightning_goldy.data.readers.wording import Form, word

__all__ = [
    "FORMATS",
    "Form",
    "Format",
    "OnMalformed",
    "PieceSet",
    "Reading",
    "Record",
    "RecordError",
    "SkippedRecord",
    "hop_question",
    "load_pieces",
    "word",
    "write_pieces",
]
