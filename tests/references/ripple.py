"""Ripple effects the slow way: one piece at a time, without padding, on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_goldy.analysis.ripple import RippleResult, ripple_effects
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.tokenization import word_tokenizer
from tests.references.models import build

TEMPLATE = "{question}"
_ANSWERS = {
    "capital": ("Lima", "Ndjamena", "Vientiane", "Port Vila"),
    "money": ("sol", "franc", "kip", "vatu"),
    "area": ("big", "wide and flat", "small", "tiny"),
}
_COUNTRIES = ("Peru", "Chad", "Laos", "Vanuatu")


def facts() -> list[KnowledgePiece]:
    """Twelve facts of four countries; prompts and answers of several lengths."""
    return [
        KnowledgePiece(
            f"{relation} of {country}",
            f"the {relation} of {country} is" if relation == "capital" else f"{country} has {relation}",
            answers[place],
            category=relation,
            group=country,
        )
        for place, country in enumerate(_COUNTRIES)
        for relation, answers in _ANSWERS.items()
    ]


def tokenizer() -> PreTrainedTokenizerBase:
    """One token per word."""
    return word_tokenizer([f"{piece.question} {piece.answer}" for piece in facts()] + ["Question: Answer:"])


def double(family: str, seed: int = 0) -> nn.Module:
    """A small model in float64, its weights larger than at initialisation, so that changes are not all alike."""
    model = build(family, seed).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@dataclass(frozen=True)
class Reading:
    """What a model thinks of one answer."""

    log_prob: Tensor
    ranks: tuple[int, ...]

    @property
    def exact(self) -> bool:
        return all(rank == 1 for rank in self.ranks)


def read(model: nn.Module, words: PreTrainedTokenizerBase, piece: KnowledgePiece, measure: str) -> Reading:
    """Log-probability and ranks of a piece's answer, token after token."""
    prompt = words(piece.question)["input_ids"]
    answer = [*words(piece.question + " " + piece.answer)["input_ids"][len(prompt) :], words.eos_token_id]
    answer = {"answer_with_end": answer, "answer": answer[:-1], "first_token": answer[:1]}[measure]
    total, ranks = torch.zeros((), dtype=torch.float64), []
    for place, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1].double()
        total = total + torch.log_softmax(logits, dim=0)[token]
        ranks.append(logits.sort(descending=True).indices.tolist().index(token) + 1)
    return Reading(total / len(answer), tuple(ranks))


def gradient(
    model: nn.Module, words: PreTrainedTokenizerBase, piece: KnowledgePiece, names: Sequence[str], measure: str
) -> Tensor:
    """The gradient of a piece's log-probability, all named parameters in one vector."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(read(model, words, piece, measure).log_prob, [parameters[name] for name in names])
    return torch.cat([each.flatten() for each in found])


@dataclass(frozen=True)
class Effects:
    """What one edit does; one entry per piece."""

    first_order: Tensor
    coupling: Tensor
    cosine: Tensor
    before: list[Reading]
    after: list[Reading]
    delta_norm: float


def effects(
    model: nn.Module,
    words: PreTrainedTokenizerBase,
    wanted: Sequence[KnowledgePiece],
    names: Sequence[str],
    train: Callable[[nn.Module], None],
    measure: str = "answer_with_end",
) -> Effects:
    """Trains a copy and compares it with the original, piece by piece.

    Args:
        model: The original.
        words: Its tokenizer.
        wanted: The edits: pieces with their new answers.
        names: The parameters that change.
        train: Makes the edit in place.
        measure: Which tokens count.
    """
    edited = copy.deepcopy(model)
    train(edited)
    was, now = dict(model.named_parameters()), dict(edited.named_parameters())
    delta = torch.cat([(now[name] - was[name]).detach().flatten() for name in names])
    towards = sum(gradient(model, words, piece, names, measure) for piece in wanted) / len(wanted)
    gradients = [gradient(model, words, piece, names, measure) for piece in facts()]
    cosine = torch.stack([each @ towards / (each.norm() * towards.norm()) for each in gradients])
    with torch.no_grad():
        readings = [[read(each, words, piece, measure) for piece in facts()] for each in (model, edited)]
    return Effects(
        torch.stack([each @ delta for each in gradients]),
        torch.stack([c * each.norm() * delta.norm() for c, each in zip(cosine, gradients, strict=True)]),
        cosine,
        *readings,
        float(delta.norm()),
    )


def rank_one(key: Tensor, change: Tensor, covariance: Tensor) -> Tensor:
    """The closed form for one key, with the inverse written out; out x in."""
    direction = torch.linalg.inv(covariance) @ key
    return torch.outer(change, direction) / (key @ direction)


@contextmanager
def seen_samples(model: nn.Module) -> Iterator[list[int]]:
    """Samples that go through the last layer norm of a GPT-2, forwards and backwards."""
    seen = [0, 0]

    def forwards(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[0] += len(output)
        if output.requires_grad:
            output.register_hook(backwards)

    def backwards(slope: Tensor) -> None:
        seen[1] += len(slope)

    handle = model.transformer.ln_f.register_forward_hook(forwards)
    yield seen
    handle.remove()


WORDS = tokenizer()
EDITS = [("capital of Peru", "Vientiane"), ("money of Chad", "kip"), ("area of Laos", "wide and flat")]


def ripple(model: nn.Module, edits: Any = EDITS, **options: Any) -> RippleResult:
    """The analysis of the facts, the end of their answers among the tokens that count."""
    settings = {"tokenizer": WORDS, "template": TEMPLATE, "batch_size": 5, "measure": "answer_with_end"}
    return ripple_effects(model, facts(), edits, **{**settings, **options})
