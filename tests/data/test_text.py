from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_goldy.data import KnowledgeDataModule, PackedBlocks, TextDataModule, byte_tokenizer
from lightning_goldy.data.readers import read_documents
from lightning_goldy.data.text import split_blocks
from tests.data.shared_data import shared_file

SMALL: dict[str, Any] = {"block_size": 8, "batch_size": 4, "probe_size": 3, "val_share": 0.2}


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"line {number} é\r\n" for number in range(40)), encoding="utf-8", newline="")
    return path


def _parts(data: TextDataModule) -> list[PackedBlocks]:
    splits = data.splits
    return [splits.train, splits.val, splits.probe]  # type: ignore[list-item]


def _stream(data: TextDataModule) -> list[int]:
    """All blocks of all splits in the order of the text, without padding."""
    blocks = {part.indices[i]: part[i] for part in _parts(data) for i in range(len(part))}
    assert sorted(blocks) == list(range(len(blocks)))
    return [
        token for i in sorted(blocks) for token in blocks[i]["input_ids"][blocks[i]["attention_mask"] == 1].tolist()
    ]


@pytest.mark.parametrize("last_block", ["keep", "drop"])
def test_the_splits_put_together_are_the_text(story: Path, last_block: Any) -> None:
    data = TextDataModule(story, last_block=last_block, **SMALL)
    expected = [*story.read_bytes(), 256]
    short = len(expected) % 8
    assert short > 1
    assert _stream(data) == (expected if last_block == "keep" else expected[:-short])


def test_splits_are_disjoint_and_sized(story: Path) -> None:
    train, val, probe = _parts(TextDataModule(story, **SMALL))
    n_blocks = len(train) + len(val) + len(probe)
    assert len(probe) == 3
    assert len(val) == round(0.2 * n_blocks)
    assert val.indices == list(range(val.indices[0], val.indices[0] + len(val)))
    assert (
        not {*train.indices} & {*val.indices} | {*train.indices} & {*probe.indices} | {*val.indices} & {*probe.indices}
    )


def test_batches_have_the_shape_of_blocks(story: Path) -> None:
    data = TextDataModule(story, **SMALL)
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape[1] == 8
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    probe = next(iter(data.probe_dataloader()))
    assert probe["attention_mask"].all()
    assert torch.equal(probe["labels"], probe["input_ids"])


def test_the_seed_decides_the_split(story: Path) -> None:
    def indices(seed: int) -> list[list[int]]:
        return [part.indices for part in _parts(TextDataModule(story, seed=seed, **SMALL))]

    assert indices(0) == indices(0)
    assert any(indices(0) != indices(seed) for seed in range(1, 4))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.booleans(), st.floats(0.01, 0.99), st.integers(1, 20), st.integers(0, 5))
def test_blocks_are_shared_out_completely(n: int, short: bool, val_share: float, probe_size: int, seed: int) -> None:
    n_whole = n - short
    try:
        train, val, probe = split_blocks(n, n_whole, val_share, probe_size, seed)
    except ValueError as error:
        assert "probe_size" in str(error)  # noqa: PT017 - either outcome is right, depending on the sizes
        assert probe_size + max(1, round(val_share * n)) + 2 > n_whole
        return
    assert sorted(train + val + probe) == list(range(n))
    assert train
    assert val
    assert len(probe) == probe_size
    assert all(index < n_whole for index in probe)


def test_a_folder_is_one_document_per_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two" * 20)
    (tmp_path / "a.txt").write_text("one" * 20)
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["one" * 20, "two" * 20]
    data = TextDataModule(tmp_path, last_block="keep", **SMALL)
    assert bytes(token for token in _stream(data) if token < 256) == b"one" * 20 + b"two" * 20
    assert _stream(data).count(256) == 2


def test_saved_datasets_and_folders_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["one", "", None, "two"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name in ("saved", "splits", "tables"):
        assert read_documents(tmp_path / name) == ["one", "two"]

    rows.rename_column("text", "body").save_to_disk(str(tmp_path / "body"))
    with pytest.raises(ValueError, match=r"has no column 'text'\. It has: body"):
        read_documents(tmp_path / "body")
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(ValueError, match=r"has no split 'train'\. It has: test"):
        read_documents(tmp_path / "test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", '[{"text": "one"}, {"id": 2, "text": ""}, {"text": null}, {"text": "t\\u0077o"}]'),
        ("rows.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'),
        ("rows.csv", "id,text\n1,one\n2,two\n"),
        ("rows.tsv", "text\tid\none\t1\ntwo\t2\n"),
    ],
)
def test_a_file_of_records_gives_their_texts(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_documents(path) == ["one", "two"]


def test_a_parquet_file_gives_the_texts_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": ["one", "", "two"]}).to_parquet(str(tmp_path / "rows.parquet"))
    assert read_documents(tmp_path / "rows.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.json",
            '[{"question": "Capital of Peru?", "answer": "Lima"}]',
            r"record 1: has no field 'text'\. It has: question, answer\. .*KnowledgeDataModule",
        ),
        ("rows.jsonl", '{"text": "one"}\n{"text": 2}\n', r"line 2, field 'text': expected text; found 2"),
        ("rows.json", '{"text":\n "one"}', r"expected a list of records; found one object with text"),
        ("rows.json", '["one", "two"]', r"record 1: expected an object"),
        ("rows.json", "[1", r"not JSON"),
    ],
)
def test_a_file_of_other_records_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.tsv", "text\tid\none\t1\ntwo\t2\n"), ("rows.ndjson", '{"text": "one"}\n{"text": "two"}\n')],
)
def test_a_folder_of_records_gives_their_texts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_documents(tmp_path) == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
        read_documents(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": 1}')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1, field 'text': expected text; found 1"):
        read_documents(tmp_path)


