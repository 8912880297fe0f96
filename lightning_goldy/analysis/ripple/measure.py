"""Log-probabilities and gradients of answers before and after an edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.ripple.editors import Editor, EditRequest, log_prob_gradient
from lightning_goldy.analysis.ripple.result import PlannedEdit
from lightning_goldy.core.autodiff import Substituted, directional_derivatives
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.pieces import KnowledgePiece, Sample, encode_pieces, padded_batches
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.vector import ParameterVector, require_finite, substituted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Measure = Literal["answer_with_end", "answer", "first_token"]
Batch = Mapping[str, Tensor]
Route = Literal["forward", "gradients"]


@dataclass(frozen=True)
class PieceScores:
    """How sure a model is of N pieces, on the CPU.

    Args:
        log_prob: Mean log-probability of the target tokens, nats, float64, ``[N]``.
        rank: Worst rank of a target token in the vocabulary, 1 is best, int64, ``[N]``.
        exact: Whether each target token is the most probable one, bool, ``[N]``.
    """

    log_prob: Tensor
    rank: Tensor
    exact: Tensor


def measured_samples(samples: Sequence[Sample], measure: Measure, names: Sequence[str]) -> list[Sample]:
    """Samples whose labels are the tokens that are measured.

    Args:
        samples: Labels on the answer and the end-of-text token.
        measure: ``answer_with_end`` for all of these, ``answer`` without the end, ``first_token`` for the first.
        names: Of the samples, for messages.

    Raises:
        ValueError: Nothing predicts the first token, for the prompt is empty.

    Example:
        >>> labels = torch.tensor([-100, 7, 8, 0])
        >>> measured_samples([{"labels": labels}], "answer", ["a"])[0]["labels"].tolist()
        [-100, 7, 8, -100]
    """
    found = []
    for sample, name in zip(samples, names, strict=True):
        labels = sample["labels"].clone()
        places = (labels != IGNORE_INDEX).nonzero().flatten()
        if int(places[0]) == 0:
            raise ValueError(f"the prompt of piece {name!r} is empty, so nothing predicts its answer's first token")
        if measure == "answer":
            labels[places[-1]] = IGNORE_INDEX
        elif measure == "first_token":
            labels[places[1:]] = IGNORE_INDEX
        found.append({**sample, "labels": labels})
    return found


def score_pieces(model: nn.Module, batches: Sequence[Batch]) -> PieceScores:
    """Measures pieces, a forward pass per batch.

    Args:
        model: A causal language model.
        batches: Of pieces, labels on what is measured.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            target = CausalLMObjective().logits_and_targets(model, batch)
            # In float64, or the effect of a small edit would be a few units of the last place.
            target = dataclasses.replace(target, logits=target.logits.double())
            own = target.logits.gather(1, target.targets[:, None])  # [M, 1]
            ranks = 1 + (target.logits > own).sum(dim=1)  # [M]
            worst = torch.zeros(target.n_samples, dtype=torch.int64, device=ranks.device)
            worst.scatter_reduce_(0, target.sample, ranks, "amax")
            missed = target.logits.argmax(dim=1) != target.targets
            misses = torch.zeros_like(worst).index_add_(0, target.sample, missed.long())
            parts.append((target.log_probs().cpu(), worst.cpu(), (misses == 0).cpu()))
    return PieceScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def available_route(model: nn.Module, start: ParameterVector, sample: Batch) -> Route:
    """``forward`` where forward mode runs through the model, else ``gradients``.

    Args:
        model: A causal language model that can be called.
        start: Its values.
        sample: A batch that it takes.
    """
    try:
        _forward_slope(model, start, start, sample)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        return "gradients"
    return "forward"


