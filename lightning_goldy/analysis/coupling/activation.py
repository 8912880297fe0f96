"""A cheaper rival of knowledge coupling: how alike the activations of two questions are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling.passes import CouplingError, OnError, made_passes
from lightning_goldy.analysis.coupling.pieces import (
    Layers,
    Pieces,
    PieceSamples,
    Select,
    check_selection,
    is_bare,
    joined_batch,
    piece_samples,
    selected_parameters,
)
from lightning_goldy.analysis.coupling.statistics import CouplingResult
from lightning_goldy.analysis.gradients import linear_layers
from lightning_goldy.analysis.result import counted_passes, total_cost
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_choice
from lightning_goldy.core.objective import IGNORE_INDEX, Objective, objective_for
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, AnswerTokens
from lightning_goldy.core.sharding import Replicas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["last", "mean"]
# Of a piece its log-probability and pooled activations, or why it failed.
_Recorded = tuple[float, list[Tensor]] | str
# Tokens in one pass, by kind of device.
_TOKENS = {"cpu": 2048, "cuda": 32768}


def activation_similarity(
    model: nn.Module,
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    template: str = QUESTION_TEMPLATE,
    tokens: AnswerTokens = "answer",
    select: Select = "mlp_output",
    layers: Layers = None,
    pooling: Pooling = "last",
    center: bool = False,
    on_error: OnError = "raise",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> CouplingResult:
    r"""Cosines between the activations of questions: forward passes only, nothing of the answers.

    .. math::
        S_{ij} = \frac1L \sum_l \frac{\langle h_i^l, h_j^l \rangle}{\lVert h_i^l \rVert \, \lVert h_j^l \rVert}

    with h the outputs of the selected linear layers at the last token of the question, or their mean over its tokens.
    The model comes back as it was. On several ranks the pieces are shared out; every rank must call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        pieces: Knowledge pieces, or batches with ``input_ids`` and ``labels``, one piece a row.
        tokenizer: The model's, for knowledge pieces.
        objective: How the model is called; next-token prediction by default.
        template: The prompt of a knowledge piece.
        tokens: Which tokens of a knowledge piece's answer count: ``answer`` all of it, ``answer_with_end`` the
            end-of-text token too, ``first_token`` the first. Of batches their labels decide.
        select: As for ``knowledge_coupling``; weights of linear layers, whose outputs are compared.
        layers: As for ``knowledge_coupling``.
        pooling: ``last``, the token that the answer's first one is predicted from, or ``mean``, over all tokens before
            the answer.
        center: Subtracts the mean over the pieces from each layer's activations before; without it most cosines are
            large.
        on_error: ``raise``, or ``nan`` to list pieces that fail and leave their rows NaN.
        progress: Called with (pieces done, pieces in all) on this rank.
        split_over_ranks: Whether to share pieces out over the ranks of an initialised process group.

    Returns:
        The matrix with its pieces, as of ``knowledge_coupling``, with ``measure="activation"``.

    Raises:
        CouplingError: A piece failed, something else than a linear layer is selected, or pieces are no token sequences.
        ValueError: An argument is malformed, or there is no piece.

    Source: forward activations as predictors of ripple effects, in place of gradients.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 7]])
        >>> batch = {"input_ids": ids, "labels": ids.masked_fill(torch.tensor([True, True, False]), -100)}
        >>> result = activation_similarity(GPT2LMHeadModel(config), [batch])
        >>> result.measure, round(float(result.matrix[0, 2]), 5)  # the same question
        ('activation', 1.0)
    """
    check_selection(select, layers)
    require_choice("on_error", on_error, get_args(OnError))
    require_choice("pooling", pooling, get_args(Pooling))
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)
    objective = objective_for(model, objective)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    samples = piece_samples(pieces, tokenizer=tokenizer, objective=objective, template=template, tokens=tokens)
    with preserved(model), torch.no_grad():
        parameters = selected_parameters(model, select, layers, sample_batch=samples.example(model))
        recorder = _Recorder(model, objective, list(parameters), pooling)
        with replicas.together("activation_similarity"), counted_passes(model, recorder.count) as passes:
            recorded = _recorded(recorder, samples, replicas, on_error, progress)
    activations, log_probs, failures = _gathered(recorded, samples, replicas, recorder)
    matrix, norms = _similarity(activations, log_probs, center=center)
    double = all(parameter.dtype == torch.float64 for parameter in parameters.values())
    return CouplingResult(
        matrix=matrix if double else matrix.float(),
        norms=norms,
        log_probs=log_probs,
        pieces=samples.descriptions,
        failed=samples.listed(failures),
        parameters=tuple(parameters),
        measure="activation",
        normalize=True,
        center=center,
        projection=None,
        projection_error=None,
        seconds=time.perf_counter() - began,
        cost=total_cost(replicas, passes()),
    )


class _Recorder:
    """Runs pieces forward and pools the outputs of linear layers."""

    def __init__(self, model: nn.Module, objective: Objective, names: Sequence[str], pooling: Pooling) -> None:
        self.model, self.objective, self.pooling = model, objective, pooling
        self.device = next(model.parameters()).device
        layers = linear_layers(model)
        odd = next((name for name in names if name not in layers), None)
        if odd is not None:
            raise CouplingError(f"{odd} is not the weight of one linear layer, so it has no activations to compare")
        self.modules = {name: layers[name] for name in names}
        self.widths: dict[str, int] = {}
        self._weights = torch.empty(0)
        self._pooled: dict[str, Tensor] = {}

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean log-probabilities of the answers, and by layer pooled outputs of shape ``[B, d]``, float64."""
        batch = joined_batch(samples, self.device)
        self._weights, self._pooled = _pooling_weights(batch["labels"], self.pooling), {}
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.enter_context(module.register_forward_hook(partial(self._pool, name)))
            log_probs = self.objective.log_probs(self.model, batch)
        missing = next((name for name in self.modules if name not in self._pooled), None)
        if missing is not None:
            raise CouplingError(f"the layer of {missing} is not called")
        return log_probs.double(), self._pooled

    def count(self) -> int:
        """Pieces in the present pass."""
        return len(self._weights)

    def _pool(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        count, length = self._weights.shape
        flat = (count * length, output.shape[-1])
        if tuple(output.shape) not in ((count, length, output.shape[-1]), flat):
            raise CouplingError(
                f"the layer of {name} gives {tuple(output.shape)} for {count} pieces of {length} tokens: not one row "
                "of activations per token"
            )
        if name in self._pooled:
            raise CouplingError(f"the layer of {name} is called more than once, so its activations are several")
        tokens = output.reshape(count, length, -1).double()  # [B, T, d]
        self.widths[name] = tokens.shape[-1]
        # Padding may hold anything, also what is not finite.
        tokens = tokens.masked_fill((self._weights == 0)[:, :, None], 0)
        self._pooled[name] = torch.einsum("bt,btd->bd", self._weights, tokens)


def _pooling_weights(labels: Tensor, pooling: Pooling) -> Tensor:
    """Weights of tokens, shape ``[B, T]``, float64: those before the first target, or the last of them."""
    # The first token is predicted from nothing, so the first target is behind it.
    targets = labels[:, 1:] != IGNORE_INDEX  # [B, T-1]
    last = targets.to(torch.int8).argmax(dim=1)  # [B]; the token that the first target is predicted from
    places = torch.arange(labels.shape[1], device=labels.device)
    chosen = places == last[:, None] if pooling == "last" else places <= last[:, None]
    return chosen.double() / chosen.sum(dim=1, keepdim=True)


def _recorded(
    recorder: _Recorder,
    samples: PieceSamples,
    replicas: Replicas,
    on_error: OnError,
    progress: Callable[[int, int], None] | None,
) -> dict[int, _Recorded]:
    recorded: dict[int, _Recorded] = {}
    given = {index: sample for index, sample in enumerate(samples.samples) if sample is not None}
    odd = next((index for index, sample in given.items() if not is_bare(sample)), None)
    if odd is not None:
        raise CouplingError(f"{samples.name(odd)} is not a sequence of tokens with labels")
    order = sorted(given, key=lambda index: -len(given[index]["input_ids"]))
    mine = replicas.share(order)
    tokens = _TOKENS.get(recorder.device.type, 2048)

    def fits(chunk: list[int], index: int) -> bool:
        # The longest alone: a first dimension of 1 tells a batch apart from a sequence.
        return chunk[0] != mine[0] and (len(chunk) + 1) * len(given[chunk[0]]["input_ids"]) <= tokens

    for chunk, outcome in made_passes(mine, fits, lambda chunk: recorder([given[index] for index in chunk])):
        if isinstance(outcome, Exception):
            recorded[chunk[0]] = str(outcome)
        else:
            log_probs, pooled = outcome
            for at, index in enumerate(chunk):
                own = [tensor[at].cpu() for tensor in pooled.values()]
                reason = _reason(float(log_probs[at]), own, list(pooled))
                recorded[index] = reason or (float(log_probs[at]), own)
        if progress is not None:
            progress(len(recorded), len(mine))
    recorded.update({index: reason for index, reason in samples.failures.items() if replicas.rank == 0})
    if on_error == "raise":
        for index in sorted(index for index, known in recorded.items() if isinstance(known, str)):
            raise CouplingError(f"{samples.name(index)}: {recorded[index]}")
    return recorded


def _reason(log_prob: float, pooled: Sequence[Tensor], names: Sequence[str]) -> str:
    if not math.isfinite(log_prob):
        return f"the mean log-probability of its answer is {log_prob}"
    for name, tensor in zip(names, pooled, strict=True):
        norm = float(tensor.norm())
        if not math.isfinite(norm) or norm == 0:
            return f"the activations of the layer of {name} are {'zero' if norm == 0 else 'not finite'}"
    return ""


def _gathered(
    recorded: dict[int, _Recorded], samples: PieceSamples, replicas: Replicas, recorder: _Recorder
) -> tuple[list[Tensor], Tensor, dict[int, str]]:
    """Activations of all pieces by layer, shape ``[N, d]``, zero where one failed; log-probabilities; failures."""
    count = len(samples.samples)
    widths = next(known for known in replicas.gather_objects(recorder.widths) if known)
    activations = [torch.zeros(count, widths[name], dtype=torch.float64) for name in recorder.modules]
    log_probs, failures = torch.zeros(count, dtype=torch.float64), {}
    for index, outcome in recorded.items():
        if isinstance(outcome, str):
            failures[index] = outcome
        else:
            log_probs[index] = outcome[0]
            for layer, tensor in zip(activations, outcome[1], strict=True):
                layer[index] = tensor
    if replicas.size > 1:
        for layer in (*activations, log_probs):
            layer.copy_(replicas.sum_(layer.to(recorder.device)))
    every = {index: reason for part in replicas.gather_objects(failures) for index, reason in part.items()}
    log_probs[list(every)] = math.nan
    return activations, log_probs, every


def _similarity(activations: Sequence[Tensor], log_probs: Tensor, *, center: bool) -> tuple[Tensor, Tensor]:
    good = torch.isfinite(log_probs)
    count = len(log_probs)
    matrix, squares = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for layer in activations:
        if center:
            layer = layer - layer[good].mean(dim=0)
        norms = layer.norm(dim=1)
        if bool((norms[good] == 0).any()):
            raise CouplingError("center=True leaves nothing of a piece: its activations are the mean over the pieces")
        unit = layer / norms[:, None]
        matrix += unit @ unit.T
        squares += norms.square()
    matrix = (matrix + matrix.T) / (2 * len(activations))  # symmetric to the last bit
    matrix.clamp_(-1, 1)
    matrix.diagonal()[good] = 1
    matrix[~good] = math.nan
    matrix[:, ~good] = math.nan
    squares[~good] = math.nan
    return matrix, squares.sqrt()
