from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_goldy.analysis import golden_parameters
from lightning_goldy.core.objective import ClassifierObjective
from lightning_goldy.core.space import ParameterSpace, Selection, SpaceError, block_list, trainable_parameters
from lightning_goldy.core.vector import ParameterVector
from tests.references.common import selected_reference
from tests.references.models import build


class Blocks(nn.Module):
    def __init__(self, count: int, width: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.head = nn.Linear(width, 3)


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return build("gpt2")


PATTERNS = ("*", "*.attn.*", "*mlp*", "transformer.wte.weight", "*.bias", "transformer.h.[01].ln_?.weight", "*.h.1.*")


@given(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), st.lists(st.sampled_from(PATTERNS[1:]), max_size=2))
@settings(max_examples=60, deadline=None)
def test_patterns_select_what_they_match_in_the_modules_order(include: list[str], exclude: list[str]) -> None:
    module = build("gpt2")
    expected = selected_reference(module, include, exclude)
    if not expected:
        with pytest.raises(SpaceError, match="select none of the"):
            ParameterSpace.of(module, include, exclude)
        return
    space = ParameterSpace.of(module, include, exclude)
    assert list(space.names) == list(space) == expected
    parameters = dict(module.named_parameters())
    assert [space.shape(name) for name in space] == [parameters[name].shape for name in expected]
    assert space.dtypes == (torch.float32,) * len(expected)
    assert space.numel == sum(parameters[name].numel() for name in expected)
    assert all(value is parameters[name] for name, value in space.resolve(module).items())


