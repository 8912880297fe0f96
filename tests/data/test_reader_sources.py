"""Where pieces come from and go to: files of every kind, datasets, the command's JSON lines, formats of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_goldy.core.naming import Registry
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data import KnowledgeDataModule, formats, load_pieces, read_pieces, write_pieces
from lightning_goldy.data import readers as loading
from lightning_goldy.data.readers import FORMATS, Format, Reading, Record, RecordError
from tests.data.question_sets import RECORDS, records, write
from tests.data.shared_data import shared_file

TABLE = "Question,Answer\nWho?,A\n"


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", '[{"Question": "Q?", "answer": "A"}', "a.json: not JSON: .* line 1 column"),
        ("a.json", '[{"Question": "Q?", "answer": "A"}]]', "a.json: not JSON: Extra data"),
        ("a.json", "[" * 100_000, "a.json: not JSON: nested too deeply"),
        (
            "a.json",
            '{"version": 1,\n"data": []}',
            "a.json: expected a list of records; found one object with version, data",
        ),
        ("a.json", "[]", "a.json holds no knowledge pieces: it has no records"),
        ("a.json", "", "a.json holds no knowledge pieces: it has no records"),
        ("a.json", "[1]", "a.json, record 1: expected an object .*; found 1"),
        ("a.json", '[["Q?", "A"]]', "a.json, record 1: expected an object"),
        ("a.json", b'[{"Question": "\xe9"}]', "a.json is not UTF-8 text: byte 15 is 0xe9"),
        ("a.txt", "Who? Me.", "a.txt begins with 'W', so it is no JSON; the files that can be read are .json"),
        ("a.json", '[{"prompt": "Q?", "answer": "A"}]', "has the fields prompt, answer. .* wikihop: id, query, answer"),
        ("a.json", "[{}]", "cannot tell the format of .*a.json: its first record has the fields none"),
        ("a.jsonl", '{"question": "Q?", "answer"', "a.jsonl, line 1: not JSON"),
        (
            "a.jsonl",
            '\n{"question": "Q?", "answer": "A"}\nnull',
            "a.jsonl, line 3: expected an object .*; found nothing",
        ),
        ("a.jsonl", '{"question": "Q?", "answer": "A"} {}', "a.jsonl, line 1: not JSON: Extra data"),
        (
            "a.jsonl",
            '{"question": "Q?", "answer": "A", "answers": ["A"], "x": 1}\n{"question": 1}',
            "line 2.*'question'",
        ),
        (
            "a.jsonl",
            '{"question": "Q?", "answer": "A", "catgory": "c"}',
            "line 1: unknown field 'catgory'; did you mean",
        ),
        ("a.jsonl", '[{"question": "Q?", "answer": "A"}]', "a.jsonl, line 1: expected an object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON: nested too deeply"),
        ("a.jsonl", " \n\t\n", "a.jsonl holds no knowledge pieces: it has no records"),
    ],
)
def test_broken_files_of_json(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        load_pieces(_file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (TABLE + "Where?\n", "line 3: expected 2 cells; found 1"),
        (TABLE + "Where?,B,C\n", "line 3: expected 2 cells; found 3"),
        (TABLE + '"Where?,B\n', "line 3: not a table: unexpected end of data"),
        (TABLE + '"Where?" now,B\n', "line 3: not a table: ',' expected after '\"'"),
        (TABLE + ",B\n", r"line 3, field 'Question': expected text that is not empty; found ''"),
        (TABLE + '\n"Where,\nat all?"," "\nX,\n', None),
        ("Question,Question\nWho?,A\n", "line 1: the columns need names, each its own; found 'Question', 'Question'"),
        ("Question,\nWho?,A\n", "line 1: the columns need names, each its own; found 'Question', ''"),
        ("Question;Answer\nWho?;A\n", "its first record has the fields Question;Answer"),
        ("Question,Answer,Source\nWho?,A,x\n", "line 2: unknown field 'source'"),
        ("Question,Answer,question\nWho?,A,x\n", "line 2: columns Question, Answer, question repeat a name"),
        ("Question,Answer\n", "holds no knowledge pieces: it has no records"),
        ("", "holds no knowledge pieces: it has no records"),
        (b"Question,Answer\n\xff,A\n", "is not UTF-8 text: byte 16 is 0xff"),
        (TABLE + "x" * 200_000 + ",A\n", "line 3: not a table: field larger than field limit"),
    ],
)
def test_broken_tables(tmp_path: Path, content: str | bytes, problem: str | None) -> None:
    path = _file(tmp_path, "bamboogle.csv", content)
    if problem is not None:
        with pytest.raises(ValueError, match=problem):
            load_pieces(path)
        return
    found = load_pieces(path)
    assert [piece.id for piece in found.pieces] == ["2"]
    assert found.skipped == {"record without an answer": 2}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Where?\n", "another number of cells than columns"),
        (",B\n", "field 'Question', text that is not empty"),
        ("Who?,A,\n", "another number of cells than columns"),
        (" ,B\n", "field 'Question', text that is not empty"),
        ("Where?,B,C\n", "another number of cells than columns"),
    ],
)
def test_faulty_lines_of_a_table_can_be_left_out(tmp_path: Path, content: str, reason: str) -> None:
    path = _file(tmp_path, "bamboogle.csv", TABLE + content + "When?,C\n")
    found = load_pieces(path, format="bamboogle", on_malformed="skip")
    assert [(piece.id, piece.answer) for piece in found.pieces] == [("2", "A"), ("4", "C")]
    assert found.skipped == {f"malformed record: {reason}": 1}


def test_a_bamboogle_record_has_no_other_fields() -> None:
    with pytest.raises(RecordError, match=r"row 1: unknown field 'Anwser'; did you mean 'Answer'"):
        load_pieces([{"Question": "Q?", "Anwser": "A"}], format="bamboogle")


def test_containers_and_formats_are_independent(tmp_path: Path) -> None:
    expected = load_pieces(write(tmp_path, "musique", RECORDS["musique"])).pieces
    listed = _file(tmp_path, "list.json", json.dumps(RECORDS["musique"], indent=1))
    lines = _file(tmp_path, "lines.json", "\ufeff" + "\r\n\n".join(map(json.dumps, RECORDS["musique"])))
    unnamed = _file(tmp_path, "lines", "\n".join(map(json.dumps, RECORDS["musique"])))
    for source in (
        listed,
        str(lines),
        unnamed,
        RECORDS["musique"],
        iter(RECORDS["musique"]),
        {"dev": RECORDS["musique"]},
    ):
        found = load_pieces(source)
        assert (found.format, found.pieces) == ("musique", expected)
    tabs = _file(tmp_path, "a.tsv", "question\tanswer\tgroup\nQ, one?\tA\tg\n")
    assert load_pieces(tabs).pieces == (KnowledgePiece("2", "Q, one?", "A", group="g"),)


def test_every_broken_record_is_counted_by_its_reason(tmp_path: Path) -> None:
    lines = ["{", json.dumps({"question": "Q?", "answer": "A"}), "[]", "nonsense", json.dumps({"question": "R?"}), "7"]
    found = load_pieces(_file(tmp_path, "a.jsonl", "\n".join(lines)), on_malformed="skip")
    assert found.pieces == (KnowledgePiece("2", "Q?", "A"),)
    assert found.records == 6
    assert found.skipped == {
        "malformed record: not JSON": 2,
        "malformed record: no object": 2,
        "malformed record: field 'answer', text that is not empty": 1,
    }
    with pytest.raises(ValueError, match="holds no knowledge pieces: none of its 2 records can be read"):
        load_pieces(_file(tmp_path, "b.jsonl", "{\n}"), on_malformed="skip")
    with pytest.raises(ValueError, match=r"none of its 1 records gave one \(malformed record: field 'answer'.*: 1\)"):
        load_pieces([{"question": "Q?", "answer": 1}], on_malformed="skip")


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique", "wikihop"])
def test_a_record_id_that_occurs_again_is_an_error(tmp_path: Path, name: str) -> None:
    rows = records(name)
    again = {**rows[0], "question": "Another?", "query": "another relation", "evidences": []}
    path = write(tmp_path, name, [rows[0], again])
    with pytest.raises(RecordError, match=r"(line|record) 2, field '_?id': '.*' already occurs (on line|in record) 1"):
        load_pieces(path, format=name)
    assert load_pieces(path, format=name, on_malformed="skip").skipped == {
        "malformed record: field 'id' repeats an earlier one": 1
    }


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("form", ["dataset", "rows"])
def test_rows_of_a_dataset(tmp_path: Path, name: str, form: str) -> None:
    rows = records(name)
    # Lines of a table have numbers of their own.
    expected = load_pieces(rows if name in ("bamboogle", "csv") else write(tmp_path, name, rows)).pieces
    # A dataset has one type per column.
    if name in ("jsonl", "csv"):
        rows = [{**row, "id": str(row.get("id", number))} for number, row in enumerate(rows, start=1)]
    source: Any = rows
    if form == "dataset":
        source = pytest.importorskip("datasets").Dataset.from_list(_columns(rows, name))
    found = load_pieces(source)
    assert found.pieces == expected
    assert found.source == "the dataset"


def _columns(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows with every field in the one shape that a column allows."""
    if name not in ("hotpotqa", "2wikimultihopqa"):
        return rows
    structs = {"context": ("title", "sentences"), "supporting_facts": ("title", "sent_id")}
    columns = []
    for row in rows:
        changed = {key: value for key, value in row.items() if key not in ("evidences_id", "answer_id")}
        for field, names in structs.items():
            cells = [*zip(*row.get(field, []), strict=True)] or [(), ()]
            changed[field] = dict(zip(names, map(list, cells), strict=True))
        columns.append(changed)
    return columns


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    first, second = (datasets.Dataset.from_list(RECORDS["wikihop"][part]) for part in (slice(0, 1), slice(1, 2)))
    first.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": first, "validation": second}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": second}).save_to_disk(str(tmp_path / "only"))
    ids = {"train": ["WH_train_0"], "validation": ["WH_train_1"]}

    def found(folder: str, split: str | None = None) -> list[str]:
        return [piece.id for piece in load_pieces(tmp_path / folder, split=split).pieces]

    assert found("one") == found("two") == found("two", "train") == ids["train"]
    assert found("two", "validation") == found("only") == ids["validation"]
    assert load_pieces(tmp_path / "two").source == f"{tmp_path / 'two'}, split train"
    with pytest.raises(ValueError, match="unknown split 'validaton'; did you mean 'validation'"):
        found("two", "validaton")
    with pytest.raises(ValueError, match=r"split='train' needs splits by name; .*one has none"):
        found("one", "train")


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "some/absent":
            raise FileNotFoundError("no such dataset")
        return RECORDS["qa"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_pieces("some/questions").source == "some/questions, split train"
    assert load_pieces("some/questions:small", split="dev").format == "qa"
    assert asked == [("some/questions", None, "train"), ("some/questions", "small", "dev")]
    with pytest.raises(
        FileNotFoundError, match=r"'some/absent' is neither a file in .* nor a dataset .*: no such dataset"
    ):
        load_pieces("some/absent")


def test_without_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    for source in ("some/questions", tmp_path):
        with pytest.raises(ImportError, match=r"needs the datasets library: pip install 'lightning-goldy\[datasets\]'"):
            load_pieces(source)
    assert load_pieces(RECORDS["qa"]).format == "qa"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("atlas", {"format": "musqiue"}, "unknown format 'musqiue'; did you mean 'musique'"),
        ("atlas", {"form": "closed"}, "unknown form 'closed'"),
        ("atlas", {"on_malformed": "ignore"}, "unknown on_malformed 'ignore'"),
        ("atlas", {"limit": 0}, "limit=0 must be a whole number of at least 1, or None"),
        ("atlas", {"limit": True}, "limit=True must be a whole number"),
        ("atlas", {"format": "jsonl"}, "the format 'atlas' and the source 'atlas' go together; got 'jsonl'"),
        (
            RECORDS["qa"],
            {"format": "atlas"},
            "the format 'atlas' and the source 'atlas' go together; got .* 'the dataset'",
        ),
        (RECORDS["qa"], {"form": "cloze"}, "form='cloze' words a subject and a relation, which 'qa' lacks; .*musique"),
        (RECORDS["wikihop"], {"whole_questions": True}, "whole_questions=True chooses .* 'wikihop' are .*musique"),
        (7, {}, "a source is a path, the name of a dataset, or rows; found 7"),
        (b"atlas", {}, "a source is a path, the name of a dataset, or rows; found b'atlas'"),
        ([7], {}, "the dataset, row 1: expected an object .*; found 7"),
        ([], {}, "the dataset holds no knowledge pieces"),
    ],
)
def test_bad_arguments(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pieces(source, **options)


@pytest.mark.parametrize("name", ["nothing.json", "/absent/questions", "../up", "a b"])
def test_absent_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a file \(looked in .*\)\. A source is a file \(.json"):
        load_pieces(name)


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='train' is for datasets; .*qa\.json is a file"):
        load_pieces(write(tmp_path, "qa", RECORDS["qa"]), split="train")


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_pieces(tmp_path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for name in RECORDS:
        pieces = load_pieces(write(tmp_path, name, RECORDS[name])).pieces
        assert read_pieces(write_pieces(pieces, tmp_path / "new" / "out.jsonl")) == [*pieces]


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SAID = TEXT.filter(str.strip)


@given(
    st.lists(
        st.builds(
            KnowledgePiece,
            TEXT,
            SAID,
            SAID,
            st.none() | TEXT,
            st.none() | TEXT,
            st.none() | st.integers(-9, 9),
            st.none() | TEXT,
        ),
        min_size=1,
        max_size=4,
        unique_by=(lambda piece: piece.id, lambda piece: piece.question),
    )
)
def test_any_pieces_survive_the_file(tmp_path_factory: pytest.TempPathFactory, pieces: list[KnowledgePiece]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    assert read_pieces(write_pieces(pieces, path)) == pieces
    assert [*load_pieces(path).pieces] == pieces


@given(
    st.dictionaries(st.sampled_from(["question", "answer", "id", "hop", "group"]), st.text(max_size=3) | st.integers())
)
def test_any_record_is_a_piece_or_names_its_fault(row: dict[str, Any]) -> None:
    rows = [{"question": "first?", "answer": "A", "id": "first"}, row]
    found = load_pieces(rows, format="jsonl", on_malformed="skip")
    if len(found.pieces) == 2:
        assert found.pieces[1].question == row["question"]
        assert found == load_pieces(rows, format="jsonl")
        return
    with pytest.raises(RecordError, match="the dataset, row 2") as fault:
        load_pieces(rows, format="jsonl")
    assert found.skipped == {fault.value.reason: 1}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "there are no pieces to write"),
        (
            [KnowledgePiece("1", "Q?", "A"), KnowledgePiece("1", "R?", "A")],
            "piece 2, field 'id': '1' already occurs in piece 1",
        ),
        (
            [KnowledgePiece("1", "Q?", "A"), KnowledgePiece("2", "Q?", "B")],
            "field 'question': 'Q\\?' already occurs in piece 1",
        ),
        ([KnowledgePiece("1", "", "A")], "piece 1 .*field 'question': expected text that is not empty"),
        ([KnowledgePiece("1", "Q?", "A\udc00")], "field 'answer': expected text of whole characters"),
        ([KnowledgePiece(1, "Q?", "A")], "piece 1 would be read back as"),  # type: ignore[arg-type]
    ],
)
def test_pieces_that_cannot_be_read_back_are_not_written(
    tmp_path: Path, pieces: list[KnowledgePiece], message: str
) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=message):
        write_pieces(pieces, path)
    assert not path.exists()


