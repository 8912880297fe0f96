"""The cost of each analysis, from its settings and the shapes alone: nothing is run and nothing allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_goldy.analysis.forecast.plan import VOTED, Forecast, Passes, Plan, Work, passes_over
from lightning_goldy.analysis.golden import SINGLE_SHOTS, scoring_rounds, watched_elements
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import randomised_bytes, randomised_operations, refined_operations


def mask_bytes(numel: int, top_k_percent: float) -> int:
    """Bytes of a mask in its file, at most: a bit per element, or indices where fewer than 1 in 32 are marked.

    Example:
        >>> mask_bytes(3200, 5.0), mask_bytes(3200, 1.0)
        (400, 128)
    """
    marked = int(numel * top_k_percent / 100)
    return 4 * marked if 32 * marked < numel else numel // 8


# Bytes of an element while its votes are compared, and of each sample's row or column while it is left out.
_COMPARED, _LEFT_OUT = 2, 48


def forecast_golden(
    plan: Plan,
    space: ParameterSpace,
    n_samples: int | None,
    *,
    top_k_percent: float = 5.0,
    whole: bool = False,
    control: bool = False,
) -> Forecast:
    """Golden parameters: a gradient per sample, a selection out of each, and the null of every matrix.

    Args:
        plan: The shapes.
        space: The parameters whose elements may be marked.
        n_samples: Samples that vote.
        top_k_percent: That each marks, percent; no more than that is golden at a quorum of one half or more.
        whole: Whether all gradients of a sample are held at once, as ``scope="global"`` and sharded ones are.
        control: Whether random tokens are looked at too.
    """
    passes, elements = (2 if control else 1) * plan.single(n_samples), plan.elements(space)
    voters = passes.samples // (2 if control else 1)
    matrices = [math.prod(shape) for shape in space.shapes if len(shape) > 1]
    work = Work(
        backward=passes,
        elements=VOTED * elements * passes.samples,
        selected=1.0 * elements * passes.samples,
        nulls=(2.0 if control else 1.0) * sum(matrices),
        watched=1.0 * passes.samples * sum(watched_elements(numel, max(1, voters)) for numel in matrices),
    )
    vote = 1 if voters < 256 else 2
    tokens = max((length for _, length in plan.batches(n_samples)), default=0)
    # Each gradient is freed as it becomes votes; those that are selected among together, and those of shards, are not.
    gradients = (4 + 1) * elements if whole else plan.bytes(space) * (plan.shards > 1)
    # Eight marks a byte, and places of eight elements where not all are watched.
    watched = [watched_elements(numel, max(1, voters)) for numel in matrices]
    places = sum(part for part, numel in zip(watched, matrices, strict=True) if part < numel)
    # The votes of one set of samples, beside what is golden of the one before, and a tied matrix's gradients and their
    # sum; or what leaving out each sample makes of one tensor.
    held = elements * (vote + control) + sum(watched) * voters // 8 + places
    passing = gradients + 12 * plan.largest(space) // plan.shards + plan.graph(tokens)
    sides = (shape[0] + math.prod(shape[1:]) for shape in space.shapes if len(shape) > 1)
    leaving = max(_COMPARED * max(matrices, default=0), _LEFT_OUT * voters * max(sides, default=0))
    return Forecast(
        work,
        parts=max(1, passes.samples),
        memory=held + max(passing, leaving),
        kept=space.numel,
        disk=mask_bytes(space.numel, top_k_percent),
        communicated=plan.communicated(work, summed=elements * vote, gathered=space.numel),
        sharded="votes are divided by the shards; the mask, one byte per element, is whole on every rank",
        bounded=True,
    )


@dataclass(frozen=True)
class ReverseSettings:
    """What of a reverse golden search decides its cost.

    Args:
        rounds: At most.
        growing: Rounds in which the mask grows.
        scores: Single-shot scores.
        exchanging: Whether elements are exchanged, as by every strategy but ``none``.
        anchored: Passes of one divergence: 2 without a cache.
        chunk_size: Samples of one pass.
        top_k_percent: The budget of the mask, percent.
        alone: Elements that are measured one by one.
    """

    rounds: int
    growing: int
    scores: int
    exchanging: bool
    anchored: int = 1
    chunk_size: int | None = None
    top_k_percent: float = 1.0
    alone: int = 0

    @classmethod
    def of(
        cls,
        rounds: int,
        score: str,
        strategy: str,
        *,
        cache: str,
        chunk_size: int | None,
        top_k_percent: float,
        alone: int = 0,
    ) -> ReverseSettings:
        """From those of a search, of which 0.7 of the rounds, and 11 at most, let the mask grow."""
        exchanging = strategy != "none"
        growing = min(_GROWING, max(1, math.ceil(_GROWTH * rounds)) if exchanging else rounds)
        scores = 3 + (score not in ("gradient", "taylor", "fisher"))
        anchored = 2 if cache == "none" else 1
        rounds = rounds if exchanging else growing
        # Measuring one by one starts from a gradient, which growth leaves no round for where it takes them all.
        alone = alone if exchanging and rounds > growing else 0
        return cls(rounds, growing, scores, exchanging, anchored, chunk_size, top_k_percent, alone)


_GROWTH, _GROWING = 0.7, 11
# Copies of the parameters, in float32, that a search holds at its largest; one less where scores are summed in turn.
_REVERSE_COPIES = 3


def forecast_reverse(plan: Plan, space: ParameterSpace, n_samples: int, settings: ReverseSettings) -> Forecast:
    """Reverse golden parameters: rounds of a gradient and of trials on half of the samples."""
    choosing, measuring = _halves(plan.batches(n_samples))
    choose, held = (passes_over(_chunked(part, settings.chunk_size)) for part in (choosing, measuring))
    names = (*SINGLE_SHOTS, *("another",) * (settings.scores - len(SINGLE_SHOTS)))
    sums = len(scoring_rounds(space.numel, names))
    scored, runs = sums * passes_over(_chunked(choosing, 1)), settings.anchored
    trials = settings.growing * (2 if settings.exchanging else 1) + 2 * (settings.rounds - settings.growing)
    trials += settings.alone
    forward = (1 + runs * (settings.scores + 1 + trials)) * choose + (1 + runs * (settings.scores + 1)) * held
    forward += (runs - 1) * settings.rounds * choose
    elements = plan.elements(space)
    # All scores are looked through once for each single shot and once a round; trials take from what that found.
    starts, trials = settings.scores + 1, trials - settings.alone
    work = Work(
        forward=forward,
        backward=settings.rounds * choose + scored,
        elements=elements * (5.0 * (settings.scores + starts) + 9.0 * settings.rounds + 1.0 * trials),
        selected=elements * (2.0 * starts + 3.0 * settings.rounds + 0.5 * trials),
    )
    logits = plan.logits(choose.tokens + held.tokens) if runs == 1 else plan.bytes()
    widest = max((rows * tokens for rows, tokens in _chunked(choosing, settings.chunk_size)), default=0)
    return Forecast(
        work,
        parts=max(1, choose.calls),
        memory=4 * (_REVERSE_COPIES - (sums > 1)) * elements + logits + plan.graph(widest),
        kept=space.numel,
        disk=mask_bytes(space.numel, settings.top_k_percent),
        communicated=plan.communicated(work, summed=4 * elements * (settings.rounds + 2), gathered=space.numel),
        sharded="scores are divided by the shards; the mask, one byte per element, is whole on every rank",
        exact=not settings.exchanging,
    )


def _halves(batches: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    left = (sum(rows for rows, _ in batches) + 1) // 2
    first, second = [], []
    for rows, tokens in batches:
        take = min(rows, left)
        left -= take
        first += [(take, tokens)] if take else []
        second += [(rows - take, tokens)] if take < rows else []
    return first, second


def _chunked(batches: Iterable[tuple[int, int]], size: int | None) -> list[tuple[int, int]]:
    return [
        (min(size or rows, rows - start), tokens)
        for rows, tokens in batches
        for start in range(0, rows, size or max(1, rows))
    ]


def forecast_attribution(
    plan: Plan,
    *,
    n_samples: int,
    nodes: int,
    n_shares: int,
    masked: int,
    factors: int,
    first: bool,
    n_collateral: int,
    learned: int = 0,
    blocks: int = 0,
    searched: int = 0,
    found: int = 0,
    beside: int = 0,
    draws: int = 0,
) -> Forecast:
    """Change attribution with ``auto`` nodes at their least, and the grafts that test it.

    Args:
        plan: The shapes.
        n_samples: Half of which score, half are held out where anything is grafted.
        nodes: Of the quadrature.
        n_shares: Shares that are grafted; none for no grafts.
        masked: Methods that graft each share, attribution among them.
        factors: Interpolations.
        first: Whether the first order at the base is among the methods.
        n_collateral: Samples of other text, taken to be as long as the probe's.
        learned: Steps in which the mask of each share is learned; 0 where none is.
        blocks: Whose change is measured alone, and left out of the whole; 0 where none is.
        searched: Grafts that the greedy search of blocks tries; 0 where none is made.
        found: Grafts that this search finds, each a share of its own.
        beside: Methods that take as many elements as each of these.
        draws: Further draws of random elements for each share, of which harm is not measured.
    """
    elements, batches = plan.elements(), plan.batches(n_samples)
    scored, held = _halves(batches) if n_shares else (batches, [])
    score, hold = passes_over(scored), passes_over(held)
    other = passes_over(plan.batches(n_collateral)) if n_shares else passes_over([])
    points = n_shares * masked + found * (1 + beside) + factors if n_shares else 0
    # A step of learning takes an eighth of the samples, and of the other text; it is tried in full five times.
    taught = n_shares * learned / 8
    tried = 5 * n_shares * bool(learned)
    work = Work(
        forward=(2 + 2 * first + 2 * blocks + tried + searched) * score
        + (3 + points + (n_shares + found) * draws) * hold
        + (4 + 2 * points + tried) * other,
        backward=(nodes + first + round(taught)) * score + round(taught) * other,
        elements=elements * (6.0 * nodes * max(8, score.calls) + 4.0 * points + 12.0 * n_shares * learned),
        selected=2.0 * elements * (n_shares * (masked + learned + draws) + found * (beside + draws)),
    )
    widest = max((rows * tokens for rows, tokens in batches), default=0)
    return Forecast(
        work,
        parts=max(1, score.calls),
        memory=plan.bytes() + 4 * elements + 2 * elements + plan.graph(widest),
        kept=0,
        disk=plan.space.numel // 8,
        communicated=plan.communicated(work, summed=4 * elements, gathered=plan.space.numel),
        sharded="values and the accumulator are divided by the shards; one byte per element is whole on every rank",
        exact=False,
    )


# Directions that are read of each layer beside the mean of each position, and cubes of a decomposition of rows.
_PRINCIPAL, _DECOMPOSED = 3, 1.5


def forecast_activations(
    plan: Plan, *, n_samples: int, layers: int, positions: int, prompts: int, new_tokens: int
) -> Forecast:
    """Two forward passes over the unrelated text, what it tells read through the unembedding, and steered texts.

    Args:
        plan: The shapes; without ``texts`` they are taken to be as long as the probe's.
        n_samples: Texts.
        layers: That are read.
        positions: Told apart.
        prompts: That are continued, each by up to 8 strengths of two models.
        new_tokens: Of a continuation.
    """
    batches = plan.batches(n_samples, texts=True)
    passes = 2 * passes_over(batches)
    written = passes_over([(1, 1)] * (16 * prompts * new_tokens))
    widest = max((rows * tokens for rows, tokens in batches), default=0)
    read, logits = layers * (positions + 1 + _PRINCIPAL), plan.vocabulary * (passes.tokens // 2)
    short, long = sorted((positions * passes.samples // 2, plan.width))
    work = Work(
        forward=passes + written,
        elements=2.0 * plan.elements() * max(1, passes.calls) + logits + plan.vocabulary * read,
        flops=2.0 * plan.vocabulary * plan.width * read,
        cubes=_DECOMPOSED * layers * long * short**2,
    )
    return Forecast(
        work,
        parts=max(1, passes.calls),
        memory=plan.bytes() + 2 * plan.logits(widest) + plan.graph(widest),
        communicated=plan.communicated(work),
        sharded="values are divided by the shards; residual streams are whole on every rank",
        exact=False,
    )


# Elements of a batch below which an expansion cuts it no further.
_TAYLOR_PART = 256


def forecast_taylor(
    plan: Plan, orders: Sequence[int], *, shares: bool, function_space: bool, n_samples: int | None, keeps_base: bool
) -> Forecast:
    """A Taylor expansion: forward mode along the step, or differences where the model is sharded.

    Args:
        plan: The shapes.
        orders: Of the expansion.
        shares: Whether changes are attributed.
        function_space: Whether logits are expanded.
        n_samples: Samples of the loss.
        keeps_base: Whether the callback keeps a base of its own.
    """
    batches, highest = plan.batches(n_samples), max(orders)
    parts = 2 ** (highest + shares) if plan.divisible else 1
    pieces = [part for rows, tokens in batches for part in _worthwhile(rows, tokens, parts)]
    cut, shared = passes_over(pieces), shares and function_space and not plan.own_loss
    if plan.shards > 1:
        work = _taylor_by_differences(plan, batches, highest, shares=shares, function_space=function_space)
    else:
        logits = function_space or not plan.own_loss
        lines = logits + plan.own_loss
        work = Work(
            forward=(logits + plan.own_loss) * cut,
            tangent=lines * cut,
            order=highest,
            # Both gradients are of one forward pass where the loss is that of the logits.
            backward=(shares * (1 + function_space - shared)) * cut,
            again=int(shared) * cut,
            elements=(6.0 * shares * (1 + function_space)) * plan.elements() * cut.calls,
        )
    elements = plan.elements()
    rows = max((part * tokens for part, tokens in pieces), default=0)
    carried = max(2**highest * plan.logits(rows), plan.graph(rows) if shares else 0)
    return Forecast(
        work,
        parts=max(1, len(batches)),
        memory=plan.bytes() + 4 * elements * (1 + 2 * shares) + 2 * carried,
        kept=plan.bytes() * keeps_base,
        disk_checkpoint=plan.shards * plan.bytes() * keeps_base,
        communicated=plan.communicated(work, summed=4 * elements * shares),
        sharded="base, step and gradient are divided by the shards",
    )


def _worthwhile(rows: int, tokens: int, count: int) -> list[tuple[int, int]]:
    """The parts of a batch that are not too small to pay for another pass over the weights."""
    return _parts(rows, tokens, min(count, max(1, rows * tokens // _TAYLOR_PART)))


def _parts(rows: int, tokens: int, count: int) -> list[tuple[int, int]]:
    count = min(rows, count)
    return [(rows // count + (place < rows % count), tokens) for place in range(count)]


def _taylor_by_differences(
    plan: Plan, batches: Sequence[tuple[int, int]], highest: int, *, shares: bool, function_space: bool
) -> Work:
    """The present loss, the gradient at the base, four more beside it, and logits at five places."""
    count = 2**highest if plan.divisible else 1
    whole = passes_over(batches)
    cut = passes_over([part for rows, tokens in batches for part in _parts(rows, tokens, count)])
    backward = whole * (1 + 4 * (highest > 1)) + cut * (function_space and shares)
    elements = 8.0 * plan.elements() * backward.calls
    return Work(forward=whole + 6 * function_space * cut, backward=backward, elements=elements)


# Bytes from which on the system's allocator gives back what is freed.
_GIVEN_BACK = 32 << 20
# What the statistics of one layer's patterns take at least, in elements.
_LAYER = 2e6
# Elements that one parameter takes as long as when another model's values take its place and give it back.
_SWAP = 2.0


def forecast_attention(
    plan: Plan, *, n_samples: int | None, prompts: int, max_tokens: int, drift: bool, memory: int
) -> Forecast:
    """Attention statistics of the probe, and the patterns of prompts, with the base's where there is one.

    Args:
        plan: The shapes.
        n_samples: Samples of the statistics.
        prompts: Whose patterns are shown.
        max_tokens: Of a prompt.
        drift: Whether the base is compared with.
        memory: Bytes that the base's patterns may fill.
    """
    forward, patterns = Passes(), 0
    for rows, tokens in plan.batches(n_samples):
        one = 4 * plan.n_heads * tokens * tokens
        size = max(1, memory // (one * plan.n_layers)) if drift else rows
        for piece, length in _chunked([(rows, tokens)], size):
            groups = -(-plan.n_layers // max(1, memory // (piece * one))) if drift else 1
            forward += (groups * (1 + drift)) * Passes(piece, 1, piece * length)
            patterns += piece * plan.n_layers * plan.n_heads * length * length
    length = min([max_tokens, *(tokens for _, tokens in plan.rows)])
    shown = prompts * (1 + drift) * plan.replicas * Passes(1, 1, length)
    work = Work(
        forward=forward + shown,
        elements=(60.0 if drift else 30.0) * patterns
        + _LAYER * plan.n_layers * forward.calls
        + drift * _SWAP * plan.elements() * (forward.calls + shown.calls) / 2,
    )
    largest = max((rows * tokens * tokens for rows, tokens in plan.batches(n_samples)), default=0)
    held = min(memory, 4 * plan.n_heads * plan.n_layers * largest) if drift else 0
    # Those of the targets are copied out of all; of a pass before, what was freed may not be given back.
    logits = plan.logits(plan.widest(n_samples))
    logits *= 3 if logits < _GIVEN_BACK else 2
    return Forecast(
        work,
        parts=max(1, forward.calls),
        memory=held + 12 * 4 * plan.n_heads * largest + logits + plan.bytes() * drift,
        communicated=plan.communicated(work),
        sharded="the base is divided by the shards; patterns are whole on every rank",
    )


@dataclass(frozen=True)
class BasinSettings:
    """What of a volume estimate decides its cost.

    Args:
        n_directions: Per volume.
        cutoffs: Volumes per split.
        splits: Sets of samples.
        proposals: Volumes of which the best is taken.
        preconditioned: Whether directions pass a preconditioner.
        fisher: Whether Kronecker factors are taken.
        n_samples: Of each split.
        max_tokens: Of each sample.
        cached: Whether the anchor's predictions are kept.
    """

    n_directions: int
    cutoffs: int = 1
    splits: int = 1
    proposals: int = 1
    preconditioned: bool = False
    fisher: bool = False
    n_samples: int | None = None
    max_tokens: int | None = None
    cached: bool = True


# Evaluations per direction, and of the pilot beyond.
_EVALUATIONS, _PILOT = 2, 3
# Elements that one parameter takes as long as when a direction is put on it, and when one is turned to.
_MOVE, _TURN = 2.0, 4.0


def forecast_basin(plan: Plan, space: ParameterSpace, settings: BasinSettings) -> Forecast:
    """Basin volumes: the anchor's predictions, then two evaluations per direction and some for the first."""
    batches = [(rows, min(tokens, settings.max_tokens or tokens)) for rows, tokens in plan.batches(settings.n_samples)]
    once, first = passes_over(batches), passes_over(batches[:1])
    volumes = settings.cutoffs * settings.splits
    evaluations = settings.proposals * (_EVALUATIONS * settings.n_directions + _PILOT)
    runs = 1 if settings.cached else 2
    forward = volumes * ((1 + runs * evaluations) * once + runs * settings.proposals * first)
    heavier, turns = (2.0 if settings.preconditioned else 1.0), settings.proposals * settings.n_directions
    work = Work(
        forward=forward,
        backward=settings.splits * settings.fisher * once,
        elements=volumes * heavier * (_MOVE * evaluations + _TURN * turns) * plan.elements(space),
        normals=1.0 * volumes * (evaluations + turns) * plan.elements(space),
    )
    kept = plan.logits(once.tokens) if settings.cached else plan.bytes()
    widest = max((rows * tokens for rows, tokens in batches), default=0)
    memory = 3 * plan.bytes(space) // 2 + kept + 3 * plan.logits(widest) + 8 * plan.largest(space) // plan.shards
    return Forecast(
        work,
        parts=settings.n_directions,
        memory=memory + 4 * plan.elements(space) * (settings.preconditioned + settings.fisher),
        communicated=plan.communicated(work),
        sharded="the anchor's values are divided by the shards; its predictions are whole on every rank",
        exact=False,
    )


