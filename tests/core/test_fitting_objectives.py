"""Objectives chosen by the model's class, against each model's own loss and obvious loops over samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_goldy.analysis import golden_parameters
from lightning_goldy.callbacks import GoldenParameters
from lightning_goldy.core import objective as objectives
from lightning_goldy.core.autodiff import Substituted
from lightning_goldy.core.objective import (
    CausalLMObjective,
    ClassifierObjective,
    Seq2SeqObjective,
    SpanObjective,
    TokenObjective,
    check_own_loss,
    document_ids,
    objective_for,
    padding_mask,
)
from lightning_goldy.core.tasks import task_of
from tests.references.models import VOCABULARY, build

ENCODER = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": VOCABULARY,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
XLM = {"vocab_size": VOCABULARY, "emb_dim": 8, "n_layers": 1, "n_heads": 2}


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **sizes))


def bart(kind: type, **options: Any) -> nn.Module:
    return kind(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32, **options))


def whisper() -> nn.Module:
    options = {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**{**SEQ2SEQ, **options}))


def bert(kind: type, **options: Any) -> nn.Module:
    return kind(hf.BertConfig(**ENCODER, **options))


def vit() -> nn.Module:
    sizes = {key: value for key, value in ENCODER.items() if key != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=4, patch_size=2, num_labels=3))


def some_masked(labels: Tensor) -> Tensor:
    return labels.masked_fill(torch.arange(labels.numel()).view(labels.shape) % 3 == 0, -100)


TOKENS = {"input_ids": ids(4, 7)}
MODELS: dict[str, Any] = {
    "t5": (t5, Seq2SeqObjective, {**TOKENS, "labels": some_masked(ids(4, 5))}),
    "t5 with labels as long": (t5, Seq2SeqObjective, {**TOKENS, "labels": some_masked(ids(4, 7, seed=1))}),
    "bart": (lambda: bart(hf.BartForConditionalGeneration), Seq2SeqObjective, {**TOKENS, "labels": ids(4, 7, seed=1)}),
    "whisper": (
        whisper,
        Seq2SeqObjective,
        {"input_features": torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0)), "labels": ids(4, 5)},
    ),
    "decoder of bart": (lambda: bart(hf.BartForCausalLM), TokenObjective, {**TOKENS, "labels": ids(4, 7, seed=1)}),
    "xlm": (
        lambda: hf.XLMWithLMHeadModel(hf.XLMConfig(**XLM)),
        TokenObjective,
        {**TOKENS, "labels": some_masked(ids(4, 7, seed=1))},
    ),
    "flaubert": (
        lambda: hf.FlaubertWithLMHeadModel(hf.FlaubertConfig(**XLM)),
        TokenObjective,
        {**TOKENS, "labels": some_masked(ids(4, 7, seed=1))},
    ),
    "masked": (lambda: bert(hf.BertForMaskedLM), TokenObjective, {**TOKENS, "labels": some_masked(ids(4, 7, seed=1))}),
    "causal bert": (lambda: bert(hf.BertLMHeadModel), CausalLMObjective, {**TOKENS, "labels": some_masked(ids(4, 7))}),
    "tokens": (
        lambda: bert(hf.BertForTokenClassification, num_labels=3),
        TokenObjective,
        {**TOKENS, "labels": some_masked(ids(4, 7) % 3)},
    ),
    "sequences": (
        lambda: bert(hf.BertForSequenceClassification, num_labels=3),
        ClassifierObjective,
        {**TOKENS, "labels": torch.tensor([0, 2, 1, 2])},
    ),
    "choices": (
        lambda: bert(hf.BertForMultipleChoice),
        ClassifierObjective,
        {"input_ids": ids(4, 3, 7), "labels": torch.tensor([0, 2, 1, 2])},
    ),
    "spans": (
        lambda: bert(hf.BertForQuestionAnswering),
        SpanObjective,
        {**TOKENS, "start_positions": torch.tensor([0, 1, 3, 2]), "end_positions": torch.tensor([0, 6, 3, 4])},
    ),
    "images": (
        vit,
        ClassifierObjective,
        {
            "pixel_values": torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
            "labels": torch.tensor([0, 2, 1, 2]),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own(name: str) -> None:
    make, kind, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    objective = objective_for(model)
    assert type(objective) is kind
    with torch.no_grad():
        assert objective.loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
        alone = [model(**sample).loss.item() for sample in objective.samples(batch)]
        assert (-objective.log_probs(model, batch)).tolist() == pytest.approx(alone, rel=1e-6)
        check_own_loss(model, objective, batch)
    assert getattr(model.config, "problem_type", None) in (None, "single_label_classification")


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_labels_that_were_lists_of_one_are_read_as_by_the_model(kind: str) -> None:
    model = bert(getattr(hf, kind)).eval()
    names = ["labels"] if "Sequence" in kind else ["start_positions", "end_positions"]
    batch = {"input_ids": ids(2, 5), **dict.fromkeys(names, torch.tensor([[1], [0]]))}
    objective = objective_for(model)
    assert objective.loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    check_own_loss(model, objective, batch)
    assert len(objective.log_probs(model, batch)) == 2


def test_a_check_leaves_the_configuration_as_it_was() -> None:
    make, _, batch = MODELS["sequences"]
    model = make().eval()
    with torch.no_grad():
        check_own_loss(model, ClassifierObjective(), batch)
    assert model.config.problem_type is None


def test_given_decoder_inputs_are_used_as_they_are() -> None:
    model, batch = t5().eval(), MODELS["t5"][2]
    given = {**batch, "decoder_input_ids": ids(4, 5, seed=9)}
    with torch.no_grad():
        found = Seq2SeqObjective().loss(model, given).item()
        assert found == pytest.approx(model(**given).loss.item(), rel=1e-6)
        assert found != pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("wrapped", ["peft", "substituted"])
def test_the_class_is_found_inside_wrappers(wrapped: str) -> None:
    model, batch = t5().eval(), MODELS["t5"][2]
    assert type(objective_for(torch.compile(model, backend="eager"))) is Seq2SeqObjective
    outer: Any = Substituted(model, {})
    if wrapped == "peft":
        peft = pytest.importorskip("peft")
        outer = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM")).eval()
    with torch.no_grad():
        assert objective_for(outer).loss(outer, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_pure_analyses_choose_by_the_class_too() -> None:
    model, batch = t5().eval(), MODELS["t5 with labels as long"][2]
    found = golden_parameters(model, [batch], top_k_percent=50.0)
    expected = golden_parameters(model, [batch], Seq2SeqObjective(), top_k_percent=50.0)
    assert all(torch.equal(found.mask[name], expected.mask[name]) for name in expected.mask)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (hf.BertModel, {}, "BertModel: how its labels belong to its outputs is not known"),
        (hf.BertForPreTraining, {}, "BertForPreTraining: how its labels"),
        (hf.BertForSequenceClassification, {"num_labels": 1}, "problem_type 'regression', num_labels 1"),
        (
            hf.BertForSequenceClassification,
            {"problem_type": "multi_label_classification"},
            "problem_type 'multi_label_classification'",
        ),
    ],
)
def test_what_no_objective_fits_is_refused_by_name_with_advice_that_works(
    make: type, options: dict[str, Any], message: str
) -> None:
    model = bert(make, **options).eval()
    with pytest.raises(ValueError, match=message) as refusal:
        objective_for(model)
    assert "objective=FunctionObjective(lambda model, batch: model(**batch).loss)" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("t5 with labels as long", CausalLMObjective, "Seq2SeqObjective"),
        ("xlm", CausalLMObjective, "TokenObjective"),
        ("masked", CausalLMObjective, "TokenObjective"),
        ("causal bert", TokenObjective, "CausalLMObjective"),
        ("bart", TokenObjective, "Seq2SeqObjective"),
    ],
)
def test_an_objective_that_reads_labels_in_another_way_is_refused(name: str, wrong: type, right: str) -> None:
    make, _, batch = MODELS[name]
    with pytest.raises(ValueError, match=rf"{wrong.__name__} does not fit .*; pass objective={right}\(\)"):
        wrong().loss(make().eval(), batch)


class Shortened(nn.Module):
    """Gives logits of another length than the labels."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return hf.modeling_outputs.CausalLMOutput(
            logits=torch.zeros(len(input_ids), input_ids.shape[1] - 1, VOCABULARY)
        )


