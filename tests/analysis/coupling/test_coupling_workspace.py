"""Blocks in a folder: the same numbers, after any interruption, and of no other run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import knowledge_coupling
from lightning_goldy.analysis.coupling import coupling as coupling_run
from lightning_goldy.analysis.coupling.coupling import CouplingRun
from lightning_goldy.core.files import StoreError
from lightning_goldy.core.objective import CausalLMObjective
from tests.references.coupling_models import pieces
from tests.references.models import build

LENGTHS = [7, 12, 5, 9, 12, 8, 6, 10, 5, 7, 11]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(coupling_run, "_FOLDER_BLOCK_SIZE", 3)
    monkeypatch.setattr(coupling_run, "_BLOCK_SIZE", 4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "options", [{}, {"select": ["*attention*", "*attn*"][:1]}, {"projection": 64}, {"center": True}]
)
def test_a_folder_gives_what_memory_gives(tmp_path, small_blocks, family, options):
    if family == "gpt2" and "select" in options:
        options = {"select": ["*bias", "*c_proj*"]}
    model, batch = build(family).double(), pieces(LENGTHS)
    expected = knowledge_coupling(model, [batch], **options)
    found = knowledge_coupling(model, [batch], workspace=tmp_path, **options)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.norms, expected.norms)
    assert torch.equal(found.log_probs, expected.log_probs)
    kinds = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert kinds == ["coupling.json", *["products"] * 4, *["summary"] * 4]  # rows go when all is done


class StopError(Exception):
    pass


@pytest.mark.parametrize("at", range(12))
def test_an_interrupted_run_goes_on(tmp_path, small_blocks, monkeypatch, at):
    model, batch = build("gpt2"), pieces(LENGTHS)
    batch["labels"][4] = -100
    options = {"workspace": tmp_path, "on_error": "nan", "chunk_size": 2}
    expected = knowledge_coupling(model, [batch], on_error="nan", chunk_size=2)
    calls = []

    def counted(original):
        def replacement(self, *args, **kwargs):
            if len(calls) == at:
                raise StopError
            calls.append(original.__name__)
            return original(self, *args, **kwargs)

        return replacement

    with monkeypatch.context() as patch:
        patch.setattr(CouplingRun, "_captured", counted(CouplingRun._captured))
        patch.setattr(CouplingRun, "_products", counted(CouplingRun._products))
        if at < 8:
            with pytest.raises(StopError):
                knowledge_coupling(model, [batch], **options)
        else:
            knowledge_coupling(model, [batch], **options)
    done = len(calls)
    assert done == min(at, 8)
    at = None
    with monkeypatch.context() as patch:
        patch.setattr(CouplingRun, "_captured", counted(CouplingRun._captured))
        patch.setattr(CouplingRun, "_products", counted(CouplingRun._products))
        found = knowledge_coupling(model, [batch], **options)
    assert len(calls) == 8  # nothing was done twice
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.norms, expected.norms, equal_nan=True)
    assert found.failed == expected.failed


def test_an_interruption_in_the_middle_of_a_block_leaves_no_half_file(tmp_path, small_blocks):
    model, batch = build("gpt2"), pieces(LENGTHS)

    def stop(done, total):
        if done == 5:
            raise StopError

    with pytest.raises(StopError):
        knowledge_coupling(model, [batch], workspace=tmp_path, chunk_size=1, progress=stop)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["coupling.json", "rows-00000.safetensors", "summary-00000.json"]


class Shifted(CausalLMObjective):
    pass


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("pieces", {"lengths": [*LENGTHS[:-1], 4]}),
        ("weights", {"seed": 1}),
        ("weights", {"half": True}),
        ("model", {"family": "llama"}),
        ("selection", {"options": {"select": "attention_output"}}),
        ("selection", {"options": {"layers": "last:1"}}),
        ("projection", {"options": {"projection": 64}}),
        ("objective", {"options": {"objective": Shifted()}}),
        ("autocast", {"autocast": True}),
    ],
)
def test_the_blocks_of_another_run_are_refused_by_name(tmp_path, what, change):
    knowledge_coupling(build("gpt2"), [pieces(LENGTHS)], workspace=tmp_path)
    model = build(change.get("family", "gpt2"), change.get("seed", 0))
    if "half" in change:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3
    batch = pieces(change.get("lengths", LENGTHS))
    with torch.autocast("cpu", enabled="autocast" in change), pytest.raises(StoreError, match=f"other {what}"):
        knowledge_coupling(model, [batch], workspace=tmp_path, **change.get("options", {}))
    knowledge_coupling(build("gpt2"), [pieces(LENGTHS)], workspace=tmp_path, chunk_size=1)  # still good


def test_other_dropout_does_not_matter_but_other_activations_do(tmp_path):
    model = build("gpt2")
    knowledge_coupling(model, [pieces(LENGTHS)], workspace=tmp_path)
    model.transformer.h[0].mlp.act = nn.ReLU()
    with pytest.raises(StoreError, match="other model"):
        knowledge_coupling(model, [pieces(LENGTHS)], workspace=tmp_path)


def test_damaged_folders_are_named(tmp_path, small_blocks):
    model, batch = build("gpt2"), [pieces(LENGTHS)]
    knowledge_coupling(model, batch, workspace=tmp_path)
    header = tmp_path / "coupling.json"
    text = header.read_text()
    header.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(StoreError, match="format version 9"):
        knowledge_coupling(model, batch, workspace=tmp_path)
    header.write_text("[]")
    with pytest.raises(StoreError, match="not the header"):
        knowledge_coupling(model, batch, workspace=tmp_path)
    header.write_text(text)
    products = tmp_path / "products-00001.safetensors"
    products.write_bytes(products.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"products-00001.safetensors: not a whole block"):
        knowledge_coupling(model, batch, workspace=tmp_path)
    summary = tmp_path / "summary-00002.json"
    fields = json.loads(summary.read_text())
    summary.write_text(json.dumps({**fields, "run": "another"}))
    with pytest.raises(StoreError, match=r"summary-00002.json: a block of another run"):
        knowledge_coupling(model, batch, workspace=tmp_path)


def test_a_folder_stays_within_the_memory_that_it_is_given(tmp_path):
    model, batch = build("gpt2"), [pieces([12] * 40)]
    limit = 40_000
    with pytest.raises(ValueError, match="pass workspace="):
        knowledge_coupling(model, batch, memory_limit=limit)
    expected = knowledge_coupling(model, batch)
    found = knowledge_coupling(model, batch, memory_limit=limit, workspace=tmp_path)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-5, atol=1e-6)
    size = json.loads((tmp_path / "coupling.json").read_text())["block_size"]
    assert 1 <= size <= 4
    # With another limit the blocks that are there count.
    again = knowledge_coupling(model, batch, memory_limit=10 * limit, workspace=tmp_path)
    assert torch.equal(again.matrix, found.matrix)


@pytest.mark.slow
def test_ten_thousand_pieces(tmp_path):
    torch.manual_seed(0)
    model = build("gpt2")
    lengths = torch.randint(4, 9, (10_000,), generator=torch.Generator().manual_seed(2)).tolist()
    batch = pieces(lengths)
    some = list(range(0, 10_000, 500))
    result = knowledge_coupling(model, [batch], workspace=tmp_path, memory_limit=8 << 20)
    expected = knowledge_coupling(model, [{name: tensor[some] for name, tensor in batch.items()}])
    torch.testing.assert_close(result.matrix[some][:, some], expected.matrix, rtol=1e-5, atol=1e-6)
    assert result.matrix.isfinite().all()
