from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy import GoldyModule
from lightning_goldy.callbacks import ChangeAttribution, GoldenSnapshot
from lightning_goldy.data import KnowledgeDataModule, KnowledgePiece, read_pieces
from tests.data.shared_data import shared_file

LINES = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(20)]


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return _write(tmp_path / "sums.jsonl", LINES)


def test_all_fields_are_kept(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "question": "Q?",
        "answer": "A",
        "category": "c",
        "group": "g",
        "hop": 2,
        "supporting_fact": "Q is A.",
    }
    pieces = read_pieces(_write(tmp_path / "p.jsonl", [row, "", {"question": "R?", "answer": "B", "hop": None}]))
    assert pieces[0] == KnowledgePiece("7", "Q?", "A", "c", "g", 2, "Q is A.")
    assert pieces[1] == KnowledgePiece("3", "R?", "B")


def test_splits_are_disjoint_seeded_and_complete(sums: Path) -> None:
    def parts(seed: int) -> list[list[KnowledgePiece]]:
        data = KnowledgeDataModule(sums, "bytes", probe_size=4, val_share=0.1, seed=seed)
        return [data.train_pieces, data.val_pieces, data.probe_pieces]

    first = parts(0)
    assert [len(part) for part in first] == [14, 2, 4]
    assert sorted(piece.id for part in first for piece in part) == sorted(str(n + 1) for n in range(20))
    assert parts(0) == first
    assert parts(1) != first


