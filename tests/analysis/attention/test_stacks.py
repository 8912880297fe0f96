"""Tests of attention in the stacks of an encoder-decoder, each over its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_goldy.analysis import attention_maps, attention_statistics, head_importance
from lightning_goldy.analysis.attention import Prompt, track_attention
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError, describe_architecture
from tests.references.model_zoo import VOCABULARY, batch_for, build_family


@pytest.fixture(scope="module", params=["T5", "BART"])
def model(request: pytest.FixtureRequest) -> Any:
    return build_family(request.param)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, VOCABULARY, (2, length), generator=generator) for length in (7, 5)]
    return {"input_ids": ids[0], "decoder_input_ids": ids[1]}


def test_each_stack_is_read_over_its_own_tokens(model: Any) -> None:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch(), output_attentions=True)
    for stack, patterns in (("encoder", expected.encoder_attentions), ("decoder", expected.decoder_attentions)):
        maps = attention_maps(model, batch(), stack=stack)  # type: ignore[arg-type]
        for found, wanted in zip(maps.patterns, patterns, strict=True):
            torch.testing.assert_close(found, wanted)
        statistics = attention_statistics(model, [batch()], stack=stack)  # type: ignore[arg-type]
        mean = patterns[1].diagonal(dim1=-2, dim2=-1).mean(dim=(0, 2)).double()
        torch.testing.assert_close(statistics.diagonal[1], mean, check_dtype=False)


def test_without_a_name_or_the_decoders_tokens_it_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="an encoder and a decoder, which attend"):
        attention_statistics(model, [batch()])
    with pytest.raises(ValueError, match="dicts with 'decoder_input_ids'"):
        attention_maps(model, {"input_ids": batch()["input_ids"]}, stack="decoder")


def test_heads_of_both_stacks_are_gated(model: Any) -> None:
    architecture = describe_architecture(model)
    with torch.no_grad():
        clean = model(**batch()).logits
    gates = HeadGates(model, architecture=architecture)
    assert gates.heads_per_layer == (4, 4, 4, 4)
    for head in ((0, 1), (3, 2)):
        with gates.closing_only([head]), torch.no_grad():
            closed = model(**batch()).logits
        part = architecture.blocks[head[0]].output_slice(head[1])[0]
        before = part.parameter.detach().clone()
        with torch.no_grad():
            part.of(part.parameter).zero_()
            torch.testing.assert_close(model(**batch()).logits, closed)
            part.parameter.copy_(before)
        assert not torch.allclose(closed, clean)
    gates.remove()


def labelled() -> dict[str, torch.Tensor]:
    """A batch as a trainer has it, the second row's target two tokens shorter."""
    labels = torch.tensor([[5, 6, 5, 1], [7, 1, -100, -100]])
    return {"input_ids": batch()["input_ids"], "labels": labels}


def test_the_decoders_tokens_are_made_from_labels_whose_end_is_padding(model: Any) -> None:
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labelled()["labels"])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    # Behind everything that a query sees, padding moves no pattern.
    given = {"input_ids": labelled()["input_ids"], "decoder_input_ids": shifted}
    for stack in ("encoder", "decoder"):
        found = attention_statistics(model, [labelled()], stack=stack)  # type: ignore[arg-type]
        expected = attention_statistics(model, [{**given, "decoder_attention_mask": mask}], stack=stack)  # type: ignore[arg-type]
        for name in found.names:
            torch.testing.assert_close(found.statistic(name), expected.statistic(name), equal_nan=True)
        assert found.queries[0, 0] == (14 if stack == "encoder" else 7)
    inside = attention_statistics(
        model, [{**labelled(), "labels": torch.tensor([[5, -100, 6, 1]] * 2)}], stack="decoder"
    )
    assert inside.queries[0, 0] == 8  # a masked target is a token all the same


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_tracked_attention_reads_prompts_of_its_stack(model: Any, stack: Any) -> None:
    source = {"input_ids": torch.tensor([[9, 8, 7, 6]])}
    prompt = Prompt.of("sum", [3, 4, 5], model, None, 24, source=source if stack == "decoder" else None)
    found = track_attention(model, [labelled()], prompts=[prompt], heads="all", base=model, stack=stack)
    assert found.stack == found.row().result["stack"] == stack
    (shown,) = found.prompts
    assert shown.maps.patterns[0].shape == (1, 4, 3, 3)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        ids = torch.tensor([[3, 4, 5]])
        inputs = (
            {**source, "decoder_input_ids": ids} if stack == "decoder" else {"input_ids": ids, "decoder_input_ids": ids}
        )
        expected = getattr(model(**inputs, output_attentions=True), f"{stack}_attentions")
    torch.testing.assert_close(shown.maps.patterns[1], expected[1])
    assert found.statistics.mean("drift") == pytest.approx(0, abs=1e-6)


def test_attention_to_the_encoder_is_refused_by_name(model: Any) -> None:
    for stack in ("cross", "cross_attention"):
        with pytest.raises(
            UnsupportedArchitectureError, match=r"attention to its encoder is no part.*'encoder' or 'dec"
        ):
            attention_maps(model, batch(), stack=stack)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'encoder'"):
        attention_maps(model, batch(), stack="encoders")  # type: ignore[arg-type]


def test_entropies_of_heads_are_over_the_queries_of_their_stack(model: Any) -> None:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    padded = {**labelled(), "attention_mask": mask}
    entropies = head_importance(model, [padded], strategy="entropy").measured["entropy"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**padded, output_attentions=True)
    for layer, pattern, n_keys, lengths in (
        (1, output.encoder_attentions[1], mask.sum(dim=1)[:, None].expand(2, 7), mask.sum(dim=1)),
        (3, output.decoder_attentions[1], torch.arange(1, 5).expand(2, 4), torch.tensor([4, 3])),
    ):
        entropy = torch.special.entr(pattern.double()).sum(-1) / n_keys.clamp(min=2).log()[:, None]
        rows = [
            entropy[row, :, :length][:, n_keys[row, :length] > 1].mean(dim=-1) for row, length in enumerate(lengths)
        ]
        torch.testing.assert_close(entropies[layer], torch.stack(rows).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_sound_has_no_tokens_and_its_words_have() -> None:
    model = build_family("Whisper")
    sound = batch_for(model)
    assert attention_statistics(model, [sound], stack="decoder").entropy.shape == (2, 4)
    with pytest.raises(ValueError, match="dicts with 'input_ids'"):
        attention_statistics(model, [sound], stack="encoder")
