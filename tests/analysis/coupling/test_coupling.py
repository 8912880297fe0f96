"""Coupling against a loop of one forward and one backward pass per piece."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lightning_goldy.analysis import CouplingError, CouplingResult, knowledge_coupling
from lightning_goldy.analysis.coupling import coupling as coupling_run
from lightning_goldy.analysis.coupling.passes import Capture
from lightning_goldy.core import ClassifierObjective, FunctionObjective, ParameterSpace, store
from lightning_goldy.core.space import SpaceError
from tests.references.common import paired
from tests.references.coupling import centered, cosines, gradients, log_prob, rows_of
from tests.references.coupling_models import TinyLM, pieces
from tests.references.models import CAUSAL, build, class_batch

LENGTHS = [7, 12, 5, 9, 12]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
SELECTIONS = {
    "mlp_output": "mlp_output",
    "attention_output": "attention_output",
    "all layers of one block": ["*.1.*proj*", "*.1.*dense*"],
    "everything": ["*"],
}


def compared(model, result, batch):
    flat = gradients(model, rows_of(batch), result.parameters)
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    assert result.matrix.dtype == next(model.parameters()).dtype
    torch.testing.assert_close(result.matrix.double(), cosines(flat), **tolerance)
    torch.testing.assert_close(result.norms, flat.norm(dim=1), **tolerance)


# Against the loop


@paired(
    {
        "select": {name: name for name in SELECTIONS},
        "family": {name: name for name in CAUSAL},
        "dtype": {str(dtype): dtype for dtype in (torch.float32, torch.float64)},
    }
)
def test_every_family_equals_the_loop(family, select, dtype):
    model, batch = build(family).to(dtype), pieces(LENGTHS)
    chosen = SELECTIONS[select]
    if select == "all layers of one block":
        chosen = chosen[1:] if family == "gpt_neox" else chosen[:1]
    result = knowledge_coupling(model, [batch], select=chosen)
    compared(model, result, batch)
    off_diagonal = result.matrix[~torch.eye(len(LENGTHS), dtype=torch.bool)]
    assert off_diagonal.abs().max() > 0.05  # there is something to be wrong about
    assert torch.equal(result.matrix, result.matrix.T)
    assert result.matrix.diagonal().eq(1).all()
    assert (result.measure, result.failed, result.projection) == ("gradient", (), None)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_default_is_every_mlp_output_projection(family):
    result = knowledge_coupling(build(family), [pieces([4, 5])])
    ends = {"gpt2": "mlp.c_proj.weight", "gpt_neox": "mlp.dense_4h_to_h.weight"}
    assert len(result.parameters) == result.n_layers == 2
    assert all(name.endswith(ends.get(family, "mlp.down_proj.weight")) for name in result.parameters)


def test_log_probabilities_are_means_over_all_answer_tokens():
    model, batch = build("gpt2"), pieces(LENGTHS)
    result = knowledge_coupling(model, [batch])
    expected = [float(log_prob(model.eval(), *row).detach()) for row in rows_of(batch)]
    assert result.log_probs.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", CAUSAL)
def test_chunks_order_and_padding_change_rounding_alone(family, dtype):
    model, tolerance = build(family).to(dtype), TOLERANCE[dtype]
    expected = knowledge_coupling(model, [pieces(LENGTHS)], chunk_size=1).matrix
    for chunk_size, side, width in itertools.product((2, 3, "auto"), ("left", "right"), (None, 15)):
        batch = pieces(LENGTHS, side=side, width=width)
        found = knowledge_coupling(model, [batch], chunk_size=chunk_size).matrix
        torch.testing.assert_close(found, expected, **tolerance)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {name: tensor[order] for name, tensor in pieces(LENGTHS).items()}
    parts = [{name: tensor[rows] for name, tensor in shuffled.items()} for rows in (slice(2), slice(2, None))]
    found = knowledge_coupling(model, parts)
    torch.testing.assert_close(found.matrix, expected[order][:, order], **tolerance)


def test_a_batch_without_mask_and_labels_counts_every_next_token():
    model, ids = build("gpt2"), pieces([6, 6])["input_ids"]
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert torch.equal(knowledge_coupling(model, [{"input_ids": ids}]).matrix, knowledge_coupling(model, [full]).matrix)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_mean_gradient_is_subtracted_exactly(normalize):
    model, batch = build("gpt2").double(), pieces(LENGTHS)
    result = knowledge_coupling(model, [batch], center=True, normalize=normalize)
    flat = centered(gradients(model, rows_of(batch), result.parameters))
    expected = cosines(flat) if normalize else flat @ flat.T
    torch.testing.assert_close(result.matrix, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.norms, flat.norm(dim=1))
    torch.testing.assert_close(result.cosines, cosines(flat))


def test_inner_products_are_those_of_the_gradients():
    model, batch = build("llama"), pieces(LENGTHS)
    result = knowledge_coupling(model, [batch], normalize=False)
    before = result.matrix.clone()
    flat = gradients(model, rows_of(batch), result.parameters)
    torch.testing.assert_close(result.matrix.double(), flat @ flat.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.cosines.double(), cosines(flat), rtol=1e-5, atol=1e-6)
    assert torch.equal(result.matrix, before)


# What is selected


def test_layers_are_half_open_or_counted_from_the_end():
    model, batch = build("gpt2"), [pieces([4, 6])]
    names = [
        knowledge_coupling(model, batch, layers=layers).parameters for layers in ((0, 1), (1, 2), "last:1", (-1, 2))
    ]
    assert names[0] == ("transformer.h.0.mlp.c_proj.weight",)
    assert names[1] == names[2] == names[3] == ("transformer.h.1.mlp.c_proj.weight",)
    both = knowledge_coupling(model, batch, layers=(0, 2))
    assert both.layers == ("transformer.h.0", "transformer.h.1")
    patterns = knowledge_coupling(model, batch, select=["*attn*weight"], layers="last:1").parameters
    assert patterns == ("transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight")
    first = knowledge_coupling(model, batch, layers=(0, 1))
    compared(model, first, batch[0])


def test_a_space_and_frozen_parameters_serve():
    model, batch = build("llama"), pieces(LENGTHS)
    space = ParameterSpace.of(model, include=["*q_proj*", "*norm*"])
    model.requires_grad_(False)
    result = knowledge_coupling(model, [batch], select=space)
    assert result.parameters == space.names
    compared(model, result, batch)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("select", [["*lora_*"], "mlp_output", ["*lora_B*", "*lm_head*"]])
def test_adapters_and_the_weights_that_they_adapt(select):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["down_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = pieces(LENGTHS)
    result = knowledge_coupling(model, [batch], select=select)
    assert len(result.parameters) == (2 if select == "mlp_output" else 8 if select == ["*lora_*"] else 5)
    compared(model, result, batch)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": "mlp_outputs"}, ValueError, "unknown select 'mlp_outputs'; did you mean 'mlp_output'"),
        ({"select": []}, ValueError, "at least one pattern"),
        ({"select": ["*nothing*"]}, SpaceError, "pattern '.nothing.' matches no parameter"),
        ({"select": ["transformer.wte*"], "layers": "last:1"}, SpaceError, "no parameter in layers 1 to 1"),
        ({"layers": "first:2"}, ValueError, "layers is None"),
        ({"layers": (0, 1, 2)}, ValueError, "layers is None"),
        ({"layers": "last:3"}, ValueError, "none of the 2 layers"),
        ({"layers": (2, 4)}, ValueError, "none of the 2 layers"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 'auto'"),
        ({"chunk_size": "all"}, ValueError, "chunk_size is 'auto'"),
        ({"projection": 1}, ValueError, "projection must be at least 2"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be at least 1"),
        ({"on_error": "skip"}, ValueError, "unknown on_error 'skip'"),
        ({"memory_limit": 100}, CouplingError, "pass workspace="),
    ],
)
def test_arguments_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        knowledge_coupling(build("gpt2"), [pieces([4, 5])], **options)


# Odd models


@pytest.mark.parametrize("chunk_size", ["auto", 2])
@pytest.mark.parametrize(
    "odd",
    ["plain", "functional", "partly", "twice", "flat", "sequence first", "tied", "idle", "in place", "checkpoint"],
)
def test_weights_that_are_used_in_other_ways(odd, chunk_size):
    torch.manual_seed(0)
    model = TinyLM(odd).double()
    batch = pieces([5, 5, 7, 5, 4])  # as many pieces as tokens: a swapped batch would go unnoticed
    for select in (["layer.*"], ["first.*", "layer.*", "other.*"], ["*"]):
        if odd == "idle" and select == ["layer.*"]:
            with pytest.raises(CouplingError, match=r"piece 2, id '2': its gradient .* is zero"):
                knowledge_coupling(model, [batch], select=select, chunk_size=chunk_size)
        else:
            compared(model, knowledge_coupling(model, [batch], select=select, chunk_size=chunk_size), batch)


def test_a_layer_whose_input_is_written_over_is_refused():
    with pytest.raises(CouplingError, match=r"writes over the input of the layer of layer\.weight"):
        knowledge_coupling(TinyLM("overwritten"), [pieces([5, 4])], select=["layer.weight"])


def test_passes_are_as_large_as_the_memory_for_activations(monkeypatch):
    model, batch, sizes = build("gpt2"), pieces(LENGTHS), []
    original = Capture.run

    def counted(self, given, count, **options):
        sizes.append(count)
        return original(self, given, count, **options)

    monkeypatch.setattr(Capture, "run", counted)
    expected = knowledge_coupling(model, [batch]).matrix
    assert sizes == [1, 5]  # the probe, and all
    for limit, wanted in ((1, [1] * 6), (60_000, None)):
        sizes.clear()
        monkeypatch.setattr(coupling_run, "_CPU_ACTIVATIONS", limit)
        found = knowledge_coupling(model, [batch]).matrix
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert sizes == wanted if wanted else 1 < max(sizes) < 5


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_pass_that_runs_out_of_memory_is_made_in_halves(monkeypatch, room):
    model, batch = build("gpt2"), pieces(LENGTHS)
    expected = knowledge_coupling(model, [batch]).matrix
    original = Capture.run

    def cramped(self, given, count, **options):
        if count > room:
            raise torch.OutOfMemoryError("no room")
        return original(self, given, count, **options)

    monkeypatch.setattr(Capture, "run", cramped)
    found = knowledge_coupling(model, [batch]).matrix
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        knowledge_coupling(model, [batch], chunk_size=4, on_error="nan")


def test_the_memory_that_there_is(monkeypatch):
    assert store.available_memory() > 0
    monkeypatch.setattr(store, "Path", lambda path: Path("/nowhere"))
    assert store.available_memory() == 8 << 30


def test_a_classifier_and_any_function():
    model, batch = build("bert"), class_batch()
    result = knowledge_coupling(model, [batch], objective=ClassifierObjective())
    loss = FunctionObjective(ClassifierObjective().loss)
    by_function = knowledge_coupling(model, [batch], objective=loss)
    parameters = dict(model.eval().named_parameters())
    flat = []
    for sample in ClassifierObjective().samples(batch):
        found = torch.autograd.grad(
            -ClassifierObjective().loss(model, sample), [parameters[name] for name in result.parameters]
        )
        flat.append(torch.cat([each.double().flatten() for each in found]))
    for each in (result, by_function):
        torch.testing.assert_close(each.matrix.double(), cosines(torch.stack(flat)), rtol=1e-5, atol=1e-6)


def test_autocast_and_low_precision_stay_near_the_loop():
    model, batch = build("llama"), pieces(LENGTHS)
    exact = knowledge_coupling(model, [batch], select=["*proj*", "*norm*"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = knowledge_coupling(model, [batch], select=["*proj*", "*norm*"])
        again = knowledge_coupling(model, [batch], select=["*proj*", "*norm*"])
    assert torch.equal(found.matrix, again.matrix)
    torch.testing.assert_close(found.matrix, exact.matrix, rtol=0.0, atol=0.03)
    low = knowledge_coupling(build("llama").bfloat16(), [batch], select=["*proj*"])
    assert low.matrix.dtype == torch.float32
    same = knowledge_coupling(model, [batch], select=["*proj*"])
    torch.testing.assert_close(low.matrix, same.matrix, rtol=0.0, atol=0.05)


def test_a_compiled_model_is_read_through():
    model, batch = build("gpt2"), [pieces(LENGTHS)]
    expected = knowledge_coupling(model, batch)
    found = knowledge_coupling(torch.compile(model, backend="eager"), batch)
    assert torch.equal(found.matrix, expected.matrix)
    assert found.parameters == expected.parameters


# What is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails):
    model, batch = build("gpt2"), pieces(LENGTHS)
    frozen = model.transformer.h[0].mlp.c_proj.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    if fails:
        batch["input_ids"][0, 0] = 10_000
        with pytest.raises(CouplingError, match="piece 0"):
            knowledge_coupling(model, [batch], select=["*"])
    else:
        knowledge_coupling(model, [batch], select=["*"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert parameter.requires_grad is (parameter is not frozen)
        assert not parameter._post_accumulate_grad_hooks


def test_a_result_goes_to_json_and_back():
    batch = pieces(LENGTHS)
    batch["labels"][1] = -100
    result = knowledge_coupling(build("gpt2"), [batch], on_error="nan")
    back = CouplingResult.from_json(result.to_json())
    torch.testing.assert_close(back.matrix, result.matrix, rtol=0, atol=0, equal_nan=True)
    assert back.pieces == result.pieces
    assert back.failed == result.failed
    assert back.parameters == result.parameters
    assert len(back) == len(LENGTHS)
    with pytest.raises(ValueError, match="unknown column 'hops'; did you mean 'hop'"):
        back.column("hops")


def test_progress_reaches_the_end():
    seen = []
    knowledge_coupling(
        build("gpt2"), [pieces(LENGTHS)], chunk_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {5}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"select": ["*"]}, {"projection": 256}, {"chunk_size": 2, "center": True}])
def test_a_gpu_gives_the_numbers_of_a_cpu(options):
    batch = pieces(LENGTHS)
    expected = knowledge_coupling(build("gpt2").double(), [batch], **options)
    found = knowledge_coupling(build("gpt2").double().cuda(), [batch], **options)
    assert found.matrix.device.type == "cpu"
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-8, atol=1e-10)