def test_tied_weights_are_there_once(gpt2: nn.Module) -> None:
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    space = ParameterSpace.of(gpt2)
    assert "transformer.wte.weight" in space
    assert "lm_head.weight" not in space
    assert space.numel == sum(parameter.numel() for parameter in set(gpt2.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    module = Blocks(2)
    module.layers[0].requires_grad_(False)
    module.head.bias.requires_grad = False
    assert ParameterSpace.of(module).names == ("embed.weight", "layers.1.weight", "layers.1.bias", "head.weight")
    with pytest.raises(SpaceError, match=r"pattern 'layers\.0\.\*' matches no trainable parameter"):
        ParameterSpace.of(module, include=["layers.0.*"])
    module.requires_grad_(False)
    with pytest.raises(SpaceError, match="Blocks has no trainable parameter: every requires_grad is False"):
        ParameterSpace.of(module)


def test_adapters_alone_when_they_alone_train() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    space = ParameterSpace.of(peft.get_peft_model(build("gpt2"), config))
    assert len(space) == 4
    assert all("lora_" in name for name in space)


@pytest.mark.parametrize(
    ("count", "last_layers", "kept"),
    [
        (30, 0.1, 3),
        (30, 0.7, 21),
        (25, 0.28, 7),  # 0.28 * 25 is more than 7 in floating point
        (10, 0.3, 3),
        (10, 0.31, 4),
        (10, 0.01, 1),
        (10, 1.0, 10),
        (10, 1, 1),
        (10, 10, 10),
        (11, 2, 2),
    ],
)
def test_last_layers(count: int, last_layers: float | int, kept: int) -> None:
    space = ParameterSpace.of(Blocks(count), last_layers=last_layers)
    expected = [f"layers.{i}.{part}" for i in range(count - kept, count) for part in ("weight", "bias")]
    assert list(space) == expected


def test_every_decimal_fraction_of_every_depth_is_exact() -> None:
    for count in (1, 7, 25, 30, 50):
        module = Blocks(count, width=1)
        for hundredth in (1, 7, 10, 14, 28, 29, 33, 56, 58, 70, 90, 100):
            expected = -(-hundredth * count // 100)
            assert len(ParameterSpace.of(module, last_layers=hundredth / 100)) == 2 * expected, (count, hundredth)


def test_last_layers_with_patterns(gpt2: nn.Module) -> None:
    space = ParameterSpace.of(gpt2, include=["*.mlp.*"], last_layers=1)
    assert space.names == tuple(
        f"transformer.h.1.mlp.{part}" for part in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
    )
    with pytest.raises(SpaceError, match=r"include=\['transformer.wte.weight'\].*last_layers=1 select none of the"):
        ParameterSpace.of(gpt2, include=["transformer.wte.weight"], last_layers=1)


@pytest.mark.parametrize("wrong", [0, -1, 31, 0.0, -0.5, 1.5, True, math.nan, "3"])
def test_last_layers_out_of_range_names_the_value_and_the_choices(wrong: object) -> None:
    with pytest.raises(SpaceError) as error:
        ParameterSpace.of(Blocks(30), last_layers=wrong)  # type: ignore[arg-type]
    assert f"got {wrong!r}" in str(error.value)
    assert "a fraction in (0, 1] or a number of blocks from 1 to 30" in str(error.value)


def test_last_layers_needs_blocks() -> None:
    with pytest.raises(SpaceError, match="Linear has no list of blocks, so last_layers cannot be resolved"):
        ParameterSpace.of(nn.Linear(2, 2), last_layers=1)
    root = nn.Sequential(nn.Linear(2, 2))
    for module in (root, torch.compile(root, backend="eager")):
        with pytest.raises(SpaceError, match="has no list of blocks"):
            ParameterSpace.of(module, last_layers=1)


def test_the_blocks_are_the_list_with_most_parameters() -> None:
    module = Blocks(4)
    module.layers[3] = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert block_list(module) == ("layers", 4)
    assert block_list(build("bert")) == ("bert.encoder.layer", 2)


def test_wrappers_do_not_change_names(gpt2: nn.Module) -> None:
    plain = ParameterSpace.of(gpt2)
    wrapped = build("gpt2")
    for index, block in enumerate(wrapped.transformer.h):
        wrapped.transformer.h[index] = checkpoint_wrapper(block)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    compiled = torch.compile(wrapped, backend="eager")
    wrapped.transformer.h[0] = torch.compile(wrapped.transformer.h[0], backend="eager")
    for module in (wrapped, compiled):
        space = ParameterSpace.of(module)
        assert space == plain
        assert ParameterSpace.of(module, last_layers=1) == ParameterSpace.of(gpt2, last_layers=1)
        parameters = set(map(id, module.parameters()))
        assert {id(parameter) for parameter in plain.resolve(module).values()} == parameters
        space.require_same(plain)


def test_flat_parameters_of_fsdp1_are_refused_by_name() -> None:
    module = nn.Module()
    module.register_parameter("_flat_param", nn.Parameter(torch.zeros(8)))
    outer = nn.Sequential()
    outer.add_module("_fsdp_wrapped_module", module)
    with pytest.raises(SpaceError, match=r"(?s)_fsdp_wrapped_module\._flat_param .*FSDP1.*FSDP2.*fully_shard"):
        ParameterSpace.of(outer)


def test_flattened_parameters_that_keep_their_names_are_refused() -> None:
    # What FSDP1 leaves with use_orig_params: the names and the class are as ever, the values are views of a shard.
    module = nn.Linear(2, 2)
    module.bias._fsdp_flattened = True
    with pytest.raises(SpaceError, match=r"^bias is part of a flat parameter.*FSDP1"):
        list(trainable_parameters(module))


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_is_not_a_list_of_letters(argument: str) -> None:
    with pytest.raises(
        SpaceError, match=rf"{argument} is a list of patterns; got the string 'weight', write \['weight'\]"
    ):
        ParameterSpace.of(nn.Linear(1, 1), **{argument: "weight"})


def test_a_pattern_that_matches_nothing_is_named_with_the_closest_choice(gpt2: nn.Module) -> None:
    with pytest.raises(SpaceError) as error:
        ParameterSpace.of(gpt2, include=["transformer.wte.weigth"])
    assert "pattern 'transformer.wte.weigth' matches no trainable parameter" in str(error.value)
    assert "did you mean 'transformer.wte.weight'? Valid: transformer.wte.weight, " in str(error.value)
    with pytest.raises(SpaceError, match=r"'lm_hed\.\*' matches no"):
        ParameterSpace.of(gpt2, exclude=["lm_hed.*"])


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(SpaceError, match="'WEIGHT'"):
        ParameterSpace.of(nn.Linear(1, 1), include=["WEIGHT"])


def test_index_and_shape_of_unknown_names() -> None:
    space = ParameterSpace.of(Blocks(1))
    assert [space.index(name) for name in space] == list(range(len(space)))
    with pytest.raises(SpaceError, match=r"no parameter 'head\.wieght' in this space; did you mean 'head\.weight'\?"):
        space.shape("head.wieght")


def test_resolve_names_what_is_missing_or_of_another_shape() -> None:
    space = ParameterSpace.of(Blocks(2))
    with pytest.raises(
        SpaceError, match=r"Blocks has no parameter 'layers\.1\.weight'; did you mean 'layers\.0\.weight'"
    ):
        space.resolve(Blocks(1))
    with pytest.raises(SpaceError, match=r"embed\.weight: shape \(3, 4\) in the module, \(3, 2\) in the space"):
        space.resolve(Blocks(2, width=4))


def test_resolve_says_what_became_of_adapters() -> None:
    name = "base_model.model.q_proj.lora_A.default.weight"
    space = ParameterSpace.of_tensors({name: torch.zeros(1, 2)})
    with pytest.raises(SpaceError, match=rf"Linear has no parameter '{name}' of an adapter: .*until trainer.fit ret"):
        space.resolve(nn.Linear(2, 1))


def test_resolve_also_finds_parameters_that_have_been_frozen_since() -> None:
    module = Blocks(1)
    space = ParameterSpace.of(module)
    module.requires_grad_(False)
    assert len(space.resolve(module)) == len(space)


def test_spaces_that_differ_name_the_first_difference() -> None:
    space = ParameterSpace.of(Blocks(2))
    space.require_same(ParameterSpace.of(Blocks(2)))
    with pytest.raises(SpaceError, match=r"'layers\.1\.weight' in one, 'head\.weight' in the other"):
        space.require_same(ParameterSpace.of(Blocks(1)))
    shorter = space.subspace(space.names[:-1])
    for one, other in ((space, shorter), (shorter, space)):
        with pytest.raises(SpaceError, match=r"only one of them has 'head\.bias'"):
            one.require_same(other)
    with pytest.raises(SpaceError, match=r"embed\.weight is \(3, 2\) and \(3, 4\)"):
        space.require_same(ParameterSpace.of(Blocks(2, width=4)))


def test_dtypes_may_differ() -> None:
    ParameterSpace.of(Blocks(1)).require_same(ParameterSpace.of(Blocks(1).bfloat16()))
    assert ParameterSpace.of(Blocks(1)) != ParameterSpace.of(Blocks(1).bfloat16())


def test_a_subspace_keeps_the_order_and_refuses_strangers() -> None:
    space = ParameterSpace.of(Blocks(2))
    part = space.subspace(["head.bias", "embed.weight"])
    assert part.names == ("embed.weight", "head.bias")
    assert part.shapes == (torch.Size([3, 2]), torch.Size([3]))
    assert part.numel == 9
    with pytest.raises(SpaceError, match="'nothing'"):
        space.subspace(["nothing"])


def test_a_space_is_a_frozen_value() -> None:
    space = ParameterSpace.of(Blocks(2))
    assert hash(space) == hash(ParameterSpace.of(Blocks(2)))
    assert space == ParameterSpace.of(Blocks(2))
    with pytest.raises(AttributeError):
        space.names = ()  # type: ignore[misc]


def test_a_parameter_without_elements_is_no_part_of_a_space() -> None:
    module = nn.Linear(3, 2)
    module.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    assert ParameterSpace.of(module).names == ("weight", "bias")
    assert ParameterVector.of(module).map(torch.abs).top_k(50.0).count() == [3, 1]
    found = golden_parameters(module, [(torch.ones(2, 3), torch.tensor([0, 1]))], ClassifierObjective())
    assert found.mask.space.names == ("weight", "bias")
    del module._parameters["weight"], module._parameters["bias"]
    with pytest.raises(SpaceError, match=r"Linear has no trainable parameter.*or all are empty"):
        ParameterSpace.of(module)


@pytest.mark.parametrize(
    "wrong", [{"include": "*mlp*"}, {"exclude": [3]}, {"last_layers": -1}, {"last_layers": True}, {"last_layers": 2.5}]
)
def test_a_selection_is_checked_before_there_is_a_model(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Selection(**wrong)
    assert Selection(last_layers=2).last_layers == 2
