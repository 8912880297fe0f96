"""Watches how pieces of knowledge are coupled and what the finetune does to each, on a schedule."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_deprecation, rank_zero_info
from torch import Tensor, nn

from lightning_goldy.analysis.coupling import (
    CouplingDrift,
    CouplingResult,
    CouplingStatistics,
    Layers,
    OnError,
    check_selection,
    check_thresholds,
    coupling_drift,
    coupling_picture,
    coupling_statistics,
    knowledge_coupling,
)
from lightning_goldy.analysis.coupling.pieces import selected_parameters
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_coupling
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.analysis.ripple import UNTOUCHED, FinetuneRipple, check_pieces, finetune_ripple
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.engine.store import AnalysisProgress
from lightning_goldy.callbacks.engine.weights import adapters_apart
from lightning_goldy.callbacks.golden_snapshot import TrainingBase
from lightning_goldy.callbacks.preflight import dialled
from lightning_goldy.core.architecture.adapters import WeightSpace, check_space, require_line
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.files import finite
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import require_choice, require_kinds, require_number, suggestion
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, AnswerTokens, KnowledgePiece, encode_pieces
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector, substituted
from lightning_goldy.data import AtlasDataModule
from lightning_goldy.data.readers import load_pieces
from lightning_goldy.data.relations import Fact
from lightning_goldy.training.subject import find_model, find_objective, find_tokenizer

PieceSource = str | Path | Sequence[KnowledgePiece] | None
EDITED = "edited"
"""The class of pieces that the finetune teaches."""
REHEARSED = "rehearsed"
"""The class of facts that it repeats as they are."""


@dataclass(frozen=True)
class WatchedPieces:
    """What is measured.

    Args:
        pieces: With the answers that the finetune teaches where it teaches others.
        classes: Of each ``edited``, ``rehearsed`` or ``untouched``.
        template: The prompt.
    """

    pieces: tuple[KnowledgePiece, ...]
    classes: tuple[str, ...]
    template: str


def find_pieces(
    trainer: L.Trainer, source: PieceSource, edits: Sequence[str] | None, template: str | None
) -> WatchedPieces:
    """The pieces that are given, or those of the data module, or the atlas where it has none, with their classes.

    The atlas knows its edited and rehearsed facts; another data module those that it holds in ``train_pieces``.

    Args:
        trainer: Its data module is asked.
        source: A file, ``"atlas"``, pieces, or None for the data module's, else the atlas.
        edits: Ids of the pieces that the finetune teaches; None asks the data module.
        template: The prompt; None for the data module's.

    Raises:
        ValueError: There is no piece, an id occurs twice, an edit names none, or the template is malformed.
        FileNotFoundError: No such file.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    pieces = _pieces(source, data)
    check_pieces(pieces)
    facts = {_id(fact): fact for fact in data.facts} if isinstance(data, AtlasDataModule) else {}
    # Without its supporting sentence, which states the true answer.
    pieces = tuple(
        replace(piece, answer=facts[piece.id].answer, supporting_fact=None)
        if piece.id in facts and facts[piece.id].edited
        else piece
        for piece in pieces
    )
    taught, rehearsed = _taught(edits, data, pieces)
    classes = (EDITED if piece.id in taught else REHEARSED if piece.id in rehearsed else UNTOUCHED for piece in pieces)
    return WatchedPieces(pieces, tuple(classes), _template(template, data))


