"""What ``goldy coupling`` measures: pieces, their coupling, the strong pairs, readiness for edits, and the edits."""

from __future__ import annotations

import csv
import io
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
from lightning_goldy.analysis.coupling.statistics import CONTRASTS, codes_of, folded
from lightning_goldy.analysis.ripple import (
    Encoding,
    KnowledgeEdit,
    PieceScores,
    RippleResult,
    ripple_effects,
    score_pieces,
)
from lightning_goldy.commands.coupling.options import Options
from lightning_goldy.core.files import RowError, atomic_write, read_rows
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.data.readers import PieceSet, load_pieces

if TYPE_CHECKING:
    from rich.status import Status
    from transformers import PreTrainedTokenizerBase


_FIELDS = ("id", "answer", "subject")
_BATCH_SIZE = 32
# Pieces whose gradients are taken layer by layer, one backward pass each.
_LAYERED = 32


@dataclass(frozen=True, eq=False)
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
    """

    source: PieceSet
    result: CouplingResult
    statistics: CouplingStatistics
    scores: PieceScores
    layers: dict[str, Tensor]
    layered: tuple[int, ...]
    activation: CouplingResult | None
    ripple: RippleResult | None

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
    encode = {"tokenizer": tokenizer, "template": options.pieces.prompt, "tokens": method.tokens}
    part: dict[str, Any] = {"select": method.select, "layers": method.layers, **encode}
    here: dict[str, Any] = {"progress": clock.progress, "split_over_ranks": clock.ranks.size > 1}
    with clock.phase("coupling"):
        result = knowledge_coupling(
            model,
            chosen,
            center=method.center,
            projection=method.projection,
            seed=method.seed,
            workspace=method.workspace,
            on_error="nan",
            **part,
            **here,
        )
    with clock.phase("statistics"):
        statistics = coupling_statistics(result, moderate=method.moderate, high=method.high)
    good = result.valid.nonzero().flatten().tolist()
    with clock.phase("answers"):
        scores = _scores(model, tokenizer, options.pieces.prompt, chosen, good, clock.ranks)
    with clock.phase("layers"):
        layered = tuple(good[place] for place in spaced_places(len(good), _LAYERED))
        layers = _layers(model, [chosen[index] for index in layered], clock.ranks, part)
    activation = ripple = None
    if method.activation:
        with clock.phase("activation"):
            activation = activation_similarity(model, chosen, on_error="nan", **part, **here)
    if options.editing is not None:
        with clock.phase("ripple"):
            ripple = _ripple(model, tokenizer, material, result, options, clock)
    return Findings(material.source, result, statistics, scores, layers, layered, activation, ripple)


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
    # Readiness tells it, with what to do.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ripple_effects: ")
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
            measure=method.tokens,
            progress=clock.progress,
            split_over_ranks=clock.ranks.size > 1,
        )


def _layers(
    model: nn.Module, pieces: Sequence[KnowledgePiece], ranks: Replicas, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Norms by block, a share of the pieces on each process."""
    share = ranks.share(pieces)
    parts = ranks.gather_objects(layer_gradient_norms(model, share, **options) if share else {})
    columns = {block: torch.empty(len(pieces), dtype=torch.float64) for block in parts[0]}
    for rank, part in enumerate(parts):
        for block, values in part.items():
            columns[block][rank :: ranks.size] = values
    return columns