# Draws of the labels that the curvature of a bridge is of, and timed elements per parameter of a chain's step.
_FISHER_DRAWS, _STEPPED = 4, 40.0
# Copies of what moves that a chain holds, and as many beside all chains, as measured.
_HELD = 31


def forecast_bridge(
    plan: Plan, space: ParameterSpace, settings: BasinSettings, *, max_gradients: int, chains: int
) -> Forecast:
    """What bridges take beside the rays of one firing: the curvature, and gradients of the whole probe on all chains.

    Args:
        plan: The shapes.
        space: The parameters that move.
        settings: Of the volumes, one bridge each.
        max_gradients: Of each, which it makes where its Gaussian alone is not good enough.
        chains: Of each, which replicas share.
    """
    batches = [(rows, min(tokens, settings.max_tokens or tokens)) for rows, tokens in plan.batches(settings.n_samples)]
    once, walks = passes_over(batches), settings.cutoffs * settings.splits
    sides = [(shape[0], shape[1]) for shape in space.shapes if len(shape) == 2 and max(shape) < plan.vocabulary]
    # In and out of the eigenbasis, in the precision of the weights, which is twice as fast as what is timed.
    turned = sum(2.0 * rows * columns * (rows + columns) for rows, columns in sides)
    work = Work(
        forward=2 * walks * once,
        backward=walks * (max_gradients + _FISHER_DRAWS) * once,
        elements=_STEPPED * walks * max_gradients * space.numel,
        flops=walks * max_gradients * turned,
        cubes=1.0 * walks * sum(rows**3 + columns**3 for rows, columns in sides),
    )
    held = _HELD * (1 + -(-chains // plan.replicas)) * plan.bytes(space)
    return Forecast(work, memory=held + plan.graph(plan.widest(settings.n_samples)))


def forecast_coupling(plan: Plan, parameters: ParameterSpace, n_pieces: int, *, keeps_base: bool) -> Forecast:
    """Coupling of pieces now and at the base, and what the finetune did to each.

    Args:
        plan: The shapes.
        parameters: Whose gradients are compared.
        n_pieces: Pieces.
        keeps_base: Whether the callback keeps a base of its own.
    """
    tokens, batch = plan.piece_tokens, 16
    widths = sum(sum(shape) for shape in parameters.shapes if len(shape) == 2)
    per_pass = min(n_pieces, max(1, int((128 << 20) / max(1.0, plan.activations * tokens))))
    # Every replica tries a first piece.
    tried = plan.replicas * Passes(1, 1, tokens)
    gradients = passes_over(_chunked([(n_pieces, tokens)], per_pass)) + tried
    scores = passes_over(_chunked([(n_pieces, tokens)], batch))
    flops = n_pieces * (n_pieces + 1) / 2 * tokens**2 * widths * 2
    once = Work(backward=gradients, flops=flops / 2)
    ripple = Work(forward=2 * scores, tangent=scores + tried, order=1, elements=8.0 * plan.elements())
    if plan.shards > 1:  # a backward pass per piece in the place of forward mode
        ripple = Work(forward=2 * scores, backward=n_pieces * Passes(1, 1, tokens), elements=4.0 * plan.elements())
    work = once + ripple
    rows = 4 * widths * tokens * n_pieces
    return Forecast(
        work,
        once=once,
        parts=max(1, scores.calls),
        memory=plan.bytes() + 8 * plan.elements() + rows + plan.graph(per_pass * tokens),
        kept=plan.bytes() * keeps_base,
        disk=8 * n_pieces * n_pieces,
        disk_once=plan.base_bytes * keeps_base,
        communicated=plan.communicated(work, summed=8 * n_pieces * n_pieces + rows),
        sharded="base and step are divided by the shards; the pieces' rows are whole on every rank",
    )


# Timed elements per parameter until the file of a base is written, packed, with its fingerprint.
_BASE_WRITTEN = 20.0
# Bytes of the pieces in which elements are binned, and of what freed tensors leave between others.
_BINNING = 24 << 20


def _largest_bytes(space: ParameterSpace, wide: int, narrow: int) -> int:
    """Bytes of the largest tensor, at so many for each element in float32 and in a narrower dtype."""
    pairs = zip(space.shapes, space.dtypes, strict=True)
    return max((wide if dtype.itemsize > 2 else narrow) * math.prod(shape) for shape, dtype in pairs)


def forecast_change(plan: Plan, *, track_updates: bool) -> Forecast:
    """The base, and the change since: every element is read once, nothing is run.

    Args:
        plan: The shapes.
        track_updates: Whether the values and the update before are kept.
    """
    elements, size = plan.elements(), plan.bytes()
    # The update before is held in bfloat16, or in the parameters' own dtype where that is no wider.
    update = min(size, 2 * elements)
    kept = size + (size + update) * track_updates
    return Forecast(
        Work(elements=(4.0 + 4.0 * track_updates) * elements, binned=1.0 * elements),
        once=Work(elements=_BASE_WRITTEN * elements),
        # The change alone, where base and value are float32 already.
        memory=(size + update) * track_updates + _largest_bytes(plan.space, 4, 12) // plan.shards + _BINNING,
        kept=kept,
        disk_once=plan.base_bytes,
        disk_checkpoint=plan.shards * (size + update) * track_updates,
        sharded="divided by the shards; the base's file is written whole by rank 0",
    )


# Of an eigendecomposition without vectors, the part of one with them; timed elements per parameter that is read.
_VALUES, _READ = 0.5, 12.0
# Of a matrix whose whole spectrum is found its copies in float64, in timed elements: each time, and of the base once.
_COPIED, _COPIED_ONCE = 24.0, 40.0


def forecast_distribution(plan: Plan, *, top: int, exact_below: int | None, intruders: bool = True) -> Forecast:
    """The spectrum of each matrix's change, beside the base's leading directions, found once; nothing is run.

    Args:
        plan: The shapes.
        top: Singular values kept.
        exact_below: Largest side of a matrix whose whole spectrum is computed; None for all.
        intruders: Whether intruder directions are looked for.
    """
    space, of_change, of_base, of_exact, stays = plan.space, 0, 0, 0, 0
    work, once = Work(elements=_READ * space.numel, binned=1.0 * space.numel), Work()
    for shape in space.shapes:
        if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2:
            continue
        short, long = sorted((shape[0], math.prod(shape[1:])))
        if exact_below is None or short <= exact_below:
            each, first = _exact_spectrum(short, long, top, intruders)
            # In float64 itself and its directions twice; of the base all directions stay.
            of_exact = max(of_exact, (16 if intruders else 4) * short * long)
            stays += 4 * intruders * short * long
        else:
            each, first = _randomised_spectrum(short, long, top, intruders)
            of_change = max(of_change, randomised_bytes(short, long, top))
            of_base = max(of_base, randomised_bytes(short, long, (4 if intruders else 1) * top))
        work, once = work + each, once + first
    sides = [shape[0] + math.prod(shape[1:]) for shape in space.shapes if len(shape) > 1]
    return Forecast(
        work,
        once=once,
        parts=len(space),
        # The change, the changed weight and its decomposition, the directions that stay; what was freed before and is
        # not given back.
        memory=_largest_bytes(space, 8, 16)
        + max(of_change, of_exact)
        + stays
        + 4 * sum(sides) * top * (4 if intruders else 1)
        + sum(part for part in (_largest_bytes(space, 4, 4), of_base) if part < _GIVEN_BACK),
        communicated=plan.communicated(Work(), gathered=8 * space.numel),
        sharded="one tensor at a time is whole on every rank",
    )


def _exact_spectrum(short: int, long: int, top: int, intruders: bool) -> tuple[Work, Work]:
    """Of a matrix that is decomposed whole, each time and once.

    That is the change, and where intruders are looked for the weight as it is and a random change; the base once.
    """
    known = min(short, long) if intruders else top
    work = Work(
        elements=_COPIED * intruders * short * long,
        flops=2.0 * long * (3 * short**2 + 2 * top * short) if intruders else 2.0 * long * short**2,
        cubes=(2 + _VALUES if intruders else _VALUES) * short**3,
        normals=1.0 * intruders * short * long,
    )
    again = _COPIED_ONCE * intruders * short * long
    return work, Work(elements=again, flops=2.0 * long * (short**2 + known * short), cubes=1.0 * short**3)


def _randomised_spectrum(short: int, long: int, top: int, intruders: bool) -> tuple[Work, Work]:
    """Of a matrix of which the leading directions alone are found, each time and once.

    That is from the directions of the base and of the change; the null of a gentle change is told from products of the
    base, for which few normals are drawn. Of a change that is not gentle the present weight and one with a random
    change are decomposed anew, of a gentle one neither: one of both is told.
    """
    present, chance = (refined_operations(short, long, many, top) for many in (3 * top, 5 * top // 2))
    work = Work(
        factored=(1 + intruders) * randomised_operations(short, long, top) + intruders * present,
        normals=0.5 * intruders * short * long,
    )
    once = Work(
        factored=randomised_operations(short, long, (4 if intruders else 1) * top) + intruders * chance,
        normals=4.0 * intruders * top * (short + long),
    )
    return work, once


def forecast_losses(plan: Plan, n_samples: int | None, variants: int) -> Forecast:
    """The probe's loss under each of several models."""
    work = Work(forward=variants * plan.whole(n_samples))
    parts = max(1, len(plan.batches(n_samples)))
    return Forecast(work, parts=parts, memory=3 * plan.logits(plan.widest(n_samples)))


def forecast_heads(plan: Plan, *, n_samples: int | None, gradients: int) -> Forecast:
    """Head pruning: scores before each cut, and losses before and after it.

    Args:
        plan: The shapes.
        n_samples: Samples of scores and losses.
        gradients: Backward passes over the samples that each takes.
    """
    whole = plan.whole(n_samples)
    each = Work(forward=4 * whole, backward=gradients * whole)
    return Forecast(
        each,
        parts=max(1, whole.calls),
        memory=plan.graph(plan.widest(n_samples)),
        kept=plan.bytes(),
        disk_checkpoint=plan.shards * plan.bytes(),
        communicated=plan.communicated(each),
        exact=False,
    )


def forecast_circuits(
    plan: Plan, *, n_pairs: int, tokens: int, gradients: int, circuits: int, batch_size: int, searches: int = 1
) -> Forecast:
    """Circuits: passes over pairs of prompts for the scores, and a patched pass per circuit that is measured.

    Args:
        plan: The shapes.
        n_pairs: Pairs of prompts.
        tokens: Of a prompt.
        gradients: Gradient passes per pair.
        circuits: That are measured.
        batch_size: Pairs per pass.
        searches: Circuits that are looked for.
    """
    rows = [min(batch_size, n_pairs - start) for start in range(0, n_pairs, batch_size)]
    once = passes_over([(size, tokens) for size in rows])
    # Both prompts for the scores, and both with everything patched for the two ends of each measurement.
    work = Work(forward=((2 + 3) * searches + 3 + circuits) * once, backward=gradients * searches * once)
    widest = tokens * min(batch_size, n_pairs)
    return Forecast(
        work,
        parts=1,
        memory=3 * plan.graph(widest),
        communicated=plan.communicated(work),
        sharded="a sharded model's circuits are not found",
        exact=False,
    )
