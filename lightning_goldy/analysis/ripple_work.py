"""Makes edits one after another, and measures and predicts what each does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.editors import Editor, EditRequest
from lightning_goldy.analysis.ripple_edits import PlannedEdit
from lightning_goldy.analysis.ripple_measure import (
    Batch,
    Measure,
    PieceScores,
    Route,
    available_route,
    measured_samples,
    piece_gradient,
    score_pieces,
    slopes,
)
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.pieces import KnowledgePiece, encode_pieces, padded_batches
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.vector import ParameterVector, require_finite, substituted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