def test_a_format_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Format] = Registry("format")
    for name in FORMATS:
        registry.register(name)(FORMATS[name])

    def parse(record: Record, reading: Reading) -> list[KnowledgePiece]:
        return [KnowledgePiece(record.number, record.text("question"), record.answer("reply"))]

    own = Format(parse, lambda row, container: "reply" in row, "question, reply")
    registry.register("replies")(own)
    monkeypatch.setattr(formats, "FORMATS", registry)
    monkeypatch.setattr(loading, "FORMATS", registry)
    # It is recognised before the formats that came first, whose fields are there too.
    rows = [{"question": "Q?", "reply": "A", "answer": "B"}, {"question": "R?", "reply": ""}]
    found = load_pieces(rows)
    assert (found.format, found.pieces) == ("replies", (KnowledgePiece("1", "Q?", "A"),))
    assert found.skipped == {"record without an answer": 1}


@pytest.mark.parametrize(
    ("name", "count"), [("2wikimultihop_qa.json", 500), ("bamboogle_qa.json", 125), ("musique_qa.json", 500)]
)
def test_public_question_sets(name: str, count: int) -> None:
    path = shared_file(name)
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = load_pieces(path)
    assert (found.format, found.records, found.skipped) == ("qa", count, {})
    assert [(piece.id, piece.question, piece.answer) for piece in found.pieces] == [
        (row["id"], row["Question"].strip(), row["answer"][0].strip()) for row in rows
    ]


def test_the_data_module_reads_any_format(tmp_path: Path) -> None:
    rows = [{**RECORDS["wikihop"][0], "id": f"W{n}", "query": f"sport team {n}"} for n in range(10)]
    rows.append({**rows[0], "id": "again"})
    data = KnowledgeDataModule(write(tmp_path, "wikihop", rows), "bytes", probe_size=2)
    assert [piece.id for piece in data.pieces] == [f"W{n}" for n in range(10)]
    assert data.skipped == {"piece that repeats an earlier question and its answer": 1}
    batch = next(iter(data.probe_dataloader()))
    text = data.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("Question: What is the sport of team ")
    assert len(KnowledgeDataModule("atlas", "bytes").pieces) > 500