@pytest.mark.parametrize("objective", [CausalLMObjective(), TokenObjective()])
def test_logits_of_another_length_are_refused_with_both_shapes(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(4, 6, 53\) of Shortened .* labels of shape \(4, 7\)"):
        objective.loss(Shortened(), {**TOKENS, "labels": ids(4, 7)})


def test_labels_that_the_model_does_not_know_are_refused() -> None:
    make, _, batch = MODELS["sequences"]
    with pytest.raises(ValueError, match="labels from 0 to 7 are none of the 3 that BertForSequenceClassification"):
        ClassifierObjective().loss(make().eval(), {**batch, "labels": torch.tensor([0, 7, 1, 2])})
    make, _, batch = MODELS["spans"]
    with pytest.raises(ValueError, match="labels from 0 to 9 are none of the 7"):
        SpanObjective().loss(make().eval(), {**batch, "end_positions": torch.tensor([0, 9, 1, 2])})


# Virtual tokens


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("few", [False, True])
def test_behind_virtual_tokens_the_loss_is_the_models_own(method: str, few: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("gpt2"), config).eval()
    batch = {**TOKENS, "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    batch["attention_mask"][0, 5:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if few:
        batch["labels"][:, :4] = -100
    objective = objective_for(model)
    with torch.no_grad():
        own = model(**batch).loss.item()
        assert objective.loss(model, batch).item() == pytest.approx(own, rel=1e-5)
        assert objective.loss(Substituted(model, {}), batch).item() == pytest.approx(own, rel=1e-5)
        check_own_loss(model, objective, batch)


@pytest.mark.parametrize(
    ("task", "make", "labels"),
    [
        ("SEQ_2_SEQ_LM", t5, ids(4, 5)),
        ("SEQ_CLS", lambda: bert(hf.BertForSequenceClassification, num_labels=3), torch.tensor([0, 2, 1, 2])),
    ],
)
def test_virtual_tokens_before_other_heads(task: str, make: Any, labels: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=2)).eval()
    batch = {**TOKENS, "labels": labels}
    with torch.no_grad():
        assert objective_for(model).loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_labels_of_tokens_stand_behind_virtual_tokens() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=2)
    model = peft.get_peft_model(bert(hf.BertForTokenClassification, num_labels=3), config).eval()
    labels = some_masked(ids(4, 7) % 3)
    with torch.no_grad():
        logits = model(**TOKENS).logits[:, 2:]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        found = objective_for(model).loss(model, {**TOKENS, "labels": labels}).item()
    assert found == pytest.approx(expected, rel=1e-6)