def _scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chosen: Sequence[KnowledgePiece],
    good: Sequence[int],
    ranks: Replicas,
) -> PieceScores:
    # Without the end: a model that was never taught to stop knows its answers all the same.
    encoding = Encoding(tokenizer, template, "answer", _BATCH_SIZE, next(model.parameters()).device)
    batches = encoding.batches(encoding.samples([chosen[index] for index in good]))
    # Whole batches, so that each is padded as by one process.
    start, end = (rank * len(batches) // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    with preserved(model):
        own = score_pieces(model, batches[start:end]) if end > start else None
    scores = PieceScores.joined([part for part in ranks.gather_objects(own) if part is not None])
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


@dataclass
class Clock:
    """Seconds of each phase, and what the console says meanwhile.

    Args:
        status: Of the console; None says nothing.
        ranks: This process among those that share the work.
        seconds: By phase.
    """

    status: Status | None = None
    ranks: Replicas = field(default_factory=Replicas)
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


_COLUMNS = ("id", "question", "answer", "category", "group", "hop")
# Pairs that are gathered before they are sorted.
_WAITING = 200_000
# A spreadsheet runs what begins so.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, eq=False)
class StrongPairs:
    """Pairs of pieces, the most coupled first.

    Args:
        first: Numbers of pieces, ``[P]``.
        second: Likewise, larger than ``first``.
        cosine: ``[P]``.
        above: Pairs from the threshold on, listed or not.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float64]
    above: int

    def __len__(self) -> int:
        return len(self.first)


def strong_pairs(result: CouplingResult, threshold: float, *, least: int = 100, most: int = 100_000) -> StrongPairs:
    """All pairs from a threshold on, or the strongest where those are too few or too many.

    Args:
        result: Pieces that failed take no part.
        threshold: A cosine.
        least: List as many even when fewer reach the threshold.
        most: List no more.

    Raises:
        ValueError: The numbers are not in order.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.9], [0.1, 0.9, 1.0]])
        >>> same = {"matrix": matrix, "norms": torch.ones(3), "log_probs": torch.zeros(3), "pieces": ({},) * 3}
        >>> rest = {"failed": (), "parameters": (), "measure": "gradient", "normalize": True, "center": False}
        >>> found = strong_pairs(CouplingResult(**same, **rest, projection=None, projection_error=None, seconds=0), 0.4,
        ...                      least=0, most=1)
        >>> found.first.tolist(), found.second.tolist(), found.above
        ([1], [2], 2)
    """
    if not 0 <= least <= most:
        raise ValueError(f"least and most are numbers of pairs in order; got least={least}, most={most}")
    cosines, good = result.cosines.numpy(), result.valid.numpy()
    kept, waiting, above = np.empty((0, 3)), [], 0  # columns: cosine, first, second
    border = -np.inf if least else threshold
    for at in np.flatnonzero(good):
        row = cosines[at, at + 1 :].astype(np.float64)
        row[~good[at + 1 :]] = np.nan
        above += int((row >= threshold).sum())
        places = np.flatnonzero(row >= border)
        waiting.append(np.column_stack([row[places], np.full(len(places), at), at + 1 + places]))
        if sum(map(len, waiting)) > _WAITING:
            kept, waiting = _sorted([kept, *waiting])[:most], []
            if len(kept) >= least > 0:
                # What is neither among the strongest `least` nor above the threshold is not listed.
                border = min(threshold, kept[least - 1, 0])
            if len(kept) == most > 0:
                border = max(border, kept[-1, 0])
    kept = _sorted([kept, *waiting])[:most]
    kept = kept[: max(least, int((kept[:, 0] >= threshold).sum()))]
    return StrongPairs(kept[:, 1].astype(np.int64), kept[:, 2].astype(np.int64), kept[:, 0], above)


def pair_texts(result: CouplingResult, pairs: StrongPairs, count: int) -> list[dict[str, Any]]:
    """The first pairs with the texts of their pieces and what they share.

    Args:
        result: The pieces.
        pairs: Of that result.
        count: How many.
    """
    columns = (column[:count].tolist() for column in (pairs.first, pairs.second, pairs.cosine))
    return [
        {"cosine": cosine, "first": dict(one), "second": dict(other), "same": shared(one, other)}
        for first, second, cosine in zip(*columns, strict=True)
        for one, other in ((result.pieces[first], result.pieces[second]),)
    ]


def pair_kinds(result: CouplingResult, pairs: StrongPairs, threshold: float) -> list[dict[str, Any]]:
    """How many of the listed pairs above the threshold share something, beside how many of all pairs do.

    Args:
        result: The pieces.
        pairs: Of that result.
        threshold: Listed pairs below it do not count.
    """
    chosen = pairs.cosine >= threshold
    found = []
    for name in CONTRASTS:
        codes = codes_of(result.column(name), fold=name == "answer")
        known = codes[result.valid.numpy()]
        known = known[known >= 0]
        if not len(known):
            continue
        first, second = codes[pairs.first[chosen]], codes[pairs.second[chosen]]
        counts = np.bincount(known).astype(np.float64)
        everywhere, same = len(known) * (len(known) - 1) / 2, float((counts * (counts - 1)).sum() / 2)
        share = float(((first == second) & (first >= 0)).mean()) if chosen.any() else None
        by_chance = same / everywhere if everywhere else None
        found.append({"same": name, "share": share, "share_of_all_pairs": by_chance})
    return found


def write_pairs(result: CouplingResult, pairs: StrongPairs, path: str | Path) -> Path:
    """Writes pairs as CSV, one line each, as spreadsheets and RFC 4180 have it.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.

    Args:
        result: The pieces.
        pairs: Of that result.
        path: Target.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    head = [f"{side}_{name}" for side in ("first", "second") for name in _COLUMNS]
    writer.writerow(["cosine", *head, *(f"same_{name}" for name in CONTRASTS)])
    for first, second, cosine in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.cosine.tolist(), strict=True):
        one, other = result.pieces[first], result.pieces[second]
        cells = [guarded(piece[name]) for piece in (one, other) for name in _COLUMNS]
        same = shared(one, other)
        writer.writerow([f"{cosine:.6f}", *cells, *(int(name in same) for name in CONTRASTS)])
    # CSV can hold half a surrogate pair, which UTF-8 cannot.
    return atomic_write(path, buffer.getvalue().encode("utf-8", "replace"))