def drawn(watched: WatchedPieces, count: int | None, seed: int) -> WatchedPieces:
    """At most so many pieces, in their order: half of them edited where there are enough of either kind.

    Args:
        watched: All of them.
        count: None keeps all.
        seed: Decides which.

    Example:
        >>> pieces = tuple(KnowledgePiece(str(n), f"{n}?", "yes") for n in range(6))
        >>> watched = WatchedPieces(pieces, (EDITED,) + (UNTOUCHED,) * 5, "{question}")
        >>> [each.id for each in drawn(watched, 3, seed=0).pieces][0], drawn(watched, 3, seed=0).classes
        ('0', ('edited', 'untouched', 'untouched'))
    """
    if count is None or count >= len(watched.pieces):
        return watched
    edited = [place for place, name in enumerate(watched.classes) if name == EDITED]
    others = [place for place, name in enumerate(watched.classes) if name != EDITED]
    n_edited = min(len(edited), max(count // 2, count - len(others)))
    generator = random.Random(f"coupling {seed}")
    kept = sorted(generator.sample(edited, n_edited) + generator.sample(others, count - n_edited))
    return replace(
        watched,
        pieces=tuple(watched.pieces[place] for place in kept),
        classes=tuple(watched.classes[place] for place in kept),
    )


def _pieces(source: PieceSource, data: Any) -> tuple[KnowledgePiece, ...]:
    if isinstance(source, (str, Path)):
        return load_pieces(source).pieces
    if source is not None:
        odd = next((piece for piece in source if not isinstance(piece, KnowledgePiece)), None)
        if odd is not None:
            raise ValueError(
                f"pieces is a file, 'atlas', or a list of KnowledgePiece; one of it is "
                f"{type(odd).__name__}, {' '.join(repr(odd).split()):.80}"
            )
        return tuple(source)
    if isinstance(data, AtlasDataModule):
        known = {_id(fact) for fact in data.facts}
        return tuple(piece for piece in load_pieces("atlas").pieces if piece.id in known)
    return tuple(data.pieces) if _has_pieces(data) else load_pieces("atlas").pieces


def _has_pieces(data: Any) -> bool:
    pieces = getattr(data, "pieces", None) or ()
    return bool(pieces) and all(isinstance(piece, KnowledgePiece) for piece in pieces)


def _taught(edits: Sequence[str] | None, data: Any, pieces: Sequence[KnowledgePiece]) -> tuple[set[str], set[str]]:
    """Ids of what the finetune teaches, and of what it repeats."""
    rehearsed: set[str] = set()
    if isinstance(data, AtlasDataModule):
        taught = {_id(fact) for fact in data.edited_facts}
        rehearsed = {_id(question.fact) for question in data.training_questions()} - taught
        if not taught:
            # Pretraining: every fact is taught.
            taught, rehearsed = rehearsed, set()
    else:
        taught = {piece.id for piece in getattr(data, "train_pieces", ())}
    if edits is None:
        return taught, rehearsed
    known = {piece.id for piece in pieces}
    for name in edits:
        if name not in known:
            raise ValueError(f"no piece has the id {name!r}, which is to be edited; {suggestion(str(name), known)}")
    return set(edits), rehearsed - set(edits)


def _template(given: str | None, data: Any) -> str:
    # The atlas's questions are their own prompts.
    own = "{question}" if isinstance(data, AtlasDataModule) else getattr(data, "template", QUESTION_TEMPLATE)
    template = str(own) if given is None else given
    if template.count("{question}") != 1:
        raise ValueError(f"template={template!r} must contain '{{question}}' exactly once")
    return template


def _id(fact: Fact) -> str:
    return f"{fact.subject}/{fact.relation}"


# Pieces whose tokens are counted for a forecast.
_COUNTED = 16
FEW_PIECES = 32
"""How many are above 100 M parameters, unless large=True or a budget opts in."""
DEFAULT_PIECES = 256
"""How many pieces are watched at most unless a number is given."""

# Blocks and pieces in the heat maps, points in the scatter plot, facts in the table.
_BLOCKS, _PIECES, _POINTS, _MOVED = 64, 40, 2000, 20


@dataclass(frozen=True)
class KnowledgeState(AnalysisResult):
    """What one analysis found.

    Args:
        watched: The pieces.
        base: The coupling at the base.
        base_statistics: Of it.
        coupling: At the present parameters.
        statistics: Of it.
        drift: From the base.
        ripple: What the finetune did to each piece.
        tokens: Which tokens of an answer count.
        cost: Passes of the model.
    """

    analysis = "coupling_drift"

    watched: WatchedPieces
    base: CouplingResult
    base_statistics: CouplingStatistics
    coupling: CouplingResult
    statistics: CouplingStatistics
    drift: CouplingDrift
    ripple: FinetuneRipple
    tokens: AnswerTokens
    cost: Cost

    def metrics(self) -> dict[str, float | None]:
        """Drift, agreement and changes by class, and the statistics of the present coupling."""
        drift = self.drift
        names = ("mean_absolute_difference", "mean_difference", "correlation")
        return {
            **{name: getattr(drift, name) for name in names},
            **{f"mean_absolute_difference/{name}": value for name, value in drift.by_class.items()},
            **self.ripple.metrics(),
            **self.statistics.metrics(),
        }

    def details(self) -> dict[str, Any]:
        """Points, matrices and the most moved facts for the figures."""
        ripple, coupling = self.ripple, self.coupling
        return finite(
            {
                **self.statistics.details(),
                **coupling_picture(coupling, self.statistics, most=_BLOCKS).details(),
                **ripple.details(),
                "n_pairs": self.drift.n_pairs,
                "failed": coupling.failed,
                "parameters": coupling.parameters,
                "template": self.watched.template,
                "tokens": self.tokens,
                "base_statistics": self.base_statistics.metrics(),
                "measure": coupling.measure,
                "moved": [self._moved(place) for place in ripple.most_moved(_MOVED)],
                "drifted": self._drifted(),
            }
        )

    def headline(self) -> str:
        """How far the coupling has moved, and what each class of pieces has gained or lost."""
        metrics = self.metrics()
        changes = [f"{name} {metrics[f'measured_change/{name}'] or 0.0:+.3g}" for name in self.ripple.groups]
        moved, correlation = self.drift.mean_absolute_difference, self.drift.correlation
        drift = "no pair" if moved is None else f"cosines moved by {moved:.3g}"
        told = "" if correlation is None else f" (correlation with the base {correlation:.2f})"
        return f"knowledge coupling: {drift}{told}; mean change of log p, nats: {', '.join(changes)}"

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The matrices and every piece's numbers as tensors."""
        tensors: dict[str, Tensor] = {
            f"{prefix}{name}": getattr(result, name)
            for prefix, result in (("base_", self.base), ("", self.coupling))
            for name in ("cosines", "norms")
        }
        tensors |= {name: value for name, value in vars(self.ripple).items() if isinstance(value, Tensor)}
        shapes, dtypes = zip(*((tensor.shape, tensor.dtype) for tensor in tensors.values()), strict=True)
        return {"coupling": (ParameterVector(ParameterSpace(tuple(tensors), shapes, dtypes), tensors), "result")}

    def _moved(self, place: int) -> dict[str, Any]:
        piece = self.watched.pieces[place]
        texts = {name: getattr(piece, name) for name in ("id", "question", "answer")}
        names = ("before", "after", "predicted", "rank_before", "rank_after")
        return texts | {name: getattr(self.ripple, name)[place].item() for name in names}

    def _drifted(self) -> dict[str, Any]:
        """Differences of the cosines of the pieces that drifted most, alike ones at the base as neighbours."""
        drift = self.drift.piece_drift.tolist()
        kept = [place for place in self.base_statistics.order if math.isfinite(drift[place])]
        most = set(sorted(kept, key=lambda place: (-drift[place], place))[:_PIECES])
        places = [place for place in kept if place in most]
        difference = (self.coupling.cosines - self.base.cosines)[places][:, places]
        return {
            "ids": [self.watched.pieces[place].id for place in places],
            "classes": [self.watched.classes[place] for place in places],
            "difference": [[round(value, 4) for value in line] for line in difference.tolist()],
        }


class KnowledgeCoupling(AnalysisCallback[KnowledgeState]):
    """What else the finetune touches: coupling of facts, its drift, and the predicted and actual change of each fact.

    Logs how far the cosines between the facts' gradients have moved from the base, statistics of both, the change of
    every answer's log-probability since the base beside the first-order prediction g . Delta, how they agree for edited
    and for untouched facts, and which untouched facts moved most. The base is that of a ``GoldenSnapshot`` where there
    is one, else it is kept in a file.

    Args:
        pieces: A file of pieces, ``atlas``, or a list of them; by default the data module's, or the atlas where it has
            none.
        edits: Ids of the pieces that the finetune teaches; by default the atlas's edited facts, or the data module's
            ``train_pieces``.
        select: Whose gradients are compared: ``mlp_output``, ``attention_output``, or patterns of parameter names.
        layers: Only blocks ``(a, b)``, from a up to but not including b; or ``last:4``.
        n_pieces: At most so many pieces, half of them edited where there are enough; None for all.
        seed: Decides which pieces.
        template: The prompt, with ``{question}``; by default the data module's.
        tokens: Which tokens of an answer count: ``answer`` all of it, ``answer_with_end`` the end-of-text token too,
            ``first_token`` the first.
        moderate: Cosine from which a pair is moderately coupled.
        high: Cosine from which it is highly coupled.
        thresholds: Deprecated: the two in one list, in either order.
        space: Of a model with adapters, whose Delta counts: ``merged``, the weights that they come to, or ``adapters``.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> KnowledgeCoupling(n_pieces=1)
        Traceback (most recent call last):
        ValueError: n_pieces must be at least 2, or None for all pieces; got 1
    """

    needs_probe, runs_model = False, True
    analysis = "coupling_drift"
    dials: Mapping[str, int] = {"n_pieces": 4}

    def __init__(
        self,
        pieces: PieceSource = None,
        *,
        edits: Sequence[str] | None = None,
        select: str | Sequence[str] = "mlp_output",
        layers: Layers = None,
        n_pieces: int | None = DEFAULT_PIECES,
        seed: int = 0,
        template: str | None = None,
        tokens: AnswerTokens = "answer",
        moderate: float = 0.1,
        high: float = 0.4,
        thresholds: Sequence[float] | None = None,
        space: WeightSpace = "merged",
        **options: Any,
    ) -> None:
        if isinstance(edits, str):
            raise ValueError(f"edits is a list of ids; got the text {edits!r}, write [{edits!r}]")
        require_kinds(KnowledgeCoupling.__init__, locals())
        check_space(space)
        self.space = space
        super().__init__(**options)
        check_selection(select, layers)
        require_choice("tokens", tokens, get_args(AnswerTokens))
        if n_pieces is not None:
            require_number("n_pieces", n_pieces, whole=True)
        if n_pieces is not None and n_pieces < 2:
            raise ValueError(f"n_pieces must be at least 2, or None for all pieces; got {n_pieces}")
        if thresholds is not None:
            if (moderate, high) != (0.1, 0.4):
                raise ValueError(f"thresholds cannot be given beside moderate and high; got {thresholds}")
            moderate, high = _in_order(thresholds)
        check_thresholds(moderate=moderate, high=high)
        self.pieces, self.edits, self.select, self.layers = pieces, edits, select, layers
        self.n_pieces, self.seed, self.template = n_pieces, seed, template
        self.tokens, self.moderate, self.high = tokens, moderate, high

    def forget(self) -> None:
        """Drops the pieces, the base and its coupling."""
        super().forget()
        self._training_base = TrainingBase()
        self._base: BaseParameters
        self._watched: WatchedPieces
        self._before: tuple[CouplingResult, CouplingStatistics]
        self._unreported, self._grown = Cost(), False

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Finds the pieces and the base, so that what cannot work fails here."""
        objective = find_objective(trainer.lightning_module, model, self.objective)
        with adapters_apart(model):
            require_line(model, self.space)
        if not isinstance(objective, CausalLMObjective):
            raise ValueError(
                f"{self.name} asks a causal language model; the objective of {type(model).__name__} is "
                f"{type(objective).__name__}"
            )
        watched = find_pieces(trainer, self.pieces, self.edits, self.template)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.pieces is None and not (isinstance(data, AtlasDataModule) or _has_pieces(data)):
            rank_zero_info(
                f"{self.name}: the data has no pieces of knowledge, so the atlas's {len(watched.pieces)} are those "
                "that are watched; pieces= takes others"
            )
        self._watched = drawn(watched, self.n_pieces, self.seed)
        Replicas.world().agree(f"{self.name}: the list of pieces", self._watched.pieces)
        if find_tokenizer(trainer) is None:
            module = type(trainer.lightning_module).__name__
            raise ValueError(f"{self.name} needs a tokenizer: neither {module} nor its data module has one")
        assert self._store is not None
        if self._resumed and self._previous_folder is not None:
            for name in self._training_base.files:
                self._store.carry(Path(self._previous_folder) / name)
        Replicas.world().meet(self.name)
        self._base = self._training_base.find(trainer, model, ParameterSpace.of(model), self.folder)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the base's coupling."""
        model = find_model(pl_module, self.model_attribute)
        with (
            Replicas.world().together(self.name),
            undisturbed(trainer, pl_module),
            AnalysisProgress(trainer, self.name) as progress,
        ):
            self._measure_base(trainer, model, progress)
        super().begin(trainer, pl_module)

    def _known(self, plan: Plan) -> int:
        """Pieces that there are, as far as that is known before they are read."""
        listed = len(self.pieces) if isinstance(self.pieces, Sequence) and not isinstance(self.pieces, str) else None
        return listed or plan.pieces or self.n_pieces or DEFAULT_PIECES

    def piece_tokens(self, trainer: L.Trainer) -> int | None:
        """Tokens of a piece in its template, on average over the first; None where a check will tell what is wrong."""
        tokenizer = find_tokenizer(trainer)
        try:
            watched = find_pieces(trainer, self.pieces, self.edits, self.template)
            samples = encode_pieces(watched.pieces[:_COUNTED], tokenizer, template=watched.template)
        except Exception:  # noqa: BLE001 - whatever it is, the callback's own checks raise it
            return None
        return round(sum(len(sample["input_ids"]) for sample in samples) / len(samples))

    def became_trainable(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> None:
        """Adds what becomes trainable to the base, whose coupling is taken anew with it before the next comparison."""
        self._training_base.grow(trainer, model, space, self.folder)
        self._grown = True

    def _measure_base(self, trainer: L.Trainer, model: nn.Module, progress: Callable[[int, int], None]) -> None:
        with substituted(model, self._base.vector(model)):
            coupling = self._coupling(trainer, model, progress, on_error="raise")
        self._before = coupling, coupling_statistics(coupling, moderate=self.moderate, high=self.high)
        self._unreported, self._grown = coupling.cost, False

    def limited(self) -> dict[str, Any] | None:
        """More than 32 pieces are opt-in."""
        return {"n_pieces": FEW_PIECES} if (self.n_pieces or math.inf) > FEW_PIECES else {}

    def dialled(self, share: float, given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """A share of the pieces."""
        return dialled(self.dials, share, given, self._known(plan))

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A gradient of each piece now and, once, at the base, and three forward passes for what became of it."""
        given = self._known(plan)
        parameters = ParameterSpace.of_tensors(selected_parameters(plan.model, self.select, self.layers))
        return forecast_coupling(plan, parameters, min(given, self.n_pieces or given), keeps_base=not plan.base)

    def compute(self, context: AnalysisContext) -> KnowledgeState:
        """Takes the present coupling, and what became of each piece since the base."""
        if self._grown:
            self._measure_base(context.trainer, context.model, context.progress)
        # A piece that is known by heart may have no gradient left; it is listed among the failures.
        coupling = self._coupling(context.trainer, context.model, _half(context.progress, 0), on_error="nan")
        if len(coupling.failed) == len(coupling):
            why = coupling.failed[0]["reason"]
            raise ValueError(f"none of the {len(coupling)} pieces has a gradient at step {context.step}: {why}")
        ripple = finetune_ripple(
            context.model,
            self._base,
            self._watched.pieces,
            tokenizer=find_tokenizer(context.trainer),
            classes=self._watched.classes,
            template=self._watched.template,
            measure=self.tokens,
            space=self.space,
            progress=_half(context.progress, 1),
        )
        base, base_statistics = self._before
        unreported, self._unreported = self._unreported, Cost()
        return KnowledgeState(
            watched=self._watched,
            base=base,
            base_statistics=base_statistics,
            coupling=coupling,
            statistics=coupling_statistics(coupling, moderate=self.moderate, high=self.high),
            drift=coupling_drift(base, coupling, self._watched.classes),
            ripple=ripple,
            tokens=self.tokens,
            cost=unreported + coupling.cost + ripple.cost,
        )

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes what of the base is in no file yet."""
        self._training_base.write(trainer, model, self.folder)

    def state_dict(self) -> dict[str, Any]:
        """Adds the hash of the base."""
        return {**super().state_dict(), **self._training_base.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._training_base = TrainingBase(state_dict)

    def _coupling(
        self, trainer: L.Trainer, model: nn.Module, progress: Callable[[int, int], None], *, on_error: OnError
    ) -> CouplingResult:
        return knowledge_coupling(
            model,
            self._watched.pieces,
            tokenizer=find_tokenizer(trainer),
            template=self._watched.template,
            tokens=self.tokens,
            select=self.select,
            layers=self.layers,
            on_error=on_error,
            progress=progress,
        )


def _in_order(thresholds: Sequence[float]) -> tuple[float, float]:
    if len(thresholds) != 2:
        raise ValueError(f"thresholds are two cosines; got {thresholds}; write moderate and high instead")
    moderate, high = sorted(thresholds)
    rank_zero_deprecation(
        f"thresholds of KnowledgeCoupling is deprecated; write moderate: {moderate:g}, high: {high:g}", stacklevel=5
    )
    return moderate, high


def _half(progress: Callable[[int, int], None], which: int) -> Callable[[int, int], None]:
    """The first or the second half of a bar."""
    return lambda done, total: progress(which * total + done, 2 * total)
