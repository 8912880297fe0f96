"""``goldy coupling``: what it writes is what the analyses say, and all of it is documented."""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lightning_goldy.analysis.coupling import (
    CouplingResult,
    activation_similarity,
    coupling_statistics,
    knowledge_coupling,
    layer_gradient_norms,
)
from lightning_goldy.analysis.ripple import ripple_effects
from lightning_goldy.callbacks.engine.store import peak_memory_bytes
from lightning_goldy.cli import add_command, main
from lightning_goldy.commands.coupling.options import Model
from lightning_goldy.commands.coupling.run import chosen_pieces, codes_of, drawn_edits, read_edits, strong_pairs
from lightning_goldy.commands.coupling.summary import category_means, linked_groups
from lightning_goldy.core.files import read_rows
from lightning_goldy.data import byte_tokenizer, load_pieces
from lightning_goldy.training.models import build_model
from tests.data.question_sets import RECORDS, write

PARTS = (
    "metadata",
    "knowledge_pieces",
    "gradient_analysis",
    "coupling_analysis",
    "high_coupling_pairs",
    "cross_question_analysis",
    "generated_files",
    "performance",
    "readiness",
)
DOCS = Path(__file__).parents[2] / "docs"
TINY = {"model_type": "gpt2", "vocab_size": 258, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 160}
IDS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
# Commas, quotes, new lines, formulas, and a question that is too long for the model.
ROWS = [
    {"id": "=1", "question": "Capital of Peru, please?", "answer": "Lima", "category": "capital", "group": "Peru"},
    {"id": "2", "question": 'The "sol"\nis whose?', "answer": "@Peru", "category": "money", "group": "Peru"},
    {"id": "3", "question": "Capital of Chad?", "answer": "N'Djamena", "category": "capital", "group": "Chad"},
    {"id": "4", "question": "Capital of Lima region?", "answer": "lima ", "category": "capital"},
    {"id": "5", "question": "x" * 200, "answer": "none"},
    {"id": "6", "question": "<b>Of Mali?</b>", "answer": "Bamako", "category": "capital", "group": "Mali", "hop": 1},
    {"id": "7", "question": "Money of Mali?", "answer": "Franc", "category": "money", "group": "Mali", "hop": 2},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = build_model({**TINY, **IDS})
    # Random weights of the usual size give gradients that hardly differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(model_folder, tmp_path_factory):
    """A run with everything: a piece that fails, activations, edits from a file, finetuning."""
    folder = tmp_path_factory.mktemp("run")
    data, edits = folder / "pieces.jsonl", folder / "edits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    edits.write_text('{"id": "3", "answer": "Lima"}\n{"id": "6", "answer": "Rome", "subject": "Mali"}\n')
    words = ["--data", str(data), "--edits", str(edits), "--editor", "finetune", "--steps", "3", "--activation"]
    out = folder / "out"
    assert main(["coupling", "--model", str(model_folder), *words, "--high", "0.3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def summary(written):
    return json.loads((written / "coupling.json").read_text())


@pytest.fixture(scope="module")
def loaded(model_folder, written):
    return {
        "model": AutoModelForCausalLM.from_pretrained(model_folder),
        "pieces": list(load_pieces(written.parent / "pieces.jsonl").pieces),
        "tokenizer": byte_tokenizer(),
    }


def tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(str(folder / "coupling.safetensors"), framework="pt") as file:
        header = json.loads(file.metadata()["goldy_coupling"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def paths(value, place=""):
    """Every field as the schema writes it: items of a list after ``[]``."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from paths(each, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        for each in value:
            yield from paths(each, f"{place}[]")
    else:
        yield place


def documented() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / "coupling_schema.md").read_text(), re.MULTILINE)


def test_there_are_nine_parts(summary):
    assert tuple(summary) == PARTS
    assert len(PARTS) == 9


def test_every_field_is_documented_and_every_documented_field_is_written(summary, model_folder, tmp_path):
    write(tmp_path, "musique", RECORDS["musique"])
    words = ["--data", str(tmp_path / "musique.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["coupling", "--model", str(model_folder), *words]) == 0
    # With records that are left out, pieces that lack something, hops.
    second = json.loads((tmp_path / "out" / "coupling.json").read_text())
    known = documented()
    assert len(known) == len(set(known)) > 200
    found = {*paths(summary), *paths(second)}
    # What may be null or empty is documented by itself too.
    outer = {place for place in known if any(each.startswith((f"{place}.", f"{place}[")) for each in found)}
    assert sorted(found - set(known)) == []
    assert sorted(set(known) - found - outer) == []


def test_every_option_and_check_is_documented(summary):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), "coupling")
    page = (DOCS / "knowledge_coupling.md").read_text()
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for action in commands.choices["coupling"]._actions:
        if "--help" not in action.option_strings:
            assert f"`{action.option_strings[0]}`" in page, action
    for each in summary["readiness"]["checks"]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {each['check']}"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        side = "below" if each["rule"] == "at least" else "above"
        shown = [cell.removeprefix(f"{side} ") for cell in cells[1:] if cell]
        known = [each["threshold"], *([each["fail_threshold"]] if each["fail_threshold"] is not None else [])]
        assert [float(cell) for cell in shown] == known


def test_a_run_without_extras_writes_documented_fields_only(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["coupling", "--model", str(model_folder), "--data", "atlas", "--n-pieces", "8"]) == 0
    out = Path("runs/coupling/version_0")
    found = json.loads((out / "coupling.json").read_text())
    assert sorted(set(paths(found)) - set(documented())) == []
    assert found["cross_question_analysis"]["ripple"] is None
    assert found["coupling_analysis"]["activation"] is None
    assert found["knowledge_pieces"]["template"] == "{question}"
    assert found["knowledge_pieces"]["compared"] == 8
    assert not (out / "ripple.png").exists()
    statuses = {each["check"]: each["status"] for each in found["readiness"]["checks"]}
    assert statuses["share of edits that were learned"] == "not measured"
    assert statuses["pieces"] == "warn"
    assert any("--edits 10" in step for step in found["readiness"]["next_steps"])


def test_the_matrix_is_that_of_the_analysis(summary, written, loaded):
    expected = knowledge_coupling(loaded["model"], loaded["pieces"], tokenizer=loaded["tokenizer"], on_error="nan")
    held, header = tensors(written)
    torch.testing.assert_close(held["coupling"], expected.matrix, equal_nan=True, rtol=0, atol=1e-6)
    torch.testing.assert_close(held["norms"], expected.norms, equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(held["log_probs"], expected.log_probs, equal_nan=True, rtol=1e-6, atol=0)
    assert header["ids"] == [row["id"] for row in ROWS]
    similar = activation_similarity(loaded["model"], loaded["pieces"], tokenizer=loaded["tokenizer"], on_error="nan")
    torch.testing.assert_close(held["activation"], similar.matrix, equal_nan=True, rtol=0, atol=1e-6)
    statistics = coupling_statistics(expected, high=0.3)
    told = summary["coupling_analysis"]
    assert told["mean"] == pytest.approx(statistics.mean, abs=1e-6)
    assert (told["n_pieces"], told["n_failed"], told["n_pairs"]) == (6, 1, 15)
    assert told["high"] == statistics.high
    assert held["order"].tolist() == list(statistics.order)
    assert summary["knowledge_pieces"]["failed"] == list(expected.failed)
    assert expected.failed[0]["id"] == "5"
    assert summary["knowledge_pieces"]["pieces"][4]["gradient_norm"] is None
    assert summary["knowledge_pieces"]["pieces"][4]["failure"] == expected.failed[0]["reason"]


def test_norms_by_layer_make_up_the_norm(summary, loaded):
    kept = [piece for piece in loaded["pieces"] if piece.id != "5"]
    layers = layer_gradient_norms(loaded["model"], kept, tokenizer=loaded["tokenizer"])
    whole = knowledge_coupling(loaded["model"], kept, tokenizer=loaded["tokenizer"])
    squares = torch.stack(list(layers.values())).square()
    torch.testing.assert_close(squares.sum(dim=0).sqrt(), whole.norms, rtol=1e-4, atol=0)
    told = summary["gradient_analysis"]
    assert [each["block"] for each in told["by_layer"]] == list(layers)
    for each, square in zip(told["by_layer"], squares, strict=True):
        assert each["mean_norm"] == pytest.approx(float(square.sqrt().mean()), rel=1e-4)
    assert sum(each["share_of_square"] for each in told["by_layer"]) == pytest.approx(1)
    assert 0 <= told["backward_error"] < 1e-4
    assert all(parameter.requires_grad for parameter in loaded["model"].parameters())


def test_ripples_are_those_of_the_analysis(summary, written, loaded):
    kept = [piece for piece in loaded["pieces"] if piece.id != "5"]
    edits = read_edits(written.parent / "edits.jsonl", kept)
    expected = ripple_effects(loaded["model"], kept, edits, tokenizer=loaded["tokenizer"], editor="finetune", steps=3)
    held, header = tensors(written)
    torch.testing.assert_close(held["ripple/after"] - held["ripple/before"], expected.measured, rtol=0, atol=1e-5)
    assert header["ripple_ids"] == [piece.id for piece in kept]
    (row,) = read_rows(written / "goldy" / "ripple_effects" / "results.jsonl")
    cost = {name: row["cost"][name] for name in ("forwards", "backwards")}
    assert cost == vars(expected.cost)
    assert row["metrics"]["new_answer_change"] == pytest.approx(expected.metrics()["new_answer_change"], abs=1e-5)
    (row,) = read_rows(written / "goldy" / "knowledge_coupling" / "results.jsonl")
    # Each of the six pieces that can be run, and one more to see which layers take part.
    assert (row["cost"]["forwards"], row["cost"]["backwards"]) == (7, 7)
    told = summary["cross_question_analysis"]["ripple"]
    assert [each["new_answer"] for each in told["edits"]] == ["Lima", "Rome"]
    assert told["agreement"][0]["spearman"] == pytest.approx(expected.agreement()[0].spearman, abs=1e-3)
    assert told["edits"][0]["mean_change"] == pytest.approx(
        float(expected.measured[0][[place for place, piece in enumerate(kept) if piece.id != "3"]].mean()), abs=1e-5
    )
    named = [each["predictor"] for each in told["size_of_change"]]
    assert named == ["first_order", "coupling", "coupling_matrix", "activation"]


def test_the_table_of_pairs_holds_any_text_and_no_formula(summary, written):
    with open(written / "pairs.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == summary["high_coupling_pairs"]["listed"] == 15
    cosines = [float(row["cosine"]) for row in found]
    assert cosines == sorted(cosines, reverse=True)
    texts = {row[f"{side}_{name}"] for row in found for side in ("first", "second") for name in ("id", "question")}
    assert {"'=1", 'The "sol"\nis whose?', "Capital of Peru, please?"} <= texts
    assert "'@Peru" in {row["second_answer"] for row in found} | {row["first_answer"] for row in found}
    same = {(row["first_id"], row["second_id"]): (row["same_answer"], row["same_group"]) for row in found}
    assert same["'=1", "4"] == ("1", "0")
    assert same["'=1", "2"] == ("0", "1")
    matrix, _ = tensors(written)
    numbers = {row["id"]: place for place, row in enumerate(ROWS)}
    for row in found:
        first, second = (numbers[row[f"{side}_id"].lstrip("'")] for side in ("first", "second"))
        assert float(row["cosine"]) == pytest.approx(float(matrix["coupling"][first, second]), abs=1e-6)


def test_every_file_is_there_and_listed(summary, written):
    listed = {each["file"]: each["bytes"] for each in summary["generated_files"]["files"]}
    there = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    assert set(listed) == set(there)
    assert {name: size for name, size in listed.items() if size is not None} == {
        name: size for name, size in there.items() if name != "coupling.json"
    }
    for name in ("heat_map.png", "distribution.png", "ripple.png"):
        assert (written / name).read_bytes().startswith(b"\x89PNG")
    page = (written / "report.html").read_text()
    assert "Knowledge coupling" in page
    assert "Ripple effects" in page
    assert "Can this be trusted?" in page
    assert "&lt;b&gt;Of Mali?" in page
    assert "<b>Of Mali?" not in page


def test_the_verdict_follows_from_the_checks(summary):
    told = summary["readiness"]
    for each in told["checks"]:
        sign = 1 if each["rule"] == "at least" else -1
        if each["value"] is None:
            assert each["status"] == "not measured"
            continue
        well = sign * each["value"] >= sign * each["threshold"]
        assert (each["status"] == "pass") == well, each["check"]
    failing = {each["check"] for each in told["checks"] if each["status"] == "fail"}
    # One of seven pieces failed, no answer is known to random weights.
    assert "share of answers the model knows" in failing
    assert told["verdict"] == "not ready"
    assert len(told["next_steps"]) == len(set(told["next_steps"])) >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--format", "jsn"], "did you mean 'jsonl'"),
        (["--select", "mlp_outputs"], "did you mean 'mlp_output'"),
        (["--select", "*nothing*"], "matches no parameter"),
        (["--layers", "all"], "--layers is a:b"),
        (["--layers", "7:9"], "is none of the 2 layers"),
        (["--projection", "1"], "projection must be at least 2; got 1"),
        (["--high", "0.1", "--moderate", "0.5"], "--high and --moderate must be in order"),
        (["--n-pieces", "1"], "--n-pieces must be at least 2"),
        (["--n-pieces", "90"], "--n-pieces 90: "),
        (["--edits", "0"], "--edits must be at least 1; got 0"),
        (["--edits", "90"], "--edits 90: the number of edits must be between 1 and 6"),
        (["--edits", "none.jsonl"], "there is no file none.jsonl"),
        (["--edits", "2", "--editor", "gradient"], "did you mean 'gradient_step'"),
        (["--edits", "2", "--steps", "3"], "editor 'gradient_step' has no setting 'steps'"),
        (["--learning-rate", "0.1"], "say with --edits what to edit"),
        (["--template", "no place"], "must contain '{question}' exactly once"),
    ],
    ids=range(18),
)
def test_what_cannot_work_is_a_short_message(model_folder, written, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(model_folder), "--data", str(written.parent / "pieces.jsonl"), "--out", "out"]
    assert main(["coupling", *given, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_memory_is_measured_where_the_model_is(model_folder, written, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measured = []

    def watching(device):
        measured.append(device)
        return peak_memory_bytes(device)

    monkeypatch.setattr("lightning_goldy.commands.coupling.summary.peak_memory_bytes", watching)
    words = ["--data", str(written.parent / "pieces.jsonl"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["coupling", "--model", str(model_folder), *words]) == 0
    assert measured == [torch.device("cpu")]
    performance = json.loads((tmp_path / "out" / "coupling.json").read_text())["performance"]
    assert (performance["device"], performance["memory_of"]) == ("cpu", "process")
    # Without a wish it is a GPU where there is one.
    assert Model("any").placed == torch.device("cuda")
    assert Model("any", device="cuda:1").placed == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Model("any").placed == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:1: PyTorch finds no GPU; leave it out, or give cpu"):
        _ = Model("any", device="cuda:1").placed


def test_a_folder_with_something_in_it_is_refused(model_folder, written, capsys):
    before = (written / "coupling.json").read_bytes()
    assert main(["coupling", "--model", str(model_folder), "--data", "atlas", "--out", str(written)]) == 2
    assert "is not empty: it holds 'coupling.json'" in capsys.readouterr().err
    assert (written / "coupling.json").read_bytes() == before


def test_a_workspace_may_lie_in_the_folder(model_folder, tmp_path):
    words = ["--data", "atlas", "--n-pieces", "8", "--workspace", str(tmp_path / "out" / "work")]
    (tmp_path / "out" / "work").mkdir(parents=True)
    assert main(["coupling", "--model", str(model_folder), *words, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "coupling.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "9", "answer": "A"}', "no piece has the id '9'"),
        ('{"id": "1"}', "'answer' must be text; got None"),
        ('{"id": "1", "answer": " "}', "'answer' must be text; got ' '"),
        ('{"id": "1", "answer": "A", "subjct": "B"}', "did you mean 'subject'"),
        ("[1]", "line 1"),
        ("", "holds no edit"),
    ],
    ids=range(6),
)
def test_faulty_edits_are_refused_with_their_place(tmp_path, line, message):
    from lightning_goldy.core.pieces import KnowledgePiece

    (tmp_path / "edits.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_edits(tmp_path / "edits.jsonl", [KnowledgePiece("1", "Q?", "A")])


def test_drawn_edits_are_of_the_category_and_new():
    pieces = list(load_pieces("atlas").pieces)
    edits = drawn_edits(pieces, 50, seed=3)
    known = {piece.id: piece for piece in pieces}
    answers = {name: {piece.answer for piece in pieces if piece.category == name} for name in ("capital", "continent",
               "currency", "language")}  # fmt: skip
    for edit in edits:
        assert edit.answer != known[edit.piece].answer
        assert edit.answer in answers[known[edit.piece].category]
    assert len({edit.piece for edit in edits}) == 50
    assert edits == drawn_edits(pieces, 50, seed=3) != drawn_edits(pieces, 50, seed=4)


def test_groups_are_drawn_whole():
    pieces = list(load_pieces("atlas").pieces)
    chosen = chosen_pieces(pieces, 41, seed=1)
    assert len(chosen) == 41
    sizes = sorted(sum(piece.group == name for piece in chosen) for name in {piece.group for piece in chosen})
    assert sizes == [1, *[4] * 10]
    assert [pieces.index(piece) for piece in chosen] == sorted(pieces.index(piece) for piece in chosen)


def coupled(matrix: np.ndarray, **columns: list) -> CouplingResult:
    count = len(matrix)
    names = ("id", "question", "answer", "category", "group", "hop")
    rows = [{name: columns.get(name, [None] * count)[place] for name in names} for place in range(count)]
    failed = torch.from_numpy(matrix).isnan().all(dim=1)
    return CouplingResult(
        matrix=torch.from_numpy(matrix).float(),
        norms=torch.where(failed, torch.nan, 1.0).double(),
        log_probs=torch.zeros(count, dtype=torch.float64),
        pieces=tuple(rows),
        failed=(),
        parameters=("h.0.w",),
        measure="gradient",
        normalize=True,
        center=False,
        projection=None,
        projection_error=None,
        seconds=0.0,
    )


def random_matrix(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    half = np.triu(generator.uniform(-1, 1, (count, count)).round(2), 1)
    matrix = half + half.T + np.eye(count)
    matrix[3], matrix[:, 3] = np.nan, np.nan
    return matrix


@pytest.mark.parametrize(("least", "most"), [(0, 5), (7, 7), (0, 10_000), (40, 10_000), (5, 50)])
@pytest.mark.parametrize("threshold", [0.5, 0.98, 2.0, -1.0])
@pytest.mark.parametrize("waiting", [1, 100_000])
def test_strong_pairs_are_the_sorted_pairs(monkeypatch, least, most, threshold, waiting):
    monkeypatch.setattr("lightning_goldy.commands.coupling.run._WAITING", waiting)
    matrix = random_matrix(30)
    found = strong_pairs(coupled(matrix), threshold, least=least, most=most)
    exact = matrix.astype(np.float32).astype(np.float64)
    every = [(-exact[i, j], i, j) for i in range(30) for j in range(i + 1, 30) if np.isfinite(exact[i, j])]
    every.sort()
    above = sum(-key >= threshold for key, _, _ in every)
    expected = every[: min(most, max(least, above))]
    assert list(zip((-found.cosine).tolist(), found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.above == above


def test_means_of_categories_and_groups_are_means_of_pairs():
    matrix = random_matrix(24, seed=2)
    categories = [None if place % 5 == 0 else f"c{place % 3}" for place in range(24)]
    groups = [None if place % 7 == 0 else f"g{place % 6}" for place in range(24)]
    result = coupled(matrix, category=categories, group=groups)

    def mean(column, one, other):
        pairs = [
            matrix[i, j]
            for i in range(24)
            for j in range(24)
            if i != j and 3 not in (i, j) and column[i] == one and column[j] == other
        ]
        return sum(pairs) / len(pairs)

    told = category_means(result)
    for row, one in enumerate(told["names"]):
        for column, other in enumerate(told["names"]):
            assert told["mean_cosine"][row][column] == pytest.approx(mean(categories, one, other), abs=1e-6)
    linked = linked_groups(result)
    names = sorted({name for name in groups if name is not None})
    every = sorted((mean(groups, one, other) for place, one in enumerate(names) for other in names[place + 1 :]))[::-1]
    assert [each["mean_cosine"] for each in linked] == pytest.approx(every[:10], abs=1e-6)
    for each in linked:
        assert each["mean_cosine"] == pytest.approx(mean(groups, each["first"], each["second"]), abs=1e-6)


def test_codes_fold_only_where_asked():
    assert codes_of(["a", "A", None], fold=False).tolist() == [0, 1, -1]
