"""What analyses will cost: passes and arithmetic, the shapes that they follow from, the schedule of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.sharding import local
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import packed_share

# What a second is told per, and the amount of it that some work has.
_ARITHMETIC = {
    "element": "elements",
    "selected": "selected",
    "flop": "flops",
    "normal": "normals",
    "binned": "binned",
    "cube": "cubes",
    "factored": "factored",
    "null": "nulls",
    "watched": "watched",
}
# Timed elements that one element of a gradient takes as long as until it is a vote, beside its selection.
VOTED = 2.0
# A sample of values tells what they take packed to less than this.
_PACKED = 1.03
# Evaluation forwards that a pass of nested forward mode takes as long as, by order.
_TANGENT_FORWARDS = {0: 1.0, 1: 4.0, 2: 11.0, 3: 35.0}


@dataclass(frozen=True)
class Passes:
    """Passes of one kind through the model.

    Args:
        samples: That they hold in all.
        calls: How many they are.
        tokens: That they hold in all.

    Example:
        >>> Passes(4, 1, 32) + 2 * Passes(1, 1, 8)
        Passes(samples=6, calls=3, tokens=48)
    """

    samples: int = 0
    calls: int = 0
    tokens: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.samples + other.samples, self.calls + other.calls, self.tokens + other.tokens)

    def __mul__(self, factor: int) -> Passes:
        return Passes(self.samples * factor, self.calls * factor, self.tokens * factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Speeds:
    """How fast a model and its machine are: an affine fit of timed passes, and seconds of arithmetic.

    Args:
        forward: Seconds per forward pass, and per token in it; NaN where the model was not timed.
        backward: The same of a forward and a backward pass together.
        element: Seconds per element that is read, worked on and summed.
        selected: Seconds per element out of which the largest are selected.
        flop: Seconds per floating-point operation of a float64 matrix product.
        normal: Seconds per element of a random direction.
        binned: Seconds per element that is counted in a histogram.
        cube: Seconds of a symmetric eigendecomposition in float64 per cube of the side.
        factored: Seconds of a randomised decomposition per operation (:func:`randomised_operations`).
        null: Seconds per element of a matrix whose golden elements are held against its rows and columns.
        watched: Seconds per element whose mark by one sample is kept, and left out once.

    Example:
        >>> Speeds((0.25, 0.0), (0.5, 0.125)).seconds(Work(forward=Passes(4, 2, 8), backward=Passes(1, 1, 10)))
        2.25
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    element: float = 0.0
    selected: float = 0.0
    flop: float = 0.0
    normal: float = 0.0
    binned: float = 0.0
    cube: float = 0.0
    factored: float = 0.0
    null: float = 0.0
    watched: float = 0.0

    def seconds(self, work: Work) -> float:
        """What some work takes on one process."""
        tangent = _TANGENT_FORWARDS[work.order]
        kinds = ((work.forward, self.forward, 1.0), (work.backward, self.backward, 1.0))
        again = (self.backward[0] - self.forward[0], self.backward[1] - self.forward[1])
        kinds += ((work.tangent, self.forward, tangent), (work.again, again, 1.0))  # type: ignore[assignment]
        made = [entry for entry in kinds if entry[0].calls]
        passes = sum(factor * (call * kind.calls + token * kind.tokens) for kind, (call, token), factor in made)
        return passes + sum(getattr(self, unit) * getattr(work, amount) for unit, amount in _ARITHMETIC.items())


@dataclass(frozen=True)
class Work:
    """Passes and arithmetic, over all ranks.

    Args:
        forward: Forward passes that no backward pass follows.
        backward: Forward passes that one follows.
        again: Further backward passes of a forward pass that has had one.
        tangent: Forward passes that carry derivatives along a direction.
        order: Of these derivatives.
        elements: Of parameters, each time that they are worked on.
        selected: Of scores, each time that the largest are selected out of them.
        flops: Of matrix products in float64.
        normals: Elements of random directions, each time that they are drawn.
        binned: Elements that histograms count.
        cubes: Of the sides of matrices that are decomposed in float64.
        factored: Operations of randomised decompositions.
        nulls: Elements of matrices that are held against their rows and columns.
        watched: Elements whose marks are kept, once for each sample.

    Example:
        >>> (Work(forward=Passes(4, 2, 8)) + Work(backward=Passes(1, 1, 2))).cost
        Cost(forwards=5, backwards=1)
    """

    forward: Passes = Passes()
    backward: Passes = Passes()
    again: Passes = Passes()
    tangent: Passes = Passes()
    order: int = 0
    elements: float = 0.0
    selected: float = 0.0
    flops: float = 0.0
    normals: float = 0.0
    binned: float = 0.0
    cubes: float = 0.0
    factored: float = 0.0
    nulls: float = 0.0
    watched: float = 0.0

    @property
    def cost(self) -> Cost:
        """The passes as an analysis counts them."""
        forwards = self.forward.samples + self.backward.samples + self.tangent.samples
        return Cost(forwards, self.backward.samples + self.again.samples)

    def __add__(self, other: Work) -> Work:
        names = [field.name for field in dataclasses.fields(self) if field.name != "order"]
        summed = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Work(**summed, order=max(self.order, other.order))


