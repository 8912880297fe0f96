"""What ``goldy coupling`` reads and measures: pieces, their coupling, edits and their ripples."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import spaced_places
from lightning_goldy.analysis.coupling import (
    CouplingResult,
    CouplingStatistics,
    activation_similarity,
    coupling_statistics,
    knowledge_coupling,
    layer_gradient_norms,
)
from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.ripple import (
    Encoding,
    KnowledgeEdit,
    PieceScores,
    RippleResult,
    ripple_effects,
    score_pieces,
)
from lightning_goldy.analysis.ripple.measure import counted_passes
from lightning_goldy.commands.coupling.options import Options
from lightning_goldy.core.files import RowError, read_rows
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.readers import PieceSet, load_pieces

if TYPE_CHECKING:
    from rich.status import Status
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("id", "answer", "subject")
_BATCH_SIZE = 32
# Pieces whose gradients are taken layer by layer, one backward pass each.
_LAYERED = 32


@dataclass(frozen=True)
class Findings:
    """What was measured, N pieces in one order throughout.

    Args:
        source: All pieces of the source.
        result: The coupling.
        statistics: Of the coupling.
        scores: How sure the model is of the answers without their end: NaN, 0 and False where a piece failed.
        layers: Norms of gradients by block of the pieces ``layered``.
        layered: Numbers of those pieces.
        activation: Similarity of activations, if asked for.
        ripple: Effects of edits, if asked for.
        cost: Passes of the coupling.
    """

    source: PieceSet
    result: CouplingResult
    statistics: CouplingStatistics
    scores: PieceScores
    layers: dict[str, Tensor]
    layered: tuple[int, ...]
    activation: CouplingResult | None
    ripple: RippleResult | None
    cost: Cost

    @property
    def known_share(self) -> float | None:
        """Share of the pieces that did not fail whose answer the model knows; None where all failed."""
        return float(self.scores.exact[self.result.valid].double().mean()) if self.statistics.n_pieces else None


@dataclass(frozen=True)
class Material:
    """What is measured.

    Args:
        source: All pieces of the source.
        chosen: Those to compare.
        edits: Those of a file; none where they are drawn from the pieces that did not fail.
    """

    source: PieceSet
    chosen: tuple[KnowledgePiece, ...]
    edits: tuple[KnowledgeEdit, ...] = ()


def read_material(options: Options) -> Material:
    """Reads the pieces, chooses those that are compared, and reads the edits where they are in a file.

    Raises:
        FileNotFoundError: No such source or file.
        ValueError: It cannot be read, or has fewer pieces than are asked for.
    """
    pieces, editing = options.pieces, options.editing
    source = load_pieces(pieces.source, format=pieces.format, form=pieces.form)
    if pieces.count is not None and pieces.count > len(source.pieces):
        raise ValueError(f"--n-pieces {pieces.count}: {source.source} has {len(source.pieces)} pieces")
    chosen = chosen_pieces(source.pieces, pieces.count, pieces.seed)
    if editing is None or isinstance(editing.edits, int):
        return Material(source, chosen)
    return Material(source, chosen, tuple(read_edits(editing.edits, chosen)))


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, material: Material, options: Options, clock: Clock
) -> Findings:
    """Measures everything; the model comes back as it was.

    Args:
        model: A causal language model.
        tokenizer: Its own.
        material: The pieces, and edits of a file.
        options: How.
        clock: Times the phases.
    """
    method, chosen = options.method, material.chosen
    encode = {"tokenizer": tokenizer, "template": options.pieces.prompt}
    part: dict[str, Any] = {"select": method.select, "layers": method.layers, **encode}
    here: dict[str, Any] = {"progress": clock.progress, "split_over_ranks": False}
    with clock.phase("coupling"), counted_passes(model) as passes:
        result = knowledge_coupling(model, chosen, center=method.center, **part, **here, **vars(method.options))
        cost = passes()
    with clock.phase("statistics"):
        statistics = coupling_statistics(result, moderate=method.moderate, high=method.high)
    good = result.valid.nonzero().flatten().tolist()
    with clock.phase("answers"):
        scores = _scores(model, tokenizer, options.pieces.prompt, chosen, good)
    with clock.phase("layers"):
        layered = tuple(good[place] for place in spaced_places(len(good), _LAYERED))
        layers = layer_gradient_norms(model, [chosen[index] for index in layered], **part)
    activation = ripple = None
    if method.activation:
        with clock.phase("activation"):
            activation = activation_similarity(model, chosen, on_error="nan", **part, **here)
    if options.editing is not None:
        with clock.phase("ripple"):
            ripple = _ripple(model, tokenizer, material, result, options, clock)
    return Findings(material.source, result, statistics, scores, layers, layered, activation, ripple, cost)


def _ripple(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    result: CouplingResult,
    options: Options,
    clock: Clock,
) -> RippleResult:
    editing, method = options.editing, options.method
    assert editing is not None
    kept = [piece for piece, good in zip(material.chosen, result.valid.tolist(), strict=True) if good]
    # The editor's own default is what the default of the coupling selects too.
    own = method.select == "mlp_output" and method.layers is None
    return ripple_effects(
        model,
        kept,
        material.edits or drawn_edits(kept, int(editing.edits), method.seed),
        tokenizer=tokenizer,
        editor=editing.editor,
        learning_rate=editing.learning_rate,
        steps=editing.steps,
        select=None if own or editing.editor == "rank_one" else result.parameters,
        template=options.pieces.prompt,
        progress=clock.progress,
        split_over_ranks=False,
    )


def _scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chosen: Sequence[KnowledgePiece],
    good: Sequence[int],
) -> PieceScores:
    # Without the end: a model that was never taught to stop knows its answers all the same.
    encoding = Encoding(tokenizer, template, "answer", _BATCH_SIZE, next(model.parameters()).device)
    with preserved(model):
        scores = score_pieces(model, encoding.batches(encoding.samples([chosen[index] for index in good])))
    log_prob = torch.full((len(chosen),), math.nan, dtype=torch.float64)
    rank, exact = torch.zeros(len(chosen), dtype=torch.int64), torch.zeros(len(chosen), dtype=torch.bool)
    for target, value in ((log_prob, scores.log_prob), (rank, scores.rank), (exact, scores.exact)):
        target[good] = value.to(target.dtype)
    return PieceScores(log_prob, rank, exact)


def chosen_pieces(pieces: Sequence[KnowledgePiece], count: int | None, seed: int) -> tuple[KnowledgePiece, ...]:
    """Draws pieces, group by group, so that the pieces of a question stay together; the last group may be cut.

    Args:
        pieces: All of them; their order stays.
        count: How many, at most as many as there are; None for all.
        seed: Decides the draw.

    Example:
        >>> pieces = [KnowledgePiece(str(n), f"{n}?", "A", group=str(n // 2)) for n in range(8)]
        >>> [piece.id for piece in chosen_pieces(pieces, 4, seed=0)]
        ['0', '1', '6', '7']
    """
    if count is None:
        return tuple(pieces)
    groups: dict[Any, list[int]] = {}
    for place, piece in enumerate(pieces):
        groups.setdefault(("piece", place) if piece.group is None else ("group", piece.group), []).append(place)
    drawn = list(groups.values())
    random.Random(f"coupling pieces {seed}").shuffle(drawn)
    places = [place for group in drawn for place in group][:count]
    return tuple(pieces[place] for place in sorted(places))


def drawn_edits(pieces: Sequence[KnowledgePiece], count: int, seed: int) -> list[KnowledgeEdit]:
    """Draws pieces and gives each the answer of another one: of its own category where that has another answer.

    Args:
        pieces: All of them.
        count: Edits, at least 1.
        seed: Decides both.

    Raises:
        ValueError: There are not so many pieces, or all have one answer.

    Example:
        >>> pieces = [KnowledgePiece("1", "Capital of Peru?", "Lima"), KnowledgePiece("2", "Of Italy?", "Rome")]
        >>> [(edit.piece, edit.answer) for edit in drawn_edits(pieces, 2, seed=0)]
        [('1', 'Rome'), ('2', 'Lima')]
    """
    if not 1 <= count <= len(pieces):
        raise ValueError(
            f"--edits {count}: the number of edits must be between 1 and {len(pieces)}, the pieces there are"
        )
    generator = random.Random(f"coupling edits {seed}")
    by_category: dict[str | None, set[str]] = {}
    for piece in pieces:
        by_category.setdefault(piece.category, set()).add(piece.answer)
    everything = {piece.answer for piece in pieces}
    edits = []
    for place in sorted(generator.sample(range(len(pieces)), count)):
        piece = pieces[place]
        own = folded(piece.answer)
        others = (
            sorted(answer for answer in answers if folded(answer) != own)
            for answers in (by_category[piece.category], everything)
        )
        choices = next(filter(None, others), [])
        if not choices:
            raise ValueError(f"all pieces have the answer {piece.answer!r}, so there is no other to edit to")
        edits.append(KnowledgeEdit(piece.id, generator.choice(choices)))
    return edits


def read_edits(path: str | Path, pieces: Sequence[KnowledgePiece]) -> list[KnowledgeEdit]:
    r"""Reads edits from JSON lines: ``id`` of a piece, new ``answer``, and optionally ``subject``.

    Args:
        path: The file.
        pieces: What can be edited.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line lacks something, has a field too many, or names no piece.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "edits.jsonl").write_text('{"id": "1", "answer": "Rome"}\n')
        ...     read_edits(Path(folder, "edits.jsonl"), [KnowledgePiece("1", "Capital of Peru?", "Lima")])
        [KnowledgeEdit(piece='1', answer='Rome', subject=None)]
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--edits is a number of edits or a file of them; there is no file {path}")
    try:
        rows = read_rows(path)
    except RowError as error:
        raise ValueError(str(error)) from error
    if not rows:
        raise ValueError(f'{path} holds no edit; one JSON object per line, such as {{"id": "1", "answer": "Rome"}}')
    known = {piece.id for piece in pieces}
    edits = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        for name in row:
            if name not in _FIELDS:
                raise ValueError(f"{where}: unknown field {name!r}; {suggestion(name, _FIELDS)}")
        for name in _FIELDS:
            value = row.get(name)
            if not (isinstance(value, str) and value.strip()) and (name != "subject" or value is not None):
                raise ValueError(f"{where}: {name!r} must be text; got {value!r}")
        if row["id"] not in known:
            raise ValueError(f"{where}: no piece has the id {row['id']!r}; {suggestion(row['id'], sorted(known))}")
        edits.append(KnowledgeEdit(row["id"], row["answer"], row.get("subject")))
    return edits


def folded(text: str) -> str:
    """A text without the case and white space in which equal answers may differ."""
    return " ".join(text.split()).casefold()


@dataclass
class Clock:
    """Seconds of each phase, and what the console says meanwhile.

    Args:
        status: Of the console; None says nothing.
        seconds: By phase.
    """

    status: Status | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _phase: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block."""
        self._phase = name
        self._say(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, done: int, total: int) -> None:
        """Says how far the phase is."""
        self._say(f"{self._phase}: {done:,} of {total:,}")

    def _say(self, text: str) -> None:
        if self.status is not None:
            self.status.update(text)
