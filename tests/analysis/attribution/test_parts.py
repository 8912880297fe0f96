"""What parts of a change do: blocks alone and without the others, and what masks hold of the contributions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import CodeGenConfig, CodeGenForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_goldy.analysis import ChangeAttributionResult, change_attribution, mask_links
from lightning_goldy.core import CausalLMObjective, FunctionObjective, ParameterSpace, ParameterVector
from lightning_goldy.core.architecture import describe_architecture
from lightning_goldy.core.files import percentage
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import block_of
from lightning_goldy.core.space import SpaceError
from lightning_goldy.report.topics.attribution import heads_caption
from tests.references import architecture_models
from tests.references.attribution import moved, units_of
from tests.references.models import build, class_batch, token_batch


class Coupled(nn.Module):
    """Two blocks of three weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)])

    def flat(self) -> torch.Tensor:
        return torch.cat([block.weight.flatten() for block in self.h])


def subjects() -> tuple[Coupled, Coupled, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    base, model = Coupled().double(), Coupled().double()
    curvature = torch.randn(6, 6, dtype=torch.float64)
    return model, base, curvature @ curvature.T, torch.randn(6, dtype=torch.float64)


def test_blocks_of_a_quadratic_interact_by_the_curvature_between_them():
    model, base, curvature, slope = subjects()

    def value(module, batch):
        return slope @ module.flat() + 0.5 * module.flat() @ curvature @ module.flat()

    found = change_attribution(model, base, [torch.zeros(4, 1)], FunctionObjective(value), interactions=True)
    start, change = base.flat().detach(), (model.flat() - base.flat()).detach()
    for place, row in enumerate(found.interactions):
        own, other = slice(3 * place, 3 * place + 3), slice(3 - 3 * place, 6 - 3 * place)
        gradient = slope + curvature @ start
        alone = gradient[own] @ change[own] + 0.5 * change[own] @ curvature[own, own] @ change[own]
        between = change[own] @ curvature[own, other] @ change[other]
        assert row["block"] == f"h.{place}"
        assert row["alone"] == pytest.approx(float(alone), rel=1e-9)
        assert row["removed"] == pytest.approx(float(alone + between), rel=1e-9)
        assert row["contribution"] == pytest.approx(float(alone + between / 2), rel=1e-9)
    assert found.interaction == pytest.approx(float(between) / found.change, rel=1e-9)
    assert found.cost.forwards == (2 + 4 + 2 * 2) * 4
    assert found.metrics()["interaction"] == found.interaction
    assert f"alone, blocks make {percentage(1 - found.interaction)} of it" in found.headline()


def test_blocks_of_a_linear_model_are_additive():
    model, base, _, slope = subjects()
    linear = FunctionObjective(lambda module, batch: slope @ module.flat())
    found = change_attribution(model, base, [torch.zeros(1, 1)], linear, interactions=True)
    assert found.interaction == pytest.approx(0.0, abs=1e-12)
    for row in found.interactions:
        assert row["alone"] == pytest.approx(row["contribution"], rel=1e-9)
        assert row["removed"] == pytest.approx(row["contribution"], rel=1e-9)


def test_effects_of_blocks_are_those_of_models_made_by_hand():
    base = build("llama", 0).double().eval()
    model = moved(base, build("llama", 1).double(), 0.3).eval()
    batch = token_batch(6)
    found = change_attribution(model, base, [batch], nodes=2, interactions=True)
    before, now = dict(base.named_parameters()), dict(model.named_parameters())

    def loss(changed):
        made = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(now[name] if changed(name) else before[name])
            return float(CausalLMObjective().loss(made, batch))

    row = next(row for row in found.interactions if row["block"] == "model.layers.1")
    alone = loss(lambda name: block_of(name) == "model.layers.1") - found.base_value
    removed = found.value - loss(lambda name: block_of(name) != "model.layers.1")
    assert (row["alone"], row["removed"]) == pytest.approx((alone, removed), rel=1e-9)
    assert row["alone_low"] <= row["alone"] <= row["alone_high"]
    again = ChangeAttributionResult.from_json(found.to_json())
    assert again.interactions[0]["alone"] == found.interactions[0]["alone"]
    plain = change_attribution(model, base, [batch], nodes=2)
    assert plain.interactions == ()
    assert "interaction" not in plain.metrics()


def test_links_with_masks_are_counted_by_hand_and_their_null_is_that_of_random_masks():
    base = build("gpt2", 0).double().eval()
    model = moved(base, build("gpt2", 1).double(), 0.3).eval()
    space = ParameterSpace.of(model, ["transformer.h.0.mlp*"])
    counts = {name: max(1, math.prod(shape) // 5) for name, shape in zip(space.names, space.shapes, strict=True)}
    golden = ParameterMask.random(space, counts, seed=3)
    part = ParameterMask.random(space.subspace(["transformer.h.0.mlp.c_fc.weight"]), 10.0, seed=1)
    options = {"nodes": 3, "space": space, "keep_scores": True, "masks": {"golden": golden, "part": part}}
    found = change_attribution(model, base, [token_batch(6)], **options)
    scores, link = found.scores, found.links[0]
    inside = sum(float(scores[name][golden[name]].sum()) for name in space)
    assert link["attribution"] == pytest.approx(inside / found.total, rel=1e-9)
    assert link["elements"] == pytest.approx(golden.density)
    flat = torch.cat([scores[name].flatten() for name in space]) * math.copysign(1, found.change)
    flags = torch.cat([golden[name].flatten() for name in space])
    strong = torch.zeros_like(flags)
    strong[flat.argsort(descending=True)[: golden.total]] = True
    assert link["jaccard"] == pytest.approx(float((strong & flags).sum() / (strong | flags).sum()))

    drawn, overlaps = [], []
    for _ in range(300):
        sizes = zip(space.shapes, counts.values(), strict=True)
        other = torch.cat([torch.randperm(math.prod(shape)) < count for shape, count in sizes])
        drawn.append(float(flat[other].sum()) / abs(found.total))
        overlaps.append(float((strong & other).sum() / (strong | other).sum()))
    values = torch.tensor(drawn)
    assert link["null"] == pytest.approx(float(values.mean()), abs=4 * float(values.std()) / 300**0.5)
    assert (link["null_high"] - link["null_low"]) / (2 * 1.96) == pytest.approx(float(values.std()), rel=0.15)
    assert link["jaccard_null"] == pytest.approx(sum(overlaps) / 300, rel=0.02)

    elsewhere = float(scores["transformer.h.0.mlp.c_fc.weight"][part["transformer.h.0.mlp.c_fc.weight"]].sum())
    assert found.links[1]["attribution"] == pytest.approx(elsewhere / found.total, rel=1e-9)
    assert found.metrics()["inside/golden"] == link["attribution"]
    assert found.metrics()["inside_null/golden"] == link["null"]
    assert mask_links(scores, {"golden": golden}, change=found.change)[0]["jaccard"] == link["jaccard"]


def test_a_mask_of_another_model_is_refused():
    space = ParameterSpace.of(nn.Linear(2, 2))
    scores = ParameterVector(space, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    other = ParameterMask.random(ParameterSpace.of(nn.Embedding(3, 2).requires_grad_(True)), 50.0)
    nothing = ParameterMask(space, {"weight": torch.zeros(2, 2).bool(), "bias": torch.zeros(2).bool()})
    (link,) = mask_links(scores, {"empty": nothing}, change=1.0)
    assert (link["elements"], link["attribution"], link["jaccard"]) == (0.0, 0.0, 1.0)
    wrong = ParameterMask.random(ParameterSpace.of(nn.Sequential(nn.Linear(2, 2))), 50.0)
    with pytest.raises(SpaceError, match=r"no parameter '0\.weight' in this space"):
        mask_links(scores, {"wrong": wrong}, change=1.0)
    assert other.total == 3


@pytest.mark.parametrize("family", architecture_models.FUSED)
def test_heads_of_a_fused_projection_have_their_queries_keys_and_values(family):
    base = architecture_models.build(family).double()
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = architecture_models.token_ids()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = change_attribution(model, base, [batch], nodes=2, keep_scores=True)
    block = describe_architecture(base).blocks[1]
    fused, output = block.module.get_submodule(architecture_models.FUSED[family][1]), block.attention_output
    turned = isinstance(fused, Conv1D)
    name = f"{block.name}.{architecture_models.FUSED[family][1]}"
    rows = found.scores[f"{name}.weight"].sum(0 if turned else 1)
    if f"{name}.bias" in found.scores.space:
        rows = rows + found.scores[f"{name}.bias"]
    columns = found.scores[f"{block.attention_output_name}.weight"].sum(int(isinstance(output, Conv1D)))
    heads = columns.unflatten(0, (block.n_heads, -1)).sum(1).double()
    groups = torch.zeros(block.n_heads, dtype=torch.float64)
    owners = architecture_models.owners_of_rows(base, fused, output, block.n_heads)
    for value, (part, head) in zip(rows, owners, strict=True):
        (heads if part == "query" else groups)[head] += value
    firsts = sorted({head for part, head in owners if part != "query"})
    torch.testing.assert_close(units_of(found, "head")[block.name], heads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(units_of(found, "key_value")[block.name], groups[firsts], rtol=1e-9, atol=1e-12)
    assert not any(unit["place"].startswith(name) for unit in found.units if unit["kind"] == "rest")


def test_the_map_of_heads_names_what_could_not_be_divided_among_them():
    sizes = {"vocab_size": 67, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
    torch.manual_seed(2)
    one, other = (CodeGenForCausalLM(CodeGenConfig(**sizes, bos_token_id=1, eos_token_id=1)).eval() for _ in range(2))
    for base, model, told in (
        (one, moved(one, other, 0.3).eval(), True),
        *((build(family, 0), build(family, 1), False) for family in ("gpt2", "gpt_neox", "bert")),
    ):
        batch = class_batch(6) if base.config.model_type == "bert" else token_batch(6)
        row = {"result": change_attribution(model.eval(), base.eval(), [batch], nodes=2).details(), "metrics": {}}
        words = "How heads divide transformer.h.0.attn.qkv_proj.weight and 1 more is not described"
        assert (words in heads_caption(row)) is told
        assert ("is not described" in heads_caption(row)) is told