@dataclass(frozen=True)
class Forecast:
    """What a callback will cost.

    Args:
        work: Of one firing.
        once: Beside it, of the beginning of a run or of single firings that do more.
        parts: How many pieces replicas can share the work of a firing in.
        memory: Bytes on the model's device that it needs while it fires, at most, on each rank.
        kept: Bytes of the host's memory that it holds between firings, on each rank.
        disk: Bytes that a firing writes, at most.
        disk_once: Bytes that the beginning of a run writes.
        disk_checkpoint: Bytes that every checkpoint adds.
        communicated: Bytes that a rank sends per firing.
        sharded: What of its memory shards share, for readers.
        exact: Whether the passes depend on shapes and settings alone; else they are what is typical.
        bounded: Whether what a firing writes depends on the data, so that ``disk`` is no more than its largest size.
        firings: In the run.
        checkpoints: In the run.
        name: Of the callback.
        stated: Whether the callback states its cost at all.

    Example:
        >>> forecast = Forecast(Work(forward=Passes(8, 2, 64)), firings=3, disk=100, disk_once=50)
        >>> forecast.cost, forecast.disk_total, forecast.seconds_total(Speeds((0.5, 0.0), (0.0, 0.0)))
        (Cost(forwards=8, backwards=0), 350, 3.0)
    """

    work: Work = Work()
    once: Work = Work()
    parts: int = 1
    memory: int = 0
    kept: int = 0
    disk: int = 0
    disk_once: int = 0
    disk_checkpoint: int = 0
    communicated: int = 0
    sharded: str = "divided by the shards"
    exact: bool = True
    bounded: bool = False
    firings: int = 1
    checkpoints: int = 0
    name: str = ""
    stated: bool = True

    @property
    def cost(self) -> Cost:
        """Passes of one firing, as its row will state them."""
        return self.work.cost

    def seconds(self, speeds: Speeds, replicas: int = 1) -> float:
        """One firing on one of so many ranks that share its work out."""
        return speeds.seconds(self.work) * math.ceil(self.parts / replicas) / self.parts

    def seconds_total(self, speeds: Speeds, replicas: int = 1) -> float:
        """All firings of the run, with its beginning."""
        return self.firings * self.seconds(speeds, replicas) + speeds.seconds(self.once) / replicas

    @property
    def peak(self) -> int:
        """Bytes beside the training while it fires, wherever they lie."""
        return self.memory + self.kept

    @property
    def disk_total(self) -> int:
        """Bytes on the disk when the run has ended, nothing deleted."""
        return self.disk_once + self.firings * self.disk + self.checkpoints * self.disk_checkpoint


@dataclass(frozen=True)
class Run:
    """The steps of a run, from which schedules follow.

    Args:
        steps: Optimizer steps of the whole run.
        epoch_steps: Of an epoch; None where there is no end of one.
        checkpoint_steps: After which checkpoints are written.
        first_step: Made before, where a run is resumed.
        step_seconds: Of a training step; None where nobody knows.

    Example:
        >>> Run(10, checkpoint_steps=(5, 10)).firings(every_n_steps=4, every_n_epochs=None, at=("start", "end"))
        (0, 4, 8, 10)
    """

    steps: int
    epoch_steps: int | None = None
    checkpoint_steps: tuple[int, ...] = ()
    first_step: int = 0
    step_seconds: float | None = None

    @property
    def epoch_ends(self) -> tuple[int, ...]:
        """The step that each epoch ends with; the last may be cut short by the end of the run."""
        size = self.epoch_steps
        return tuple(min(step, self.steps) for step in range(size, self.steps + size, size)) if size else ()

    def firings(self, *, every_n_steps: int | None, every_n_epochs: int | None, at: Sequence[str]) -> tuple[int, ...]:
        """The steps at which a schedule fires; one step fires once for the same weights."""
        found: set[int] = set()
        if every_n_steps:
            found |= set(range(every_n_steps, self.steps + 1, every_n_steps))
        ends = self.epoch_ends
        found |= {step for epoch, step in enumerate(ends, 1) if every_n_epochs and epoch % every_n_epochs == 0}
        found |= set(self.checkpoint_steps) if "checkpoint" in at else set()
        found |= {self.steps} if "end" in at else set()
        found = {step for step in found if step > self.first_step or step == self.steps}
        # A run that goes on has started before.
        return tuple(sorted(found | ({0} if "start" in at and not self.first_step else set())))