def test_other_questions_are_batches_of_their_own(sums: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Who is number {n}?", "answer": f"N{n}"} for n in range(5)]
    other, small = _write(tmp_path / "other.jsonl", rows), {"probe_size": 4, "batch_size": 2, "template": "{question}"}
    plain = KnowledgeDataModule(sums, "bytes", **small)
    data = KnowledgeDataModule(sums, "bytes", collateral=other, **small)
    assert plain.collateral_dataloader() is None
    assert [plain.train_pieces, plain.val_pieces, plain.probe_pieces] == [
        data.train_pieces,
        data.val_pieces,
        data.probe_pieces,
    ]
    first, again = (
        [row for batch in data.collateral_dataloader() or () for row in batch["input_ids"].tolist()] for _ in range(2)
    )
    assert first == again
    texts = [data.tokenizer.decode(row, skip_special_tokens=True) for row in first]
    assert sorted(texts) == [f"Who is number {n}? N{n}" for n in range(5)]
    assert texts != sorted(texts)
    batch = next(iter(data.collateral_dataloader() or ()))
    assert int((batch["labels"][0] != -100).sum()) == len(" N0") + 1


def test_other_questions_that_the_finetune_asks_too_are_told(sums: Path, tmp_path: Path) -> None:
    rows = [
        {"question": question, "answer": "2"}
        for question in ("Who?", KnowledgeDataModule(sums, "bytes").pieces[0].question)
    ]
    other = _write(tmp_path / "other.jsonl", rows)
    with pytest.warns(UserWarning, match=r"collateral: 1 of its 2 questions are the finetune's own"):
        KnowledgeDataModule(sums, "bytes", probe_size=4, collateral=other)


def test_other_questions_that_are_none_are_refused(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such"):
        KnowledgeDataModule(sums, "bytes", collateral=tmp_path / "no_such.jsonl")
    with pytest.raises(ValueError, match=r"collateral: .*other\.jsonl"):
        KnowledgeDataModule(sums, "bytes", collateral=_write(tmp_path / "other.jsonl", [{"question": 3}]))


def test_harm_is_measured_on_other_questions(sums: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "other.jsonl", [{"question": f"Who is {n}?", "answer": f"N{n}"} for n in range(6)])
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=258, n_positions=64, bos_token_id=0, eos_token_id=0)
    watcher = ChangeAttribution(nodes=2, shares=[0.5], baselines=["random"], n_samples=4, n_collateral=4)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[GoldenSnapshot(), watcher],
    )
    module = GoldyModule(GPT2LMHeadModel(config), optimizer={"learning_rate": 1e-2})
    trainer.fit(module, KnowledgeDataModule(sums, "bytes", probe_size=4, collateral=other))
    written = (watcher.folder / "results.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert rows[-1]["metrics"]["harm"] is not None
    assert rows[-1]["result"]["graft"]["n_collateral"] == 4


def test_prompts_follow_the_template_and_are_masked(sums: Path) -> None:
    data = KnowledgeDataModule(sums, "bytes", template="{question} {answer}:", probe_size=4, batch_size=2)
    piece = data.pieces[5]
    assert data.prompt(piece) == "What is 5 plus 5? {answer}:"
    batch = next(iter(data.piece_dataloader([piece])))
    assert bytes(batch["input_ids"][0, :-1].tolist()) == b"What is 5 plus 5? {answer}: 10"
    labels = batch["labels"][0].tolist()
    assert labels == [-100] * len("What is 5 plus 5? {answer}:") + [*b" 10", 256]


def test_loaders_cover_their_splits(sums: Path) -> None:
    data = KnowledgeDataModule(sums, "bytes", probe_size=4, batch_size=3)
    data.setup()
    for loader, pieces in (
        (data.train_dataloader(), data.train_pieces),
        (data.val_dataloader(), data.val_pieces),
        (data.probe_dataloader(), data.probe_pieces),
    ):
        texts = [data.tokenizer.decode(row, skip_special_tokens=True) for batch in loader for row in batch["input_ids"]]
        assert sorted(texts) == sorted(f"Question: {piece.question}\nAnswer: {piece.answer}" for piece in pieces)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object with id, question, answer"),
        ({"answer": "A"}, "line 2, field 'question': expected text that is not empty; found nothing"),
        ({"question": "Q?", "answer": " "}, "line 2, field 'answer': expected text that is not empty; found ' '"),
        ({"question": "Q?", "answer": ["A"]}, r"line 2, field 'answer': .* found \['A'\]"),
        ({"question": "Q?", "answer": "A", "hop": "1"}, "line 2, field 'hop': expected a whole number; found '1'"),
        ({"question": "Q?", "answer": "A", "hop": True}, "line 2, field 'hop': expected a whole number; found True"),
        ({"question": "Q?", "answer": "A", "group": 3}, "line 2, field 'group': expected text; found 3"),
        ({"question": "Q?", "answer": "A", "id": 1.5}, "line 2, field 'id': expected text or a whole number"),
        ({"question": "Q?", "answer": "A", "catgory": "x"}, "line 2: unknown field 'catgory'; did you mean 'category'"),
        ({"question": LINES[0]["question"], "answer": "A"}, "line 2, field 'question': .* already occurs on line 1"),
        ({"question": "Q?", "answer": "A", "id": "1"}, "line 2, field 'id': '1' already occurs on line 1"),
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = _write(tmp_path / "faulty.jsonl", [LINES[0], line])
    with pytest.raises(ValueError, match=rf"faulty\.jsonl, {message}"):
        read_pieces(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl' is not a file"):
        KnowledgeDataModule(tmp_path / "nothing.jsonl", "bytes")
    with pytest.raises(ValueError, match="holds no knowledge pieces"):
        KnowledgeDataModule(_write(tmp_path / "blank.jsonl", ["", " "]), "bytes")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_pieces(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Q: {query}"}, "must contain '{question}' exactly once"),
        ({"val_share": 0}, "val_share=0 must be a share of the pieces"),
        ({"probe_size": 18}, "probe_size=18 is too large: of 20 pieces, 2 are for validation"),
        ({"probe_size": 0}, "probe_size=0 must be an integer of at least 1"),
    ],
)
def test_bad_arguments(sums: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeDataModule(sums, "bytes", **options)


def test_samples_that_are_too_long_are_named(sums: Path) -> None:
    data = KnowledgeDataModule(sums, "bytes", probe_size=4, max_length=20)
    with pytest.raises(ValueError, match=r"piece '\d+' \('What is .*\) has \d+ tokens, more than max_length=20"):
        data.setup()


@pytest.mark.parametrize("name", ["2wikimultihop_qa.json", "bamboogle_qa.json", "musique_qa.json"])
def test_public_question_sets(tmp_path: Path, name: str) -> None:
    rows = json.loads(shared_file(name).read_text(encoding="utf-8"))
    kept = {row["Question"]: {"id": row["id"], "question": row["Question"], "answer": row["answer"][0]} for row in rows}
    data = KnowledgeDataModule(_write(tmp_path / "set.jsonl", list(kept.values())), "bytes", probe_size=8)
    data.setup()
    assert len(data.pieces) == len(kept) > 100
    questions = [{piece.question for piece in part} for part in (data.train_pieces, data.val_pieces, data.probe_pieces)]
    assert sum(map(len, questions)) == len(set.union(*questions)) == len(kept)
    for batch in data.probe_dataloader():
        assert ((batch["labels"] != -100).sum(1) >= 2).all()
