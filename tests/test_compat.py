from __future__ import annotations

import inspect
import json

import pytest
import torch

from lightning_goldy.analysis import golden_parameters, reverse_golden_parameters
from lightning_goldy.compat import GoldilocksMixin, get_reverse_golden_params
from lightning_goldy.core import ParameterVector, StoreError, load_vectors
from tests.references.models import build

PAD = 1
DATASET = [([5, 6, 7][: 2 + index % 2], [8 + index, 9, 10][: 1 + index % 3]) for index in range(12)]


class Tokens:
    """Decodes ids to words; stands for a tokenizer."""

    pad_token_id = eos_token_id = 0

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def prompt_func(samples, processing_class):
    """Query, and query with response, padded on the right to a fixed length as the earlier examples did."""
    queries = [query + [PAD] * (4 - len(query)) for query, _ in samples]
    wholes = [query + answer + [PAD] * (8 - len(query + answer)) for query, answer in samples]
    return torch.tensor(queries), torch.tensor(wholes)


def batch_of(samples):
    """The same rows by hand."""
    ids = torch.zeros(len(samples), max(len(q + a) for q, a in samples), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (query, answer) in enumerate(samples):
        whole = torch.tensor(query + answer)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(query) : len(whole)] = whole[len(query) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    # How long a search goes on is not what is compared.
    monkeypatch.setattr("lightning_goldy.analysis.golden.reverse._PAIR_TRIALS", 1)


def test_reverse_golden_is_the_function_on_the_responses():
    model = build("gpt2")
    found = get_reverse_golden_params(
        model,
        DATASET,
        prompt_func,
        None,
        top_k_percent=5.0,
        num_samples=4,
        batch_size=2,
        fluctuation_strategy="chaos_driven",
        min_delta=0.0,
        pad_token_id=PAD,
    )
    expected = reverse_golden_parameters(
        model,
        [batch_of(DATASET[:2]), batch_of(DATASET[2:4])],
        eval_batches=[batch_of(DATASET[start : start + 2]) for start in range(4, 12, 2)],
        top_k_percent=5.0,
        strategy="chaos_driven",
        min_delta=0.0,
        chunk_size=4,
    )
    assert set(found) == {"masks", "summary", "kl_divergence"}
    assert found["kl_divergence"] == expected.kl_divergence
    assert all(torch.equal(found["masks"][name], expected.mask[name]) for name in expected.mask)
    for name, entry in found["summary"].items():
        assert set(entry) == {"shape", "active_count", "total_count", "density", "sparsity"}
        assert entry["active_count"] == int(found["masks"][name].sum())
        assert entry["density"] + entry["sparsity"] == 1.0


class Trainer(GoldilocksMixin):
    def __init__(self):
        self.model, self.processing_class = build("gpt2"), Tokens()


def test_the_mixin_gives_the_same(tmp_path):
    trainer = Trainer()
    before = ParameterVector.of(trainer.model)
    path = tmp_path / "mask.safetensors"
    golden = trainer.get_golden_params(DATASET, prompt_func, 3, 20.0, pad_token_id=PAD)
    expected = golden_parameters(trainer.model, [batch_of(DATASET[:3])], top_k_percent=20.0)
    assert set(golden) == {"masks", "summary"}
    assert all(torch.equal(golden["masks"][name], expected.mask[name]) for name in expected.mask)
    reverse = trainer.get_reverse_golden_params(DATASET, prompt_func, 2.0, save_path=str(path), pad_token_id=PAD)
    mask, header = load_vectors(path)
    assert header.kind == "mask"
    assert all(torch.equal(mask[name], each) for name, each in reverse["masks"].items())
    assert all(torch.equal(before[name], after) for name, after in ParameterVector.of(trainer.model).items())


def test_generations_are_compared_with_a_saved_mask(tmp_path, capsys):
    trainer = Trainer()
    path = str(tmp_path / "mask.safetensors")
    trainer.get_reverse_golden_params(DATASET, prompt_func, 10.0, save_path=path, pad_token_id=PAD)
    found = trainer.compare_generations_with_mask(path, DATASET, prompt_func, num_samples=2, max_new_tokens=5)
    assert len(found.plain) == 2
    assert "With and without the mask" in capsys.readouterr().out
    pickled = tmp_path / "old.pt"
    torch.save({"masks": {}}, pickled)
    with pytest.raises(StoreError):
        trainer.compare_generations_with_mask(str(pickled), DATASET, prompt_func)


def test_an_accelerator_is_asked_for_the_model():
    trainer = Trainer()
    inner = trainer.model
    trainer.model = torch.nn.DataParallel(inner)

    class Accelerator:
        def unwrap_model(self, model):
            return model.module

    trainer.accelerator = Accelerator()
    found = trainer.get_golden_params(DATASET, prompt_func, 1, pad_token_id=PAD)
    assert list(found["masks"]) == [name for name, _ in inner.named_parameters()]


def test_arguments_keep_their_names_order_and_defaults():
    parameters = inspect.signature(get_reverse_golden_params).parameters
    expected = {
        "top_k_percent": 30.0,
        "chunk_size": 4,
        "inflation_step": 1.2,
        "max_inflation_factor": 2.0,
        "decay_factor": 0.9,
        "min_delta": 0.01,
        "save_path": None,
        "num_samples": 4,
        "batch_size": 1,
        "eval_sample_size": 8,
        "max_stagnant_iterations": 5,
        "fluctuation_strategy": "adaptive_sinusoidal",
        "fluctuation_amplitude": 0.3,
        "fluctuation_frequency": 0.1,
        "momentum_factor": 0.8,
        "exploration_temperature": 1.0,
        "pad_token_id": 4,
    }
    assert list(parameters) == ["model", "eval_dataset", "prompt_func", "processing_class", *expected]
    assert {name: parameters[name].default for name in expected} == expected


def test_the_summary_goes_to_json(tmp_path):
    path = tmp_path / "summary.json"
    found = get_reverse_golden_params(
        build("gpt2"), DATASET, prompt_func, None, save_path=str(path), num_samples=2, pad_token_id=PAD
    )
    content = json.loads(path.read_text())
    assert content == {"summary": found["summary"], "kl_divergence": found["kl_divergence"]}


def test_what_was_passed_over_in_silence_is_an_error_now():
    model = build("gpt2")
    with pytest.raises(ValueError, match="there is no sample"):
        get_reverse_golden_params(model, [], prompt_func, None)
    with pytest.raises(ValueError, match=r"top_k_percent must lie in \(0, 100\]"):
        get_reverse_golden_params(model, DATASET, prompt_func, None, top_k_percent=0.0, pad_token_id=PAD)
    with pytest.raises(ValueError, match="unknown strategy"):
        get_reverse_golden_params(model, DATASET, prompt_func, None, fluctuation_strategy="sine", pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"save_path ends with .* got 'masks\.pt'"):
        get_reverse_golden_params(model, DATASET, prompt_func, None, save_path="masks.pt")
    with pytest.raises(ValueError, match="there is no response token"):
        get_reverse_golden_params(model, [([5, 6], [])] * 5, prompt_func, None, pad_token_id=PAD)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        get_reverse_golden_params(model, DATASET, prompt_func, None, batch_size=0)
    with pytest.warns(UserWarning, match="all 2 samples choose the mask"):
        get_reverse_golden_params(model, DATASET[:2], prompt_func, None, pad_token_id=PAD)