def slopes(
    model: nn.Module,
    start: ParameterVector,
    directions: Sequence[ParameterVector],
    batches: Sequence[Batch],
    route: Route,
) -> Tensor:
    r"""Derivatives of every piece's log-probability along directions.

    .. math:: s_{dj} = g_j \cdot u_d, \qquad g_j = \nabla_\theta \overline{\log p_\theta}(a_j \mid q_j)

    Args:
        model: At ``start``.
        start: theta.
        directions: D of them, u.
        batches: Of N pieces.
        route: ``forward``: one pass of forward mode per direction and batch. ``gradients``: a backward pass per piece.

    Returns:
        Shape ``[D, N]``, nats per unit of the direction, float64, on the CPU.
    """
    if route == "forward":
        rows = [torch.cat([_forward_slope(model, start, each, batch) for batch in batches]) for each in directions]
        return torch.stack(rows)
    columns = []
    for sample in (part for batch in batches for part in split_batch(batch)):
        gradient = piece_gradient(model, start, sample)
        columns.append(torch.tensor([gradient.dot(each) for each in directions], dtype=torch.float64))
    return torch.stack(columns, dim=1)


def piece_gradient(model: nn.Module, start: ParameterVector, batch: Batch) -> ParameterVector:
    """Gradient of the mean log-probability of a batch's pieces with respect to the parameters of ``start``."""
    log_prob = CausalLMObjective().log_probs(model, batch).mean()
    gradients = log_prob_gradient(start.space.resolve(model), log_prob)
    return ParameterVector(start.space, dict(zip(start, gradients, strict=True)))


def _forward_slope(model: nn.Module, start: ParameterVector, direction: ParameterVector, batch: Batch) -> Tensor:
    _, slope = directional_derivatives(
        lambda parameters: CausalLMObjective().log_probs(Substituted(model, parameters), batch),
        dict(start),
        dict(direction),
        1,
    )
    return slope.double().cpu()


@dataclass(frozen=True)
class Encoding:
    """How pieces become batches.

    Args:
        tokenizer: Of the model.
        template: The prompt, with ``{question}`` where the question goes.
        measure: Which tokens are targets.
        batch_size: Pieces per batch.
        device: Where the batches are.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    measure: Measure
    batch_size: int
    device: torch.device

    def samples(self, pieces: Sequence[KnowledgePiece]) -> list[Sample]:
        """Prompt and answer of each piece."""
        names = [piece.id for piece in pieces]
        return measured_samples(encode_pieces(pieces, self.tokenizer, template=self.template), self.measure, names)

    def batches(self, samples: Sequence[Sample], size: int) -> list[Batch]:
        """Samples in batches of a size."""
        # Padding is masked, so any token serves.
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        padded = padded_batches(samples, int(end if pad is None else pad), size)
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in padded]


@dataclass(frozen=True)
class Outcome:
    """What one row of edits did.

    Args:
        scores: Of the pieces after the edit.
        new_before: Log-probability of the new answers before, nats.
        new_after: The same after.
        new_exact: Whether all of them are exact after.
        delta_norm: ||delta||, parameter units.
        gradient_norm: ||g_e||, nats per parameter unit.
        along_delta: g_j . delta / ||delta||, ``[N]``.
        along_gradient: g_j . g_e / ||g_e||, ``[N]``.
    """

    scores: PieceScores
    new_before: float
    new_after: float
    new_exact: bool
    delta_norm: float
    gradient_norm: float
    along_delta: Tensor
    along_gradient: Tensor


@dataclass(frozen=True)
class RippleWork:
    """The model before any edit, and what is known of it.

    Args:
        model: In evaluation mode; only the editor's parameters require gradients.
        editor: Makes the edits.
        encoding: Makes their batches.
        start: The values of the editor's parameters.
        batches: Of the pieces.
        scores: Of the pieces.
        route: How derivatives along directions are found.
        kept: For the editor.
    """

    model: nn.Module
    editor: Editor
    encoding: Encoding
    start: ParameterVector
    batches: list[Batch]
    scores: PieceScores
    route: Route
    kept: dict[str, Any]

    def gradient_norms(self, replicas: Replicas) -> list[float]:
        """||g_j|| of this process's share of the pieces."""
        pieces = [part for batch in self.batches for part in split_batch(batch)]
        return [piece_gradient(self.model, self.start, piece).norm() for piece in replicas.share(pieces)]

    def outcomes(
        self, rows: Sequence[Sequence[PlannedEdit]], progress: Callable[[int, int], None] | None
    ) -> list[Outcome]:
        """What each row of edits does."""
        found = []
        for row in rows:
            found.append(self._outcome(row))
            if progress is not None:
                progress(len(found), len(rows))
        return found

    def _outcome(self, row: Sequence[PlannedEdit]) -> Outcome:
        """Makes edits, measures, undoes them, predicts."""
        request = self._request(row)
        before = score_pieces(self.model, [request.batch])
        # On its own, so that an edit leaves nothing to the next, such as another mode.
        with preserved(self.model), substituted(self.model, self.start):
            self.editor.edit(self.model, request)
            self.model.eval()
            # Inside autocast a low-precision copy of a weight may be older than the edit.
            torch.clear_autocast_cache()
            delta = _change(self.model, self.start)
            scores = score_pieces(self.model, self.batches)
            after = score_pieces(self.model, [request.batch])
        gradient = piece_gradient(self.model, self.start, request.batch)
        # Along unit vectors, which no precision of the parameters flushes to zero.
        sizes = _normalise(delta), _normalise(gradient)
        along = slopes(self.model, self.start, (delta, gradient), self.batches, self.route)
        return Outcome(
            scores,
            float(before.log_prob.mean()),
            float(after.log_prob.mean()),
            bool(after.exact.all()),
            *sizes,
            *along,
        )

    def _request(self, row: Sequence[PlannedEdit]) -> EditRequest:
        samples = self.encoding.samples([each.wanted for each in row])
        return EditRequest(
            prompts=tuple(self.encoding.template.replace("{question}", each.wanted.question) for each in row),
            subjects=tuple(each.span(self.encoding.template.index("{question}")) for each in row),
            samples=tuple(samples),
            batch=self.encoding.batches(samples, len(samples))[0],
            space=self.start.space,
            context=tuple(self.batches),
            tokenizer=self.encoding.tokenizer,
            kept=self.kept,
        )