# The check against the model's own loss


class Doubled(hf.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


def test_another_loss_than_the_models_own_is_told_with_both_numbers() -> None:
    model = Doubled(build("gpt2").config).eval()
    with torch.no_grad():
        own, ours = model(**TOKENS, labels=TOKENS["input_ids"]).loss.item(), CausalLMObjective().loss(model, TOKENS)
        assert own == pytest.approx(2 * ours.item())
        first = {"input_ids": TOKENS["input_ids"][:2]}
        numbers = [model(**first, labels=first["input_ids"]).loss.item(), CausalLMObjective().loss(model, first).item()]
        with pytest.raises(
            ValueError, match=rf"Doubled: its own loss .* is {numbers[0]:.6g}, that of .* {numbers[1]:.6g}"
        ):
            check_own_loss(model, CausalLMObjective(), TOKENS)


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[:, slice(0, 2) if side == "left" else slice(5, 7)] = 0
    return {**TOKENS, "attention_mask": mask, "labels": TOKENS["input_ids"].masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rounding_and_padding_are_no_difference(dtype: torch.dtype, side: str) -> None:
    model, batch = build("gpt2").to(dtype).eval(), padded(side)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["labels"][:, 2] = -100
    with torch.no_grad():
        for given in (batch, {name: value for name, value in batch.items() if name != "labels"}):
            check_own_loss(model, CausalLMObjective(), given, as_given=True)


def test_padding_on_the_left_that_a_model_trains_with_otherwise_is_told() -> None:
    model, batch = build("gpt2").eval(), padded("left")
    first = {name: value[:2] for name, value in batch.items()}
    positions, labels = "put position_ids into the batch", "2 labels are of first tokens behind padding"
    known = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    masked = batch["labels"].clone()
    masked[:, 2] = -100
    with torch.no_grad():
        own, ours = model(**first).loss.item(), CausalLMObjective().loss(model, first).item()
        assert abs(own - ours) > 1e-3
        check_own_loss(model, CausalLMObjective(), batch)
        for given, told in (
            (batch, {positions, labels}),
            ({**batch, **known}, {labels}),
            ({**batch, "labels": masked}, {positions}),
        ):
            with pytest.raises(ValueError, match="its own loss on the probe's first samples") as caught:
                check_own_loss(model, CausalLMObjective(), given, as_given=True)
            message = str(caught.value)
            assert {reason for reason in (positions, labels) if reason in message} == told
            assert "two ways" not in message
            if given is batch:
                assert f"is {own:.6g}, that of CausalLMObjective {ours:.6g}: " in message
        # Positions that are relative do not differ; the first tokens do.
        rotary = build("llama").eval()
        check_own_loss(rotary, CausalLMObjective(), {**batch, "labels": masked}, as_given=True)
        with pytest.raises(ValueError, match=labels) as caught:
            check_own_loss(rotary, CausalLMObjective(), batch, as_given=True)
        assert positions not in str(caught.value)


def test_labels_in_the_padding_that_the_model_trains_on_are_told() -> None:
    model, mask = build("gpt2").eval(), torch.ones(4, 7, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {**TOKENS, "attention_mask": mask, "labels": TOKENS["input_ids"]}
    with torch.no_grad():
        check_own_loss(model, CausalLMObjective(), batch)
        with pytest.raises(ValueError, match="4 labels stand where attention_mask is 0: make them -100"):
            check_own_loss(model, CausalLMObjective(), batch, as_given=True)


def test_the_loss_of_routers_is_no_part() -> None:
    sizes = {**ENCODER, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5)).eval()
    with torch.no_grad():
        own = model(**TOKENS, labels=TOKENS["input_ids"]).loss.item()
        assert own > CausalLMObjective().loss(model, TOKENS).item() + 0.1
        check_own_loss(model, CausalLMObjective(), TOKENS)


# Packed rows and masks


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])


