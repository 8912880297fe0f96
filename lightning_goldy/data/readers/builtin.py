"""The formats that come with the package, the general ones first: see ``FORMATS``."""

from __future__ import annotations

from lightning_goldy.data.readers.formats import FORMATS, Format, has
from lightning_goldy.data.readers.multihop import is_hotpotqa, parse_2wiki, parse_hotpotqa, parse_musique
from lightning_goldy.data.readers.plain import (
    PIECE_FIELDS,
    is_bamboogle,
    is_csv,
    is_piece,
    is_short,
    parse_bamboogle,
    parse_csv,
    parse_piece,
    parse_short,
)
from lightning_goldy.data.readers.relational import is_atlas, parse_atlas, parse_wikihop

_OWN = ", ".join(PIECE_FIELDS)
_HOTPOT = "_id, question, answer, type, supporting_facts, context"
_MUSIQUE = "id, question, answer, answerable, paragraphs, question_decomposition"

FORMATS.register("jsonl")(Format(parse_piece, is_piece, _OWN, repeated="error"))
FORMATS.register("csv")(Format(parse_csv, is_csv, f"columns {_OWN}", repeated="error"))
FORMATS.register("qa")(Format(parse_short, is_short, "Question, answer (text or a list)"))
FORMATS.register("bamboogle")(Format(parse_bamboogle, is_bamboogle, "Question, Answer"))
FORMATS.register("wikihop")(
    Format(parse_wikihop, has("query", "candidates"), "id, query, answer, candidates, supports", relations=True)
)
FORMATS.register("hotpotqa")(Format(parse_hotpotqa, is_hotpotqa, _HOTPOT))
FORMATS.register("2wikimultihopqa")(
    Format(
        parse_2wiki,
        has("question", "context", "evidences"),
        f"{_HOTPOT}, evidences",
        whole_questions=True,
        relations=True,
    )
)
FORMATS.register("musique")(
    Format(parse_musique, has("question", "paragraphs"), _MUSIQUE, whole_questions=False, relations=True)
)
FORMATS.register("atlas")(Format(parse_atlas, is_atlas, "none, it is embedded", whole_questions=False, relations=True))