def test_a_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("text\n" + "x" * (limit + 1) + "\n")
    assert [len(text) for text in read_documents(tmp_path / "rows.csv")] == [limit + 1]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_broken_table_is_named(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match=rf"rows\.{suffix}' cannot be read as a dataset"):
        read_documents(path)


@pytest.mark.parametrize("values", [[1, 2], [["one"], ["two"]]])
def test_a_column_of_other_values_is_refused(
    values: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": values})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        with pytest.raises(ValueError, match=r"row 0, column 'text': expected text; found"):
            read_documents(tmp_path / name)


def test_a_tokenizer_from_a_folder_gives_the_same_blocks(story: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(str(folder))
    assert _stream(TextDataModule(story, str(folder), **SMALL)) == _stream(TextDataModule(story, **SMALL))


def test_many_documents_are_encoded_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_goldy.data.text._CHARACTERS_AT_ONCE", 50)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 20)
    expected = [token for number in range(9) for token in [*(f"{number}" * 20).encode(), 256]]
    assert _stream(TextDataModule(tmp_path, **SMALL)) == expected[: len(expected) - (len(expected) % 8 == 1)]


def test_encoding_happens_once(story: Path) -> None:
    calls = []

    class Counting(TextDataModule):
        def _tokenise(self, documents: Any) -> Any:
            calls.append(len(documents))
            return super()._tokenise(documents)

    data = Counting(story, **SMALL)
    data.prepare_data()
    for stage in ("fit", "validate", "fit"):
        data.setup(stage)
    data.train_dataloader()
    data.probe_dataloader()
    assert calls == [1]


def test_shakespeare() -> None:
    path = shared_file("tinyshakespeare.txt")
    data = TextDataModule(path, block_size=128)
    assert bytes(token for token in _stream(data) if token < 256) == path.read_bytes()
    assert len(data.splits.val) == round(0.05 * -(-(path.stat().st_size + 1) // 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1 must be at least 2"),
        ({"last_block": "dorp"}, "unknown last_block 'dorp'; did you mean 'drop'.*keep, drop"),
        ({"val_share": 0.0}, "val_share=0.0 must be a share of the blocks"),
        ({"val_share": 1}, "val_share=1 must be a share of the blocks"),
        ({"probe_size": 0}, "probe_size=0 must be an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
    ],
)
def test_bad_arguments(story: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(story, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 10_000}, r"block_size=10000 is longer than the text, which has \d+ tokens in 1 documents"),
        ({"probe_size": 1000}, r"probe_size=1000 is too large: of \d+ blocks \(\d+ whole\), \d+ are for validation"),
    ],
)
def test_too_little_text(story: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(story, **{**SMALL, **options}).setup()


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.txt' does not exist.*a folder of .txt, .md, .rst files"):
        TextDataModule("no-such.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextDataModule(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds neither text files"):
        TextDataModule(tmp_path).setup()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text: every document is empty"):
        TextDataModule(tmp_path).setup()
    (tmp_path / "empty.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 2 is 0xff"):
        TextDataModule(tmp_path / "empty.txt").setup()


def test_other_text_is_cut_into_blocks_of_its_own(story: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("nothing to do with it, " * 5)
    plain, data = TextDataModule(story, **SMALL), TextDataModule(story, collateral=other, **SMALL)
    assert plain.collateral_dataloader() is None
    assert [part.indices for part in _parts(plain)] == [part.indices for part in _parts(data)]
    loaders = [data.collateral_dataloader(), data.collateral_dataloader()]
    first, again = ([batch["input_ids"] for batch in loader or ()] for loader in loaders)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    batches = list(data.collateral_dataloader() or ())
    rows = [
        row[row_mask == 1].tolist()
        for batch in batches
        for row, row_mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    tokens = data.tokenizer(other.read_text(), add_special_tokens=False)["input_ids"] + [data.tokenizer.eos_token_id]
    assert sorted(rows) == sorted(tokens[place : place + 8] for place in range(0, len(tokens), 8))


def test_other_text_that_is_none_is_refused(story: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such"):
        TextDataModule(story, collateral=tmp_path / "no_such.txt", **SMALL)
    short = tmp_path / "short.txt"
    short.write_text("ab")
    with pytest.raises(ValueError, match="collateral: block_size=8 is longer than the text"):
        TextDataModule(story, collateral=short, **SMALL).collateral_dataloader()


@pytest.mark.parametrize("name", ["other.json", "other.jsonl"])
def test_other_text_of_questions_is_asked_as_questions_are(story: Path, tmp_path: Path, name: str) -> None:
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(40)]
    other = tmp_path / name
    other.write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
    sums = tmp_path / "sums.jsonl"
    sums.write_text("\n".join(json.dumps({"question": f"{n} + 7?", "answer": str(n + 7)}) for n in range(40)))
    asked = TextDataModule(story, "bytes", collateral=other, **SMALL)
    known = KnowledgeDataModule(sums, "bytes", collateral=other, batch_size=SMALL["batch_size"])
    loaders = [data.collateral_dataloader() for data in (asked, known)]
    for one, two in zip(*(list(loader or ()) for loader in loaders), strict=True):
        assert {key: value.tolist() for key, value in one.items()} == {k: v.tolist() for k, v in two.items()}
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "no question"}')
    with pytest.raises(ValueError, match=r"collateral: cannot tell the format.*goes into a file or folder of \.txt"):
        TextDataModule(story, "bytes", collateral=texts, **SMALL)
