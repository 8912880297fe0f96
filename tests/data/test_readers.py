"""Readers of question sets: what the true format of each gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data import load_countries, load_pieces, read_pieces
from lightning_goldy.data.readers import hop_question, word
from tests.data.question_sets import RECORDS, records, write

GREEN = "What is the performer of Green?"
GREEN_TEXT = "Green is an album by Steve Hillage."
WAR = "It is a 2009 film directed by Xawery Żuławski."
SON = "He is the son of actress Małgorzata Braunek."


def _load(folder: Path, name: str, rows: list[Any] | None = None, **options: Any) -> Any:
    return load_pieces(write(folder, name, RECORDS[name] if rows is None else rows), **options)


@pytest.mark.parametrize("name", RECORDS)
def test_formats_are_recognised_and_named_ones_agree(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, RECORDS[name])
    found = load_pieces(path)
    assert found.format == name
    assert found.source == str(path)
    assert found.records == len(RECORDS[name])
    assert load_pieces(path, format=name) == found


def test_hotpotqa(tmp_path: Path) -> None:
    found = _load(tmp_path, "hotpotqa")
    assert found.pieces == (
        KnowledgePiece(
            "5a7a06935542990198eaf050",
            "Which magazine was started first, Arthur's Magazine or First for Women?",
            "Arthur's Magazine",
            "comparison",
            supporting_fact="Arthur's Magazine (1844-1846) was a literary periodical."
            " First for Women is a woman's magazine.",
        ),
        KnowledgePiece(
            "5a879ab05542996e4f30887e",
            "Were the Oberoi family and the Tata family both founded in Delhi?",
            "no",
            "comparison",
            supporting_fact="The Oberoi family is an Indian family.",
        ),
    )
    assert found.skipped == {"record without an answer": 1}
    assert found.incomplete == {
        "supporting sentence whose paragraph the context lacks": 1,
        "supporting sentence beyond the end of its paragraph": 1,
    }


def test_hotpotqa_with_the_structs_of_the_hub(tmp_path: Path) -> None:
    rows = records("hotpotqa")[:2]
    hub = [
        {
            **{key: row[key] for key in ("question", "answer", "type", "level")},
            "id": row["_id"],
            "supporting_facts": {
                "title": [title for title, _ in row["supporting_facts"]],
                "sent_id": [sentence for _, sentence in row["supporting_facts"]],
            },
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [sentences for _, sentences in row["context"]],
            },
        }
        for row in rows
    ]
    # The test split of the hub has the fields, with nothing in them.
    nothing = {"supporting_facts": {"title": [], "sent_id": []}, "context": {"title": [], "sentences": []}}
    hub.append({"id": "t", "question": "Who?", "answer": None, "type": None, "level": None, **nothing})
    found = _load(tmp_path, "hotpotqa", hub)
    assert found.pieces == _load(tmp_path, "hotpotqa", rows).pieces
    assert found.skipped == {"record without an answer": 1}


def test_2wikimultihopqa(tmp_path: Path) -> None:
    found = _load(tmp_path, "2wikimultihopqa")
    chain, comparison = "8813f87c0bdd11eba7f7acde48001122", "97954d9408b011ebbd84ac1f6bf848b6"
    question = "Who is the mother of the director of film Polish-Russian War (Film)?"
    other = "Are the directors of Polish-Russian War and Coffee Blues of one country?"
    coffee = "Coffee Blues is a film by Ann Smith."
    director, mother = "What is the director of Polish-Russian War?", "What is the mother of Xawery Żuławski?"
    assert found.pieces == (
        KnowledgePiece(f"{chain}/1", director, "Xawery Żuławski", "director", chain, 1, WAR),
        KnowledgePiece(f"{chain}/2", mother, "Małgorzata Braunek", "mother", chain, 2, SON),
        KnowledgePiece(chain, question, "Małgorzata Braunek", "compositional", chain, None, f"{WAR} {SON}"),
        KnowledgePiece(
            f"{comparison}/2", "What is the director of Coffee Blues?", "Ann Smith", "director", comparison, 2, coffee
        ),
        KnowledgePiece(f"{comparison}/3", "Ann Smith is student of what?", "Bob Hale", "student of", comparison, 3),
        KnowledgePiece(comparison, other, "no", "bridge_comparison", comparison, None, coffee),
    )
    assert found.skipped == {
        "piece that repeats an earlier question and its answer": 1,
        "record without an answer": 1,
    }
    facts = _load(tmp_path, "2wikimultihopqa", whole_questions=False, form="cloze")
    assert [(piece.id, piece.question) for piece in facts.pieces] == [
        (f"{chain}/1", "The director of Polish-Russian War is"),
        (f"{chain}/2", "The mother of Xawery Żuławski is"),
        (f"{comparison}/2", "The director of Coffee Blues is"),
        (f"{comparison}/3", "Ann Smith is student of"),
    ]


def test_2wikimultihopqa_without_evidence(tmp_path: Path) -> None:
    rows = records("2wikimultihopqa")
    rows[1]["evidences"] = []
    assert len(_load(tmp_path, "2wikimultihopqa", rows).pieces) == 4
    found = _load(tmp_path, "2wikimultihopqa", rows, whole_questions=False)
    assert found.skipped == {"record without evidence triples": 1, "record without an answer": 1}


def test_musique(tmp_path: Path) -> None:
    found = _load(tmp_path, "musique")
    first, second = "2hop__460946_294723", "3hop1__460946_1_2"
    spouse, signed = "What is the spouse of Steve Hillage?", "Which label signed Steve Hillage?"
    # An answer with a '#' in it is not filled in again, and '#9' names no hop.
    hit = "When did Virgin #2, of Steve Hillage, have a #9 hit?"
    hops = (
        KnowledgePiece(f"{first}/1", GREEN, "Steve Hillage", "2hop", first, 1, GREEN_TEXT),
        KnowledgePiece(f"{first}/2", spouse, "Miquette Giraudy", "2hop", first, 2, "His partner is Miquette Giraudy."),
        KnowledgePiece(f"{second}/2", signed, "Virgin #2", "3hop1", second, 2),
        KnowledgePiece(f"{second}/3", hit, "1975", "3hop1", second, 3),
    )
    assert found.pieces == hops
    assert found.skipped == {
        "unanswerable record": 1,
        "piece that repeats an earlier question and its answer": 1,
        "record without an answer": 1,
    }
    assert found.incomplete == {
        "hop without a supporting paragraph": 2,
        "hop whose '#' and number name no earlier hop": 1,
    }
    assert (found.groups, found.hops) == ({first: 2, second: 2}, {1: 1, 2: 2, 3: 1})
    whole = _load(tmp_path, "musique", whole_questions=True)
    composed = [piece for piece in whole.pieces if piece.hop is None]
    assert [piece for piece in whole.pieces if piece.hop is not None] == [*hops]
    assert composed == [
        KnowledgePiece(
            first,
            "Who is the spouse of the Green performer?",
            "Miquette Giraudy",
            "2hop",
            first,
            None,
            f"{GREEN_TEXT} His partner is Miquette Giraudy.",
        ),
        KnowledgePiece(
            second,
            "When did the label of the Green performer have a #1 hit?",
            "1975",
            "3hop1",
            second,
            None,
            GREEN_TEXT,
        ),
    ]


@given(
    st.lists(st.text(alphabet="ab#12", min_size=1), max_size=3),
    st.lists(st.one_of(st.sampled_from(["#1", "#2", "#3", "#4", "#12", "#"]), st.text(alphabet="xyz ?", max_size=3))),
)
def test_every_reference_is_filled_in_once(answers: list[str], parts: list[str]) -> None:
    # A space after every part, so that a number ends where its part does.
    numbers = {f"#{number}": answer for number, answer in enumerate(answers, start=1)}
    expected = "".join(f"{numbers.get(part, part)} " for part in parts).strip()
    assert hop_question("".join(f"{part} " for part in parts), answers) == expected


def test_wikihop(tmp_path: Path) -> None:
    found = _load(tmp_path, "wikihop")
    assert found.pieces == (
        KnowledgePiece(
            "WH_train_0",
            "juan rossell is participant of what?",
            "1996 summer olympics",
            "participant_of",
            "juan rossell",
        ),
        KnowledgePiece(
            "WH_train_1",
            "What is the languages spoken or written of john osteen?",
            "english",
            "languages_spoken_or_written",
            "john osteen",
        ),
    )
    assert found.skipped == {
        "record with a masked answer": 1,
        "piece that repeats an earlier question with another answer": 1,
    }
    cloze = _load(tmp_path, "wikihop", form="cloze").pieces
    assert cloze[0].question == "juan rossell is participant of"


def test_bamboogle_as_table_and_as_rows(tmp_path: Path) -> None:
    found = _load(tmp_path, "bamboogle")
    assert [(piece.id, piece.answer) for piece in found.pieces] == [
        ("2", "james madison"),
        ("3", "Titan IIIE"),
        ("4", "Bonn, Germany"),
    ]
    assert found.pieces[2].question == 'Where was "Blue, Green" written?'
    rows = load_pieces(RECORDS["bamboogle"])
    assert rows.format == "bamboogle"
    assert [piece.id for piece in rows.pieces] == ["1", "2", "3"]
    assert [piece.question for piece in rows.pieces] == [piece.question for piece in found.pieces]


@pytest.mark.parametrize(
    ("question", "answer"), [("question", "golden_answers"), ("question", "answers"), ("Question", "answer")]
)
def test_questions_with_several_answers(question: str, answer: str) -> None:
    rows = [
        {"id": 7, question: "Q?", answer: ["A", "B"], "metadata": {}, "category": "c"},
        {question: "R?", answer: []},
    ]
    found = load_pieces(rows)
    assert found.pieces == (KnowledgePiece("7", "Q?", "A", "c"),)
    assert (found.format, found.skipped) == ("qa", {"record without an answer": 1})


def test_table_and_lines_of_pieces_agree(tmp_path: Path) -> None:
    lines = load_pieces(write(tmp_path, "jsonl", RECORDS["jsonl"]))
    table = load_pieces(write(tmp_path, "csv", RECORDS["csv"]))
    assert [*lines.pieces] == read_pieces(tmp_path / "jsonl.jsonl")
    assert lines.pieces == (
        KnowledgePiece("a", "Q one?", "1", "c", "g", 1, "One."),
        KnowledgePiece("2", "Q two?", " 2"),
        KnowledgePiece("9", "Q three,\nin two lines?", '"3"', None, "g", 2),
    )
    # A table's first line is its header.
    assert table.pieces == (lines.pieces[0], KnowledgePiece("3", "Q two?", " 2"), lines.pieces[2])


def test_atlas() -> None:
    found = load_pieces("atlas")
    countries = load_countries()
    assert (found.format, found.source, found.records) == ("atlas", "atlas", len(countries))
    assert len(found.pieces) == 4 * len(countries)
    expected = [
        (country.name, relation, hop, getattr(country, relation))
        for country in countries
        for hop, relation in enumerate(("capital", "continent", "currency", "language"), start=1)
    ]
    assert [(piece.group, piece.category, piece.hop, piece.answer) for piece in found.pieces] == expected
    france = {piece.category: piece for piece in found.pieces if piece.group == "France"}
    assert france["capital"] == KnowledgePiece(
        "France/capital",
        "What is the capital of France?",
        "Paris",
        "capital",
        "France",
        1,
        "The capital of France is Paris.",
    )
    assert all(piece.question.endswith("?") for piece in found.pieces)
    cloze = load_pieces("atlas", form="cloze")
    for piece in cloze.pieces:
        assert f"{piece.question} {piece.answer}." == piece.supporting_fact


@pytest.mark.parametrize("form", ["question", "cloze"])
def test_two_hop_questions_of_the_atlas(form: Any) -> None:
    found = load_pieces("atlas", form=form, whole_questions=True)
    composed = {piece.id: piece for piece in found.pieces if piece.hop is None}
    assert len(composed) == 3 * len(load_countries())
    piece = composed["Gambia/capital/language"]
    asks = "What is the main language of the country whose capital is Banjul?"
    states = "The main language of the country whose capital is Banjul is"
    assert piece == KnowledgePiece(
        "Gambia/capital/language",
        asks if form == "question" else states,
        "English",
        "language",
        "Gambia",
        None,
        "The capital of the Gambia is Banjul. The main language of the Gambia is English.",
    )
    one_hop = tuple(each for each in found.pieces if each.hop is not None)
    assert one_hop == load_pieces("atlas", form=form).pieces


@pytest.mark.parametrize(
    ("relation", "question", "cloze"),
    [
        ("place_of_birth", "What is the place of birth of X?", "The place of birth of X is"),
        ("date of death", "What is the date of death of X?", "The date of death of X is"),
        ("founded_by", "X is founded by what?", "X is founded by"),
        ("educated at", "X is educated at what?", "X is educated at"),
        ("located_next_to_water", "X is located next to water what?", "X is located next to water"),
        ("has_part", "X has part what?", "X has part"),
    ],
)
def test_relations_are_worded(relation: str, question: str, cloze: str) -> None:
    assert (word("X", relation), word("X", relation, "cloze")) == (question, cloze)


def test_limit_counts_records_that_gave_pieces_and_keeps_groups_whole(tmp_path: Path) -> None:
    rows = records("musique")
    assert [piece.hop for piece in _load(tmp_path, "musique", rows, limit=1).pieces] == [1, 2]
    found = _load(tmp_path, "musique", [rows[3], rows[1], rows[0], rows[2]], limit=1)
    assert (found.records, len(found.pieces), sum(found.skipped.values())) == (3, 2, 2)
    # What lies behind the limit is not looked at.
    assert len(_load(tmp_path, "musique", [rows[0], {}], limit=1).pieces) == 2
