"""Every analysis takes a base in every form, and finds the same with each."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from lightning_goldy.analysis import (
    activation_differences,
    attention_statistics,
    change_attribution,
    continue_prompts,
    explain_change,
    graft_curve,
    parameter_distribution,
    prune_heads,
    regrow_heads,
    taylor_diff,
    track_attention,
)
from lightning_goldy.analysis.activations import steer_texts
from lightning_goldy.analysis.attention import Prompt
from lightning_goldy.analysis.attribution import apply_change, baseline_mask, graft, learn_mask, save_change
from lightning_goldy.analysis.change import change_inside, weight_change
from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel, build_variant
from lightning_goldy.analysis.ripple import finetune_ripple
from lightning_goldy.core import ParameterSpace
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import canonical_name
from lightning_goldy.core.store import open_tensors
from lightning_goldy.core.vector import ParameterVector
from tests.core.test_base import SOURCES, write_vector
from tests.references.models import build
from tests.references.ripple import TEMPLATE, WORDS, facts

IDS = torch.tensor([[1, 2, 1, 3], [4, 5, 4, 2]])
BATCH = {"input_ids": IDS}

FORMS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "module": lambda base, folder: base,
    "base parameters": lambda base, folder: BaseParameters(ParameterVector.of(base)),
    "name of a file": lambda base, folder: str(write_vector(base, folder)),
    **{write.__name__: write for write in SOURCES},
}


def tracked(model: nn.Module, base: Any) -> str:
    prompt = Prompt.of("one", [1, 2, 3], model, None, 8)
    return track_attention(model, [BATCH], prompts=[prompt], base=base).to_json()


def logits(variant: nn.Module) -> list[Any]:
    with torch.no_grad():
        return variant(input_ids=IDS).logits.tolist()


SCORED: dict[str, Any] = {"nodes": 2, "shares": [0.5]}


def mask_of(model: nn.Module, share: float) -> ParameterMask:
    space, seeded = ParameterSpace.of(model), torch.Generator().manual_seed(0)
    return ParameterMask(space, {name: torch.rand(space.shape(name), generator=seeded) < share for name in space})


def grafted(model: nn.Module, base: Any) -> list[Any]:
    found = change_attribution(model, base, [BATCH], **SCORED)
    if not any(found.squared_changes):
        return []
    state = graft(model, base, found.mask(0.5))
    curve = graft_curve(model, base, found, [BATCH], [BATCH], baselines=["random", "interpolation"], factors=[0.5])
    masks = [learn_mask(model, base, found, [BATCH], share=0.5).mask, baseline_mask(model, base, found, "random", 0.5)]
    flags = [tensor.tolist() for mask in masks for tensor in mask.values()]
    return [curve.to_json(), flags, {canonical_name(name): value.tolist() for name, value in state.items()}]


def saved(model: nn.Module, base: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = save_change(Path(folder) / "change.safetensors", model, base, mask_of(model, 1.0))
        before = build("gpt2", seed=0).eval()
        apply_change(nn.DataParallel(before), path, check=isinstance(base, nn.Module))
        with open_tensors(path) as file:
            return [file.metadata(), [parameter.tolist() for parameter in before.parameters()]]


def regrown(model: nn.Module, base: Any) -> list[Any]:
    pruned = copy.deepcopy(model)
    prune_heads(pruned, [(0, 1)])
    regrow_heads(pruned, [(0, 1)], base=base)
    return [parameter.tolist() for parameter in pruned.parameters()]


def steered(model: nn.Module, base: Any) -> list[Any]:
    # Where nothing differs there is nothing to steer by, so that the differences are those of one pair of models.
    differences = activation_differences(build("gpt2", seed=1), build("gpt2", seed=0), [BATCH], positions=2)
    found = steer_texts(model, base, WORDS, [IDS[0]], differences, max_new_tokens=4)
    return [found.texts, found.cost]


def rippled(model: nn.Module, base: Any) -> list[Any]:
    found = finetune_ripple(model, base, facts()[:2], tokenizer=WORDS, template=TEMPLATE)
    return [found.predicted.tolist(), found.measured.tolist(), found.before.tolist()]


USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "attention_statistics": lambda model, base: attention_statistics(model, [BATCH], base=base).to_json(),
    "track_attention": tracked,
    "explain_change": lambda model, base: explain_change(model, base, [BATCH]).to_json(),
    "taylor_diff": lambda model, base: taylor_diff(model, base, [BATCH]).to_json(),
    "parameter_distribution": lambda model, base: parameter_distribution(model, base).to_json(),
    "change_attribution": lambda model, base: change_attribution(model, base, [BATCH], **SCORED).to_json(),
    "grafts": grafted,
    "save_change": saved,
    "finetune_ripple": rippled,
    "continue_prompts": lambda model, base: vars(continue_prompts(model, WORDS, [IDS[0]], base=base, max_new_tokens=4)),
    "regrow_heads": regrown,
    "steer_texts": steered,
    "activation_differences": lambda model, base: activation_differences(model, base, [BATCH], positions=2).to_json(),
    "weight_change": lambda model, base: weight_change(model, base).to_json(),
    "change_inside": lambda model, base: change_inside(
        model, base, mask_of(model, 1.0).map(lambda flags: flags.cumsum(0) > 1)
    ),
    "FrozenAttention": lambda model, base: logits(FrozenAttention(model, base)),
    "LinearizedMLP": lambda model, base: logits(LinearizedMLP(model, base)),
    "TangentModel": lambda model, base: logits(TangentModel(model, base)),
    "build_variant": lambda model, base: logits(build_variant("linear_mlp", model, base)),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_may_have_any_form(use: str, tmp_path: Path) -> None:
    base, model = build("gpt2", seed=0).eval(), build("gpt2", seed=1).eval()
    expected = USES[use](model, ParameterVector.of(base))
    assert expected != USES[use](model, ParameterVector.of(model))
    for form, make in FORMS.items():
        (tmp_path / form).mkdir()
        assert USES[use](model, make(base, tmp_path / form)) == expected, form


@pytest.mark.parametrize("use", USES)
def test_what_is_no_base_is_refused(use: str) -> None:
    with pytest.raises(TypeError, match=r"a base is a module, .*; got float"):
        USES[use](build("gpt2", seed=1), 0.5)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "compiled inside": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "compiled outside": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),  # type: ignore[return-value]
    "Fabric": lambda model: Fabric(accelerator="cpu", devices=1).setup(model),
}


@pytest.mark.parametrize(
    ("use", "wrapper"),
    [
        *((use, "DistributedDataParallel") for use in USES),
        *(("change_attribution", wrapper) for wrapper in WRAPPERS if wrapper != "DistributedDataParallel"),
    ],
)
def test_a_wrapper_changes_neither_base_nor_model(use: str, wrapper: str, alone: None) -> None:
    base, model = build("gpt2", seed=0).eval(), build("gpt2", seed=1).eval()
    expected = USES[use](model, base)
    wrap = WRAPPERS[wrapper]
    assert USES[use](model, wrap(copy.deepcopy(base))) == expected
    assert USES[use](wrap(copy.deepcopy(model)), base) == expected
    vector = ParameterVector.of(wrap(copy.deepcopy(base)))
    assert vector.space.names == ParameterSpace.of(base).names