def prepare_work(model: nn.Module, editor: Editor, encoding: Encoding, pieces: Sequence[KnowledgePiece]) -> RippleWork:
    """Measures the model before any edit, and lets only the editor's parameters require gradients.

    Args:
        model: In the hands of ``preserved``.
        editor: Makes the edits.
        encoding: Makes batches.
        pieces: What is measured.

    Raises:
        ValueError: A weight is not finite, or a piece cannot be encoded.
        SpaceError: The editor's parameters are not there.
    """
    space = editor.space(model)
    for name, parameter in model.named_parameters():
        require_finite({name: parameter}, "weights")
    parameters = {id(parameter) for parameter in space.resolve(model).values()}
    for parameter in model.parameters():
        # Packed weights cannot require gradients and do not.
        if parameter.requires_grad is not (id(parameter) in parameters):
            parameter.requires_grad_(id(parameter) in parameters)
    start = ParameterVector.of(model, space)
    batches = encoding.batches(encoding.samples(pieces), encoding.batch_size)
    scores = score_pieces(model, batches)
    route = available_route(model, start, next(split_batch(batches[0])))
    return RippleWork(model, editor, encoding, start, batches, scores, route, {})


def _change(model: nn.Module, start: ParameterVector) -> ParameterVector:
    """delta, in at least float32."""
    return ParameterVector.of(model, start.space, clone=False).zip_with(
        start, lambda after, before: after.to(_wide(before)) - before.to(_wide(before))
    )


def _normalise(vector: ParameterVector) -> float:
    """Scales a vector to length 1 in place (a zero one stays) and returns the length that it had."""
    size = vector.norm()
    if size:
        for tensor in vector.values():
            tensor.div_(size)
    return size


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
