"""Tests of attention in the stacks of an encoder-decoder, each over its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_goldy.analysis import attention_maps, attention_statistics
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError, describe_architecture
from tests.references.model_zoo import VOCABULARY, build_family


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
