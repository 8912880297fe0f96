"""Tests that a compacted model computes what the gated one does, and that plain transformers loads what it saves."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_goldy.analysis.heads import compact, compaction_of, register_compaction
from lightning_goldy.analysis.heads.compaction import COMPACTIONS
from lightning_goldy.core.architecture import (
    HeadGates,
    UnsupportedArchitectureError,
    available_architectures,
    describe_architecture,
)
from lightning_goldy.training.models import write_pretrained
from tests.references.architecture_models import REGISTERED, VOCABULARY, lora
from tests.references.architecture_models import build as built

UNEVEN = [(0, 0), (0, 1), (1, 2)]
WHOLE_GROUPS = [(0, 0), (0, 1), (1, 2), (1, 3)]
ALTERNATE = [(0, 0), (0, 3), (1, 1), (1, 2)]
SELECTIONS = {"uneven": UNEVEN, "groups": WHOLE_GROUPS, "alternate": ALTERNATE, "none": []}
# These build the same shapes from a configuration that has a head_dim.
CAN_SHRINK = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "phi")
CLASSES = {"bert": hf.BertForSequenceClassification, "roberta": hf.RobertaForSequenceClassification}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return built(family)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def gated(family: str, heads: list[tuple[int, int]]) -> Any:
    model = build(family)
    HeadGates(model).disable(heads)
    return model


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", REGISTERED)
def test_the_compacted_model_equals_the_gated_one(family: str, selection: str) -> None:
    model = gated(family, SELECTIONS[selection])
    state, before = copy.deepcopy(model.state_dict()), outputs(model)
    smaller = compact(model)
    torch.testing.assert_close(outputs(smaller), before, rtol=0, atol=2e-5)
    assert type(smaller) is type(model)
    assert HeadGates.of(smaller) is None
    # What was given is as it was.
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model), before)
    assert HeadGates.of(model).closed == tuple(SELECTIONS[selection])
    record = compaction_of(smaller)
    assert record.closed == tuple(SELECTIONS[selection])
    blocks = describe_architecture(smaller).blocks
    assert record.heads_after == tuple(block.n_heads for block in blocks)
    assert sum(record.heads_before) - sum(record.heads_after) == len(record.removed)


@pytest.mark.parametrize(
    ("family", "heads", "after", "groups"),
    [
        ("gpt2", UNEVEN, (2, 3), (2, 3)),
        ("llama", WHOLE_GROUPS, (2, 2), (1, 1)),
        ("llama", UNEVEN, (2, 4), (1, 2)),  # half a group stays beside a whole one
        ("llama", ALTERNATE, (2, 2), (2, 2)),  # one head of each group goes
        ("gemma", [(0, 0), (0, 2), (1, 3)], (2, 3), (1, 1)),  # one group for all
        ("gpt_neox", UNEVEN, (2, 3), (2, 3)),
        ("bert", [(0, 0), (0, 1), (0, 2), (0, 3)], (1, 4), (1, 4)),  # a layer cannot be empty
    ],
)
def test_what_is_cut(family: str, heads: list, after: tuple, groups: tuple) -> None:
    model = gated(family, heads)
    smaller = compact(model)
    blocks = describe_architecture(smaller).blocks
    assert tuple(block.n_heads for block in blocks) == after
    assert tuple(block.n_key_value_heads for block in blocks) == groups
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(outputs(smaller), outputs(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", REGISTERED)
def test_plain_transformers_loads_what_is_saved(family: str, selection: str, tmp_path: Path) -> None:
    model = gated(family, SELECTIONS[selection])
    smaller = compact(model)
    smaller.save_pretrained(tmp_path / "model")
    loader = CLASSES.get(family, hf.AutoModelForCausalLM)
    plain = loader.from_pretrained(tmp_path / "model").eval()
    record = compaction_of(smaller)
    assert record.smaller == (
        selection == "none"
        or (family in CAN_SHRINK and selection in ("groups", "alternate"))
        or (family == "gemma" and selection in ("groups", "alternate"))
    )
    if record.smaller:
        assert torch.equal(outputs(plain), outputs(smaller))
        assert {k: v.shape for k, v in plain.state_dict().items()} == {
            k: v.shape for k, v in smaller.state_dict().items()
        }
    else:
        # Zeros where a gate multiplied by zero: the same sums.
        assert torch.equal(outputs(plain), outputs(model))
        assert {k: v.shape for k, v in plain.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "phi3", "opt"])
def test_generation_with_a_cache(family: str) -> None:
    model = gated(family, UNEVEN)
    smaller = compact(model)
    left = {key: value.flip(1) for key, value in batch().items()}
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = smaller.generate(**left, **options), model.generate(**left, **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_compacted_model_trains_changes_its_kernel_and_is_cut_again(family: str) -> None:
    smaller = compact(gated(family, UNEVEN))
    before = outputs(smaller)
    smaller.set_attn_implementation("eager")
    torch.testing.assert_close(outputs(smaller), before, rtol=0, atol=2e-5)
    other = copy.deepcopy(smaller)
    torch.testing.assert_close(outputs(other), before, rtol=0, atol=2e-5)
    assert compaction_of(other) is not compaction_of(smaller)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(**batch()).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    optimizer.step()
    assert not torch.allclose(outputs(other), before)
    assert torch.equal(outputs(smaller), outputs(smaller))
    HeadGates(other).disable([(1, 0)])
    torch.testing.assert_close(outputs(compact(other)), outputs(other), rtol=0, atol=2e-5)


def test_trainable_gates_are_multiplied_in() -> None:
    model = build("llama")
    gates = HeadGates(model, kind="parameter")
    with torch.no_grad():
        gates.values.uniform_(0.5, 1.5)
    gates.disable(UNEVEN)
    torch.testing.assert_close(outputs(compact(model)), outputs(model), rtol=0, atol=2e-5)


def test_low_precision() -> None:
    model = build("llama").bfloat16()
    HeadGates(model).disable(WHOLE_GROUPS)
    smaller = compact(model)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(smaller), outputs(model), rtol=0.05, atol=0.05)


def test_gradients_of_the_model_are_kept() -> None:
    model = gated("gpt2", UNEVEN)
    model(**batch()).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    smaller = compact(model)
    assert all(a.grad is b for a, b in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.grad is None for parameter in smaller.parameters())


def test_the_card_says_which_heads_went(tmp_path: Path) -> None:
    smaller = compact(gated("llama", UNEVEN))
    smaller.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card == compaction_of(smaller).card()
    assert "3 of 8 attention heads were closed, and 2 of them cut out" in card
    assert "| 0 | 4 | 2 | 0, 1 | none |" in card
    assert "| 1 | 4 | 4 | none | 2 |" in card
    assert "full shape" in card
    assert "smaller shape" in compaction_of(compact(gated("llama", WHOLE_GROUPS))).card()


def test_saving_through_the_exporter_and_with_a_state(tmp_path: Path) -> None:
    model = gated("gpt2", UNEVEN)
    smaller = compact(model)
    state = {key: value.clone() for key, value in smaller.state_dict().items()}
    write_pretrained(smaller, tmp_path / "exported", state=state)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert torch.equal(outputs(plain), outputs(model))
    assert (tmp_path / "exported" / "README.md").exists()
    smaller.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="push the folder"):
        smaller.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = compact(gated("gpt2", UNEVEN))

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_goldy.analysis.heads.compaction.atomic_write", fail)
    with pytest.raises(OSError, match="disk full"):
        smaller.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_compacted() -> None:
    with pytest.raises(ValueError, match="no gates"):
        compact(build("gpt2"))
    adapted = lora("llama", ["q_proj", "o_proj"])
    HeadGates(adapted)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        compact(adapted)
    bloom = build("bloom")
    HeadGates(bloom)
    with pytest.raises(UnsupportedArchitectureError, match=r"BloomForCausalLM \('bloom'\).*gpt2.*@register_compaction"):
        compact(bloom)
    with pytest.raises(ValueError, match="was not made by compact"):
        compaction_of(bloom)
    with pytest.raises(ValueError, match="registered already"):
        register_compaction("gpt2")(lambda block, heads, groups: None)
    packed = gated("llama", UNEVEN)
    projection = packed.model.layers[0].self_attn.o_proj
    HeadGates.of(packed).remove()
    projection.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    HeadGates(packed)
    with pytest.raises(UnsupportedArchitectureError, match=re.escape("packed")):
        compact(packed)


def test_every_registered_family_can_be_compacted() -> None:
    assert set(REGISTERED) <= set(COMPACTIONS)
    assert set(COMPACTIONS) <= set(available_architectures())


def test_a_container_is_compacted_in_memory(tmp_path: Path) -> None:
    holder = nn.Module()
    holder.model = gated("gpt2", UNEVEN)
    smaller = compact(holder)
    torch.testing.assert_close(outputs(smaller.model), outputs(holder.model), rtol=0, atol=2e-5)
    with pytest.raises(TypeError, match="compact the transformers model inside"):
        smaller.save_pretrained(tmp_path)