def packed_masks() -> Iterator[dict[str, Any]]:
    number = document_ids({"input_ids": ids(1, 9), "position_ids": POSITIONS})
    assert number is not None
    seen = ((number[:, :, None] == number[:, None, :]) & torch.ones(9, 9, dtype=torch.bool).tril())[:, None]
    yield {"position_ids": POSITIONS}
    yield {"position_ids": POSITIONS, "attention_mask": seen}
    low = torch.finfo(torch.float32).min
    yield {"position_ids": POSITIONS, "attention_mask": torch.zeros(1, 1, 9, 9).masked_fill(~seen, low)}
    yield {"position_ids": POSITIONS, "cu_seq_lens_q": torch.tensor([0, 3, 7, 9], dtype=torch.int32)}


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_count_as_they_do_alone(index: int, family: str) -> None:
    model, row, objective = build(family).eval(), ids(1, 9), CausalLMObjective()
    batch = {"input_ids": row, **list(packed_masks())[index]}
    assert document_ids(batch).tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2]]  # type: ignore[union-attr]
    assert len(list(objective.samples(batch))) == 1
    losses: list[float] = []
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 7), (7, 9)):
            part = row[:, start:stop]
            losses += torch.nn.functional.cross_entropy(
                model(input_ids=part).logits[0, :-1], part[0, 1:], reduction="none"
            ).tolist()
        found = objective.logits_and_targets(model, batch)
        assert found.token_losses().tolist() == pytest.approx(losses, abs=1e-5)
        check_own_loss(model, objective, batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_that_see_each_other_in_the_training_are_told(family: str) -> None:
    torch.manual_seed(3)
    model, objective = build(family).eval(), CausalLMObjective()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    batch = {"input_ids": ids(1, 9), "position_ids": POSITIONS, "labels": ids(1, 9)}
    batch["labels"][0, [0, 3, 7]] = -100
    with torch.no_grad():
        own, found = (float(part) for part in (model(**batch).loss, objective.loss(model, batch)))
    assert abs(own - found) > 1e-2
    told = rf"first samples is {own:.6g}, that of CausalLMObjective {found:.6g}: while the model keeps a cache"
    with pytest.raises(ValueError, match=told):
        check_own_loss(model, objective, batch, as_given=True)
    check_own_loss(model, objective, {**batch, "use_cache": False}, as_given=True)
    model.config.use_cache = False
    check_own_loss(model, objective, batch, as_given=True)


def test_a_square_mask_tells_the_padding() -> None:
    kept = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    square = (torch.ones(5, 5).tril() * kept[:, None, None]).bool()
    rows = {"input_ids": ids(2, 5)}
    assert torch.equal(padding_mask({**rows, "attention_mask": square}), kept.bool())  # type: ignore[arg-type]
    model, positions = build("llama").eval(), (kept.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        flat = CausalLMObjective().log_probs(model, {**rows, "attention_mask": kept})
        other = CausalLMObjective().log_probs(model, {**rows, "attention_mask": square, "position_ids": positions})
    torch.testing.assert_close(other, flat, rtol=0, atol=1e-5)


# By name


@pytest.mark.parametrize(
    "name", [name for name in dir(objectives) if name.endswith("Objective") and name != "Objective"]
)
def test_every_objective_can_be_named_in_a_configuration(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GoldenParameters, "golden")
    words = [f"--golden.objective=lightning_goldy.core.objective.{name}"]
    if name == "FunctionObjective":
        words.append("--golden.objective.function=tests.core.test_fitting_objectives.own_loss")
    made = parser.parse_args(words).golden.objective
    assert made.class_path == f"lightning_goldy.core.objective.{name}"


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("name", ["XLNetLMHeadModel", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_a_subclass_is_what_its_bases_are(name: str) -> None:
    kind = {"GPT2LMHeadModel": Doubled}.get(name, type("FSDPAnother", (getattr(hf, name),), {}))
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = hf.T5Config() if name.startswith("T5") else hf.GPT2Config()
    expected = {"XLNetLMHeadModel": "tokens", "T5ForConditionalGeneration": "seq2seq", "GPT2LMHeadModel": "causal_lm"}
    assert task_of(model) == expected[name]


def test_the_regulariser_of_adalora_is_no_part_of_the_objective() -> None:
    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=9, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build("llama"), config).eval()
    batch = {"input_ids": torch.arange(2, 12).view(2, 5)}
    with torch.no_grad():
        own = model(**batch, labels=batch["input_ids"]).loss
        assert float(own) > float(CausalLMObjective().loss(model, batch)) + 0.1
        check_own_loss(model, CausalLMObjective(), batch)


@pytest.mark.parametrize(
    ("starts", "ends"), [((3, 1), (3, 2)), ((99, 1), (5, 2)), ((-100, 1), (-1, 2)), ((0, 1), (0, 2))], ids=str
)
def test_answers_outside_of_the_text_count_as_in_the_models_own_loss(starts: Any, ends: Any) -> None:
    model = bert(hf.BertForQuestionAnswering).eval()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [3, 4, 5]]),
        "start_positions": torch.tensor(starts),
        "end_positions": torch.tensor(ends),
    }
    objective = SpanObjective()
    torch.testing.assert_close(objective.loss(model, batch), model(**batch).loss)
    check_own_loss(model, objective, batch)
    counted = objective.logits_and_targets(model, batch)
    assert len(counted.targets) == 2 * sum(start < 3 for start in starts)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (
            1,
            3,
            r"sample 1 has its answer at positions 1 to 3, of which one end alone lies inside of .*put both at 3 or",
        ),
        (4, 7, r"samples \[1\] of a batch of 2 have no target: .*leave them out"),
    ],
)
def test_answers_that_have_no_probability_are_told(start: int, end: int, message: str) -> None:
    ends = {"start_positions": torch.tensor([0, start]), "end_positions": torch.tensor([1, end])}
    with pytest.raises(ValueError, match=message):
        SpanObjective().log_probs(
            bert(hf.BertForQuestionAnswering), {"input_ids": torch.tensor([[1, 2, 3], [3, 4, 5]]), **ends}
        )
    outside = {name: torch.full((2,), 3) for name in ends}
    with pytest.raises(ValueError, match=r"no target: every answer lies outside of the text, .* from 0 to 2"):
        SpanObjective().loss(
            bert(hf.BertForQuestionAnswering), {"input_ids": torch.tensor([[1, 2, 3], [3, 4, 5]]), **outside}
        )