@dataclass(frozen=True)
class Plan:
    """Shapes of what will be analysed.

    Args:
        model: Of any device, ``meta`` among them; of its parameters names, shapes and dtypes are read, and a sample of
            the values where there are any.
        rows: Of each batch of the probe the samples, and the tokens of each; 1 where samples are no sequences.
        activations: Bytes that a graph keeps per token.
        vocabulary: Classes of the logits.
        shards: Ranks that share each parameter.
        replicas: Ranks that share the samples.
        own_loss: Whether the objective's loss is not that of its targets (FunctionObjective).
        divisible: Whether batches can be worked through in parts.
        pieces: Knowledge pieces that the run has.
        piece_tokens: Of each, about.
        texts: As ``rows``, of text that is read beside the probe; empty where that is not known, or there is none.
        n_layers: Blocks with attention.
        n_heads: Of each block.
        base: Whether a GoldenSnapshot holds the base.
        variants: Models that are trained side by side.

    Example:
        >>> plan = Plan(nn.Linear(4, 2, device="meta"), rows=((3, 8), (3, 8)))
        >>> plan.batches(4), plan.whole(4), plan.single(4)
        (((3, 8), (1, 8)), Passes(samples=4, calls=2, tokens=32), Passes(samples=4, calls=4, tokens=32))
    """

    model: nn.Module
    rows: tuple[tuple[int, int], ...]
    activations: float = 0.0
    vocabulary: int = 2
    shards: int = 1
    replicas: int = 1
    own_loss: bool = False
    divisible: bool = True
    pieces: int | None = None
    piece_tokens: int = 16
    texts: tuple[tuple[int, int], ...] = ()
    n_layers: int = 1
    n_heads: int = 1
    base: bool = False
    variants: int = 1

    @functools.cached_property
    def space(self) -> ParameterSpace:
        """All trainable parameters."""
        return ParameterSpace.of(self.model)

    @functools.cached_property
    def base_bytes(self) -> int:
        """Bytes of the file of a base, whole: what its values take packed, or at most where there are none."""
        values = (local(parameter.detach()) for parameter in self.space.resolve(self.model).values())
        return int(self.shards * self.bytes() * min(1.0, _PACKED * packed_share(values)))

    @property
    def n_samples(self) -> int:
        """Samples of the probe."""
        return sum(rows for rows, _ in self.rows)

    def batches(self, n_samples: int | None, *, texts: bool = False) -> tuple[tuple[int, int], ...]:
        """The first samples in the batches that they come in; of the texts, where they are asked for and known."""
        read = (self.texts if texts else ()) or self.rows
        kept, left = [], sum(rows for rows, _ in read) if n_samples is None else n_samples
        for rows, tokens in read:
            if left > 0:
                kept.append((min(rows, left), tokens))
            left -= rows
        return tuple(kept)

    @functools.cached_property
    def width(self) -> int:
        """Of the residual stream: the smaller side of a matrix whose other side is the vocabulary; 0 without one."""
        tables = (shape for shape in self.space.shapes if len(shape) == 2 and max(shape) == self.vocabulary)
        return min(next(tables, (0,)))

    def whole(self, n_samples: int | None) -> Passes:
        """A pass per batch."""
        return passes_over(self.batches(n_samples))

    def single(self, n_samples: int | None) -> Passes:
        """A pass per sample."""
        return passes_over([(1, tokens) for rows, tokens in self.batches(n_samples) for _ in range(rows)])

    def elements(self, space: ParameterSpace | None = None) -> int:
        """Elements of the parameters on one rank."""
        return -(-(space or self.space).numel // self.shards)

    def bytes(self, space: ParameterSpace | None = None) -> int:
        """Bytes of the parameters on one rank."""
        space = space or self.space
        pairs = zip(space.shapes, space.dtypes, strict=True)
        return -(-sum(math.prod(shape) * dtype.itemsize for shape, dtype in pairs) // self.shards)

    def largest(self, space: ParameterSpace | None = None) -> int:
        """Elements of the largest tensor, whole."""
        return max(math.prod(shape) for shape in (space or self.space).shapes)

    def graph(self, tokens: int) -> int:
        """Bytes of a forward and backward pass's graph."""
        return int(self.activations * tokens) + 3 * self.logits(tokens)

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of so many tokens, in float32."""
        return 4 * self.vocabulary * tokens

    def widest(self, n_samples: int | None) -> int:
        """Tokens of the largest batch."""
        return max((rows * tokens for rows, tokens in self.batches(n_samples)), default=0)

    def communicated(self, work: Work, *, summed: int = 0, gathered: int = 0) -> int:
        """Bytes that a rank sends: parameters that passes gather and gradients that they scatter, sums and results.

        Args:
            work: Its calls gather a sharded model's parameters, once forward, once backward, and scatter gradients.
            summed: Bytes that replicas add up.
            gathered: Bytes that shards gather, whole.
        """
        calls = work.forward.calls + work.tangent.calls + 3 * work.backward.calls + 2 * work.again.calls
        whole = self.shards * self.bytes()
        over_shards = (calls * whole + gathered) * (self.shards - 1) / self.shards
        return int(over_shards + 2 * summed * (self.replicas - 1) / self.replicas)


def passes_over(batches: Iterable[tuple[int, int]]) -> Passes:
    """One pass over each batch.

    Args:
        batches: Samples, and tokens of each.

    Example:
        >>> passes_over([(2, 8), (1, 8)])
        Passes(samples=3, calls=2, tokens=24)
    """
    batches = list(batches)
    samples, tokens = sum(rows for rows, _ in batches), sum(rows * length for rows, length in batches)
    return Passes(samples, len(batches), tokens)
