"""Records in the true formats of public question sets, small enough to read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

HOTPOTQA: list[dict[str, Any]] = [
    {
        "_id": "5a7a06935542990198eaf050",
        "question": "Which magazine was started first, Arthur's Magazine or First for Women?",
        "answer": "Arthur's Magazine",
        "supporting_facts": [["Arthur's Magazine", 0], ["First for Women", 0]],
        "context": [
            ["Radio City", ["Radio City is India's first private FM radio station.", " It plays Hindi songs."]],
            [
                "Arthur's Magazine",
                ["Arthur's Magazine (1844-1846) was a literary periodical.", " It was merged in 1846."],
            ],
            ["First for Women", ["First for Women is a woman's magazine.", " It was started in 1989."]],
        ],
        "type": "comparison",
        "level": "medium",
    },
    {
        "_id": "5a879ab05542996e4f30887e",
        "question": "Were the Oberoi family and the Tata family both founded in Delhi?",
        "answer": "no",
        # The paragraph of the second is not there, as can be in the fullwiki setting; the third is beyond the end.
        "supporting_facts": [["Oberoi family", 0], ["Tata family", 0], ["Oberoi family", 7]],
        "context": [["Oberoi family", ["The Oberoi family is an Indian family.", " It is involved in hotels."]]],
        "type": "comparison",
        "level": "hard",
    },
    {
        "_id": "5abd94525542992ac4f382d2",
        "question": "In which city is the head office of the Oberoi Group?",
        "context": [["Oberoi family", ["The Oberoi family is an Indian family."]]],
    },
]
"""Two records of training and one of the test file, which has neither answer nor supporting facts."""

TWO_WIKI: list[dict[str, Any]] = [
    {
        "_id": "8813f87c0bdd11eba7f7acde48001122",
        "type": "compositional",
        "question": "Who is the mother of the director of film Polish-Russian War (Film)?",
        "context": [
            ["Maheen Khan", ["Maheen Khan is a designer.", "She is from Pakistan."]],
            ["Polish-Russian War (film)", ["Polish-Russian War", "It is a 2009 film directed by Xawery Żuławski."]],
            ["Xawery Żuławski", ["Xawery Żuławski is a director.", "He is the son of actress Małgorzata Braunek."]],
        ],
        "supporting_facts": [["Polish-Russian War (film)", 1], ["Xawery Żuławski", 1]],
        "evidences": [
            ["Polish-Russian War", "director", "Xawery Żuławski"],
            ["Xawery Żuławski", "mother", "Małgorzata Braunek"],
        ],
        "answer": "Małgorzata Braunek",
        "evidences_id": [["Q1", "director", "Q2"], ["Q2", "mother", "Q3"]],
        "answer_id": "Q3",
    },
    {
        "_id": "97954d9408b011ebbd84ac1f6bf848b6",
        "type": "bridge_comparison",
        "question": "Are the directors of Polish-Russian War and Coffee Blues of one country?",
        "context": [["Coffee Blues", ["Coffee Blues is a film by Ann Smith."]]],
        "supporting_facts": [["Coffee Blues", 0]],
        "evidences": [
            ["Polish-Russian War", "director", "Xawery Żuławski"],
            ["Coffee Blues", "director", "Ann Smith"],
            ["Ann Smith", "student of", "Bob Hale"],
        ],
        "answer": "no",
    },
    {"_id": "t1", "type": "", "question": "Who?", "context": [], "supporting_facts": [], "evidences": [], "answer": ""},
]
"""A chain, a comparison that shares a fact with it, and a record of the test file."""

_GREEN = {"idx": 3, "title": "Green", "paragraph_text": "Green is an album by Steve Hillage.", "is_supporting": True}
_HILLAGE = {"idx": 5, "title": "Hillage", "paragraph_text": "His partner is Miquette Giraudy.", "is_supporting": True}
_NOISE = {"idx": 0, "title": "Noise", "paragraph_text": "Nothing of use.", "is_supporting": False}

MUSIQUE: list[dict[str, Any]] = [
    {
        "id": "2hop__460946_294723",
        "paragraphs": [_NOISE, _GREEN, _HILLAGE],
        "question": "Who is the spouse of the Green performer?",
        "question_decomposition": [
            {"id": 460946, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 3},
            {"id": 294723, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": 5},
        ],
        "answer": "Miquette Giraudy",
        "answer_aliases": ["Giraudy"],
        "answerable": True,
    },
    {
        # The full set holds every question twice, with one id: once with a paragraph taken away.
        "id": "2hop__460946_294723",
        "paragraphs": [_NOISE, _GREEN],
        "question": "Who is the spouse of the Green performer?",
        "question_decomposition": [
            {"id": 460946, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 3},
            {"id": 294723, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": None},
        ],
        "answer": "Miquette Giraudy",
        "answer_aliases": ["Giraudy"],
        "answerable": False,
    },
    {
        "id": "3hop1__460946_1_2",
        "paragraphs": [_GREEN],
        "question": "When did the label of the Green performer have a #1 hit?",
        "question_decomposition": [
            {"id": 460946, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 3},
            {"id": 1, "question": "Which label signed #1?", "answer": "Virgin #2", "paragraph_support_idx": None},
            {
                "id": 2,
                "question": "When did #2, of #1, have a #9 hit?",
                "answer": "1975",
                "paragraph_support_idx": None,
            },
        ],
        "answer": "1975",
        "answer_aliases": [],
        "answerable": True,
    },
    {"id": "2hop__7_8", "paragraphs": [_NOISE], "question": "Who wrote the anthem of Peru?"},
]
"""Two answerable records that share a hop, an unanswerable twin, and a record of the test file."""

WIKIHOP: list[dict[str, Any]] = [
    {
        "id": "WH_train_0",
        "query": "participant_of juan rossell",
        "answer": "1996 summer olympics",
        "candidates": ["1996 summer olympics", "olympic games", "sport"],
        "supports": ["The 2004 Summer Olympic Games were held in Athens.", "Juan Miguel Rossell is a player."],
        "annotations": [["follows", "multiple"]],
    },
    {
        "id": "WH_train_1",
        "query": "languages_spoken_or_written john osteen",
        "answer": "english",
        "candidates": ["english", "greek", "koine greek"],
        "supports": ["Lakewood Church is in Houston."],
    },
    {
        "id": "WH_train_2",
        "query": "country thames",
        "answer": "___MASK7___",
        "candidates": ["___MASK7___", "___MASK8___"],
        "supports": ["___MASK7___ is a country."],
    },
    {
        "id": "WH_train_3",
        "query": "participant_of juan rossell",
        "answer": "sport",
        "candidates": ["sport"],
        "supports": [],
    },
]
"""Two records, one of the masked form, and one that answers the first query otherwise."""

BAMBOOGLE: list[dict[str, Any]] = [
    {"Question": "Who was president of the United States when Citibank was founded?", "Answer": "james madison"},
    {"Question": "What rocket was the first spacecraft that approached Uranus launched on?", "Answer": "Titan IIIE"},
    {"Question": 'Where was "Blue, Green" written?', "Answer": "Bonn, Germany"},
]

SHORT: list[dict[str, Any]] = [
    {
        "Question": "Who is the father of Taizong?",
        "source": "2wiki",
        "id": "2wiki_3",
        "answer": ["Zhao", "Zhao Hongyin"],
    },
    {
        "Question": "When was Sound of Music founded?",
        "source": "2wiki",
        "id": "2wiki_4",
        "note": "update",
        "answer": ["1966"],
    },
    {"Question": "Who founded Atlantis?", "source": "2wiki", "id": "2wiki_5", "answer": []},
]

PIECES: list[dict[str, Any]] = [
    {
        "id": "a",
        "question": "Q one?",
        "answer": "1",
        "category": "c",
        "group": "g",
        "hop": 1,
        "supporting_fact": "One.",
    },
    {"question": "Q two?", "answer": " 2", "hop": None},
    {"id": 9, "question": "Q three,\nin two lines?", "answer": '"3"', "group": "g", "hop": 2},
]

RECORDS = {
    "hotpotqa": HOTPOTQA,
    "2wikimultihopqa": TWO_WIKI,
    "musique": MUSIQUE,
    "wikihop": WIKIHOP,
    "bamboogle": BAMBOOGLE,
    "qa": SHORT,
    "jsonl": PIECES,
    "csv": PIECES,
}
"""By format."""

_SUFFIX = {"musique": ".jsonl", "jsonl": ".jsonl", "bamboogle": ".csv", "csv": ".csv"}


def records(name: str) -> list[dict[str, Any]]:
    """A copy to change."""
    # Not deepcopy, which keeps paragraphs that two records share shared.
    copied: list[dict[str, Any]] = json.loads(json.dumps(RECORDS[name]))
    return copied


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """A file of the format's own kind."""
    path = folder / f"{name}{_SUFFIX.get(name, '.json')}"
    if path.suffix == ".csv":
        path.write_text(_table(rows), encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