def guarded(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula.

    Example:
        >>> guarded("=1+1"), guarded("Lima"), guarded(-1), guarded(None)
        ("'=1+1", 'Lima', -1, '')
    """
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


def shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two pieces have in common, of answer, category and group.

    Example:
        >>> one = {"answer": "Lima ", "category": None, "group": "a"}
        >>> shared(one, {"answer": "lima", "category": None, "group": "b"})
        ['answer']
    """
    both = ((name, one[name], other[name]) for name in CONTRASTS if one[name] is not None)
    return [name for name, *two in both if two[0] == two[1] or (name == "answer" and folded(two[0]) == folded(two[1]))]


def _sorted(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The most coupled first; ties to the smaller numbers."""
    joined = np.concatenate(parts)
    return joined[np.lexsort((joined[:, 2], joined[:, 1], -joined[:, 0]))]


# Cosines from which two gradients are one for all purposes.
_SATURATED = 0.95
_MEASURE = "See what edits do to other answers, predicted and measured: add --edits 10."


def readiness(found: Findings, unknown_tokens: float) -> dict[str, Any]:
    """The verdict, the checks behind it, and what to do next.

    Args:
        found: What was measured.
        unknown_tokens: Share of the pieces whose prompt has a token that the tokenizer does not know.

    Returns:
        ``verdict``, ``summary``, ``checks`` and ``next_steps``.
    """
    checks = _coupling_checks(found, unknown_tokens) + _ripple_checks(found)
    counts = {status: sum(check["status"] == status for check in checks) for status in ("pass", "warn", "fail")}
    verdict = "not ready" if counts["fail"] else "ready with reservations" if counts["warn"] else "ready"
    steps = [check["next_step"] for check in checks if check["status"] != "pass" and check["next_step"]]
    doubts = [check["meaning"] for check in checks if check["status"] in ("fail", "warn")]
    summary = (
        f"{counts['pass']} of {len(checks)} checks passed, {counts['warn']} call for caution, {counts['fail']} failed. "
        + (f"First: {doubts[0]}" if doubts else "The numbers can be read as they are.")
    )
    return {"verdict": verdict, "summary": summary, "checks": checks, "next_steps": list(dict.fromkeys(steps))}


def layer_error(found: Findings) -> float | None:
    """Largest relative difference between norms of the coupling and of plain backward passes."""
    if found.result.center or not found.layered:
        return None
    plain = torch.stack(list(found.layers.values())).square().sum(dim=0).sqrt()
    fast = found.result.norms[list(found.layered)]
    return float(((fast - plain).abs() / plain).max())


def saturated_share(found: Findings) -> float | None:
    """Share of the pairs whose cosine is at least 0.95."""
    cosines = found.result.cosines.numpy()
    good = found.result.valid.numpy()
    high = sum(int((row[at + 1 :] >= _SATURATED).sum()) for at, row in enumerate(cosines) if good[at])
    return high / found.statistics.n_pairs if found.statistics.n_pairs else None


def _coupling_checks(found: Findings, unknown_tokens: float) -> list[dict[str, Any]]:
    unknown = _check(
        "share of prompts with unknown tokens", unknown_tokens, "at most", 0.0, fail_at=0.5,
        meaning="The tokenizer reads words of these prompts as unknown, so different questions look the same.",
        next_step="Use the model's own tokenizer, and a --template in words that it knows.",
    )  # fmt: skip
    return [*_piece_checks(found), *_gradient_checks(found), unknown]


def _piece_checks(found: Findings) -> list[dict[str, Any]]:
    """Of how many pieces the couplings are, and whether the model knows them."""
    result, statistics = found.result, found.statistics
    return [
        _check(
            "pieces", statistics.n_pieces, "at least", 50, fail_at=3,
            meaning="Pieces that were compared. Means over few pairs move with every piece that is added.",
            next_step="Take more pieces: a larger --n-pieces, or more records.",
        ),
        _check(
            "share of failed pieces", statistics.n_failed / len(result), "at most", 0.01, fail_at=0.2,
            meaning="Pieces that have no row: they could not be tokenised or run, or their gradient is zero.",
            next_step="Look at knowledge_pieces.failed for the reasons, and leave those pieces out or mend them.",
        ),
        _check(
            "share of answers the model knows", found.known_share, "at least", 0.5, fail_at=0.05,
            meaning="Answers whose every token is the most probable one. The gradient of an answer that the model does "
            "not know tells how it would be learned, not how it is stored.",
            next_step="Check --template and --form (the prompt that the model was trained on), or keep to pieces that "
            "the model knows: knowledge_pieces.pieces says which.",
        ),
    ]  # fmt: skip


def _gradient_checks(found: Findings) -> list[dict[str, Any]]:
    """Whether cosines tell pieces apart, and are those of plain backward passes."""
    result, statistics = found.result, found.statistics
    norms = result.norms[result.valid].numpy()
    return [
        _check(
            "share of saturated pairs", saturated_share(found), "at most", 0.01, fail_at=0.25,
            meaning=f"Pairs with a cosine of {_SATURATED} or more: one gradient in two pieces, as of paraphrases or of "
            "one answer to alike questions. They say nothing that is not in the texts.",
            next_step="Look at pairs.csv: leave repeated answers out, or compare other tensors with --select or "
            "--layers.",
        ),
        _check(
            "mean cosine", statistics.mean, "at most", 0.3,
            meaning="A direction that all gradients share, such as that of the answer's form or of the end-of-text "
            "token, couples everything with everything.",
            next_step="Use --center, which subtracts the mean gradient.",
        ),
        _check(
            "smallest over median gradient norm", float(norms.min() / np.median(norms)) if len(norms) else None,
            "at least", 1e-4,
            meaning="Where the model is sure of an answer its gradient vanishes, and what is left of it may be "
            "rounding.",
            next_step="Do not read couplings of the pieces in gradient_analysis.smallest, or use --dtype float32.",
        ),
        _check(
            "error of a cosine by the projection", result.projection_error or 0.0, "at most", 0.05, fail_at=0.2,
            meaning="Bound on the root mean square error that the random projection makes; 0 without one.",
            next_step="Raise --projection fourfold to halve it, or leave it out.",
        ),
        _check(
            "norms against plain backward passes", layer_error(found), "at most", 1e-3, fail_at=0.05,
            meaning="Largest relative difference over the pieces that were differentiated one by one as well.",
            next_step="Use --dtype float32; if the difference stays, this model uses its weights in a way that is not "
            "understood, and the couplings are not to be trusted.",
        ),
    ]  # fmt: skip


def _ripple_checks(found: Findings) -> list[dict[str, Any]]:
    ripple = found.ripple
    spearman = None if ripple is None else ripple.agreement("first_order")[0].metrics()["spearman"]
    return [
        _check(
            "rank correlation of predicted and measured changes", spearman, "at least", 0.5,
            meaning="Whether gradients predict what an edit did to the other pieces.",
            next_step=_MEASURE if ripple is None else "Try a smaller --learning-rate: if the correlation rises, the "
            "edits were no small steps, and cosines do not describe them.",
        ),
        _check(
            "share of edits that are small steps", None if ripple is None else float(ripple.linear.double().mean()),
            "at least", 0.9,
            meaning="Edits whose measured changes have a slope of 0.8 to 1.25 on the predicted ones"
            f"{f': {ripple.warning()}' if ripple is not None and ripple.warning() else ''}.",
            next_step=_MEASURE if ripple is None else "Lower --learning-rate, or leave it out: gradient_step halves "
            "its own until the slope is within.",
        ),
        _check(
            "share of edits that were learned", None if ripple is None else float(ripple.new_exact.double().mean()),
            "at least", 0.5,
            meaning="Edits whose new answer is the most probable one afterwards. Ripples of an edit that was not "
            "learned are those of a nudge.",
            next_step=_MEASURE if ripple is None else "Raise --learning-rate, or use --editor finetune with more "
            "--steps, until the new answers are learned; see then whether the prediction still holds.",
        ),
    ]  # fmt: skip


def _check(
    name: str,
    value: float | None,
    rule: Literal["at least", "at most"],
    threshold: float,
    *,
    fail_at: float | None = None,
    **texts: str,
) -> dict[str, Any]:
    sign = 1 if rule == "at least" else -1
    status = "pass"
    if value is None:
        status = "not measured"
    elif fail_at is not None and sign * value < sign * fail_at:
        status = "fail"
    elif sign * value < sign * threshold:
        status = "warn"
    limits = {"rule": rule, "threshold": threshold, "fail_threshold": fail_at}
    return {"check": name, "value": value, **limits, "status": status, **texts}
