r"""Passes of a wired decoder over pairs of prompts: recorded, with gradients at every reader, or with edges patched.

In a patched run every reader is given

.. math:: x_v = x'_v + \sum_{u: (u, v) \text{ kept}} (u - u'),

x' and u' of the run that is patched in, u of the patched run itself: what is outside the circuit says what it says
there. A reader all of whose edges are kept reads the stream as it is, and one without any reads x' itself, so that the
whole graph is the clean run and the empty one the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.circuits.graph import CircuitGraph, Reader, Stage, Wiring, linear_map, stream_of
from lightning_goldy.analysis.divergence import precise
from lightning_goldy.analysis.result import Cost, total_cost
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.tasks import transformers_model

Ablation = Literal["counterfactual", "mean", "zero"]
MetricName = Literal["logit_difference", "kl", "probability", "probability_difference"]
MetricFunction: TypeAlias = Callable[[Tensor, PromptPairs, Tensor], Tensor]
"""``metric(logits [B, V], the B pairs, logits of the clean run [B, V])``: a value of each pair, shape ``[B]``."""
Metric: TypeAlias = "MetricName | MetricFunction"
Progress: TypeAlias = Callable[[int, int], None]


class Taps:
    """Hooks where the residual stream is read and written; what each does is nothing until it is overridden.

    Args:
        wiring: Of the model.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._heads: dict[int, tuple[Tensor, Tensor]] = {}

    def at_input(self, stream: Tensor) -> Tensor | None:
        """The stream that the first block is given; what is returned takes its place."""
        return None

    def at_stream(self, place: int, stream: Tensor) -> None:
        """The stream that a stage reads, by the stage's place."""

    def at_projection(self, place: int, readers: Sequence[Reader], output: Tensor) -> Tensor | None:
        """What a projection of an attention stage made; several readers where it makes queries, keys and values."""
        return None

    def at_mlp(self, place: int, given: Tensor) -> Tensor | None:
        """What an MLP is given, behind its norm."""
        return None

    def at_written(self, place: int, written: Tensor, heads: Tensor | None, output: Tensor | None) -> Tensor | None:
        """What a stage adds to the stream, before its scale; of attention also the projection's input and output."""
        return None

    def at_output(self, stream: Tensor) -> Tensor | None:
        """The stream behind the last block."""
        return None

    def logits(self, ids: Tensor) -> Tensor:
        """One forward pass: logits at the last position, shape ``[B, V]``."""
        with self._hooked():
            return self.wiring.logits(ids)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as hooks:

            def before(module: nn.Module, function: Any) -> None:
                hooks.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)

            def behind(module: nn.Module, function: Any) -> None:
                hooks.callback(module.register_forward_hook(function).remove)

            before(self.wiring.entry, partial(_replaced, self.at_input))
            before(self.wiring.exit, partial(_replaced, self.at_output))
            for place, stage in enumerate(self.wiring.stages):
                if stage.beside:
                    before(stage.block.module, partial(_replaced, partial(self.at_stream, place)))
                elif stage.norm is not None:
                    before(stage.norm, partial(_replaced, partial(self.at_stream, place)))
                else:
                    before(stage.block.mlp_input, partial(_replaced, partial(self.at_stream, place)))
                if stage.is_attention:
                    for module, readers in projections(stage):
                        behind(module, partial(self._projected, place, readers))
                    behind(stage.output, partial(self._made, place))
                else:
                    before(stage.block.mlp_input, partial(_replaced, partial(self.at_mlp, place)))
                    if stage.post is None:
                        behind(stage.output, partial(self._added, place))
                if stage.post is not None:
                    behind(stage.post, partial(self._added, place))
            yield

    def _projected(self, place: int, readers: Sequence[Reader], module: nn.Module, args: Any, output: Tensor) -> Any:
        return self.at_projection(place, readers, output)

    def _made(self, place: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
        self._heads[place] = args[0], output
        return self._added(place, module, args, output) if self.wiring.stages[place].post is None else None

    def _added(self, place: int, module: nn.Module, args: Any, output: Any) -> Any:
        heads, made = self._heads.pop(place, (None, None))
        if isinstance(output, Tensor):
            return self.at_written(place, output, heads, made)
        changed = self.at_written(place, output[0], heads, made)
        return None if changed is None else (changed, *output[1:])


def projections(stage: Stage) -> list[tuple[nn.Module, list[Reader]]]:
    """The projections before attention, each with the readers that it makes: all three where they are fused."""
    found: dict[int, tuple[nn.Module, list[Reader]]] = {}
    for reader in stage.readers:
        assert reader.projection is not None
        module = reader.projection.module
        found.setdefault(id(module), (module, []))[1].append(reader)
    return list(found.values())


def head_columns(reader: Reader, device: torch.device) -> Tensor:
    """Where the heads of a reader lie in its projection's output, shape ``[heads, head_dim]``."""
    assert reader.projection is not None
    layout = reader.projection.layout
    starts = torch.tensor([layout.start(head) for head in range(layout.n_heads)], device=device)
    return starts[:, None] + torch.arange(layout.head_dim, device=device)


def _replaced(function: Any, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    stream = stream_of(args, options)
    assert stream is not None
    changed = function(stream)
    if changed is None:
        return None
    return (
        tuple(changed if value is stream else value for value in args),
        {name: changed if value is stream else value for name, value in options.items()},
    )


@dataclass
class Recorded:
    """What every writer wrote at one run, and what every stage read.

    Args:
        writes: Shape ``[writers, B, T, width]``, at least float32.
        streams: By stage, then the one behind the last block, each ``[B, T, width]``.
        logits: At the last position, shape ``[B, V]``.
    """

    writes: Tensor
    streams: list[Tensor]
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def expanded(self, n: int) -> Recorded:
        """The run of one sample for n samples."""
        return Recorded(
            self.writes.expand(-1, n, -1, -1),
            [one.expand(n, -1, -1).contiguous() for one in self.streams],
            self.logits,
        )


class _Recording(Taps):
    writes: Tensor | None = None

    def at_input(self, stream: Tensor) -> Tensor | None:
        self.streams: dict[int, Tensor] = {}
        whole = precise(stream.detach())
        self.writes = whole.new_empty(len(self.wiring.graph.writers), *whole.shape)
        self.writes[0] = whole
        return None

    def at_stream(self, place: int, stream: Tensor) -> None:
        self.streams[place] = stream.detach().view(self._shape)

    def at_output(self, stream: Tensor) -> Tensor | None:
        self.streams[len(self.wiring.stages)] = stream.detach()
        return None

    def at_written(self, place: int, written: Tensor, heads: Tensor | None, output: Tensor | None) -> Tensor | None:
        self._note(place, written, heads, output)
        return None

    @torch.no_grad()
    def _note(self, place: int, written: Tensor, heads: Tensor | None, output: Tensor | None) -> None:
        assert self.writes is not None
        stage = self.wiring.stages[place]
        with torch.autocast(written.device.type, enabled=False):
            shape = self._shape
            parts = stage.contributions(
                written.detach().view(shape),
                None if heads is None else heads.detach().view(*shape[:2], -1),
                None if output is None else output.detach().view(shape),
            )
        self.writes[stage.writers.start : stage.writers.stop] = parts

    @property
    def _shape(self) -> torch.Size:
        assert self.writes is not None
        return self.writes.shape[1:]


@torch.no_grad()
def record(wiring: Wiring, ids: Tensor) -> Recorded:
    """A plain run, with everything that was written and read.

    Args:
        wiring: Of the model, in evaluation mode.
        ids: Token ids, shape ``[B, T]``.
    """
    taps = _Recording(wiring)
    logits = taps.logits(ids)
    assert taps.writes is not None
    return Recorded(taps.writes, [taps.streams[place] for place in range(len(wiring.stages) + 1)], logits)


class Gradients(_Recording):
    """A run whose graph gives the metric's gradient at every reader, before its norm.

    Args:
        wiring: Of the model.
        entry: What takes the place of the embedding's output; None leaves it.
        changed: What takes the place of what one stage adds, by its place, before the scale.
        keep: Whether what is written is recorded as well.
    """

    def __init__(
        self, wiring: Wiring, *, entry: Tensor | None = None, changed: Mapping[int, Tensor] | None = None, keep: bool
    ) -> None:
        super().__init__(wiring)
        self.entry, self.changed, self.keep = entry, changed or {}, keep
        self.projected: dict[tuple[int, int], Tensor] = {}
        self.given: dict[int, Tensor] = {}

    def at_input(self, stream: Tensor) -> Tensor | None:
        """Makes the input a leaf, so that there is a graph whatever is frozen."""
        start = stream if self.entry is None else self.entry.to(stream.dtype)
        if self.keep:
            super().at_input(start)
        else:
            self.streams, self.writes = {}, start.detach()[None]
        return start.detach().requires_grad_()

    def at_projection(self, place: int, readers: Sequence[Reader], output: Tensor) -> Tensor | None:
        """Keeps the output, at which the gradient is taken."""
        for reader in readers:
            self.projected[place, reader.rows.start] = output
        return None

    def at_mlp(self, place: int, given: Tensor) -> Tensor | None:
        """A name of its own for what the MLP alone is given: others may read the same tensor."""
        self.given[place] = given.view_as(given)
        return self.given[place]

    def at_written(self, place: int, written: Tensor, heads: Tensor | None, output: Tensor | None) -> Tensor | None:
        """Records, or puts the given value in the place."""
        if self.keep:
            self._note(place, written, heads, output)
        changed = self.changed.get(place)
        return None if changed is None else changed.to(written.dtype).view_as(written)

    def at_output(self, stream: Tensor) -> Tensor | None:
        """A name of its own for what the last norm is given."""
        super().at_output(stream)
        self.given[len(self.wiring.stages)] = stream.view_as(stream)
        return self.given[len(self.wiring.stages)]

    def products(self, total: Tensor, differences: Tensor, columns: range | None = None) -> Tensor:
        r"""Inner products of every reader's gradient with what its writers differ by, shape ``[readers, writers]``.

        .. math:: P_{vu} = \sum_{b,t} \langle \nabla_{x_v} m, \; d_u \rangle

        by matrix products of a stage's gradients with the writers before it: no edge's vector is ever held.

        Args:
            total: The metric's sum over the samples, made of this run's logits.
            differences: Shape ``[writers, B, T, width]``.
            columns: Only of these writers; all by default.
        """
        if not total.requires_grad:
            raise ValueError("the metric has no gradient: make it of the logits it is given, or take method='exact'")
        graph, stages = self.wiring.graph, self.wiring.stages
        # A stage whose output was replaced may decide nothing.
        wanted = [*{id(one): one for one in (*self.projected.values(), *self.given.values())}.values()]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        gradients = {id(one): gradient for one, gradient in zip(wanted, found, strict=True)}
        products = differences.new_zeros(len(graph.readers), len(graph.writers), dtype=torch.float64)
        flat = differences.flatten(1)
        start, stop = (0, len(flat)) if columns is None else (columns.start, columns.stop)
        with torch.autocast(differences.device.type, enabled=False):
            for place, stage in enumerate(stages):
                for reader in stage.readers:
                    tensor = self.given[place] if reader.part == "mlp" else self.projected[place, reader.rows.start]
                    gradient = gradients[id(tensor)]
                    end = min(stage.seen, stop)
                    if gradient is None or end <= start:
                        continue
                    behind = _before_projection(reader, gradient)  # [rows, B, T, width]
                    before = _before_norm(stage, self.streams[place], behind)
                    rows = slice(reader.rows.start, reader.rows.stop)
                    products[rows, start:end] = (before.flatten(1) @ flat[start:end].T).double()
            last = gradients[id(self.given[len(stages)])]
            if last is not None:
                products[-1, start:stop] = (flat[start:stop] @ precise(last).flatten()).double()
        return products


@torch.no_grad()
def _before_projection(reader: Reader, gradient: Tensor) -> Tensor:
    """Gradients at a projection's output as those at its input, by head, shape ``[heads, B, T, width]``."""
    if reader.projection is None:
        return gradient[None]
    places = head_columns(reader, gradient.device)
    weight = linear_map(reader.projection.module)[0][:, places]  # [width, heads, D]
    return torch.einsum("bthd,whd->hbtw", precise(gradient[..., places]), precise(weight))


def _before_norm(stage: Stage, stream: Tensor, behind: Tensor) -> Tensor:
    """Gradients behind a norm as those before it, at the stream of this run."""
    behind = behind.view(len(behind), *stream.shape)
    if stage.norm is None:
        return precise(behind)
    with torch.enable_grad():
        start = stream.detach().expand_as(behind).clone().requires_grad_()
        made = stage.normed(start)
        (before,) = torch.autograd.grad(made, start, behind.to(made.dtype).view_as(made))
    return precise(before)


class _Patching(Taps):
    """A run in which readers are given only what their kept edges bring, and the rest from another run."""

    def __init__(self, wiring: Wiring, kept: Tensor, other: Recorded) -> None:
        super().__init__(wiring)
        self.kept, self.other = kept, other
        seen = torch.tensor(wiring.graph.seen)
        self.counts = kept.sum(1).tolist()
        self.whole = [count == full for count, full in zip(self.counts, seen.tolist(), strict=True)]
        self.differences = torch.empty_like(other.writes, memory_format=torch.contiguous_format)

    def at_input(self, stream: Tensor) -> Tensor | None:
        self.differences[0] = precise(stream) - self.other.writes[0]
        return None

    def at_written(self, place: int, written: Tensor, heads: Tensor | None, output: Tensor | None) -> Tensor | None:
        stage, shape = self.wiring.stages[place], self.differences.shape[1:]
        with torch.autocast(written.device.type, enabled=False):
            parts = stage.contributions(
                written.view(shape),
                None if heads is None else heads.view(*shape[:2], -1),
                None if output is None else output.view(shape),
            )
        columns = slice(stage.writers.start, stage.writers.stop)
        self.differences[columns] = parts - self.other.writes[columns]
        return None

    def at_projection(self, place: int, readers: Sequence[Reader], output: Tensor) -> Tensor | None:
        stage = self.wiring.stages[place]
        rows = [row for reader in readers for row in reader.rows]
        if all(self.whole[row] for row in rows):
            return None
        if not any(self.counts[row] for row in rows):
            module = readers[0].projection.module  # type: ignore[union-attr]
            return module.forward(stage.normed(self.other.streams[place])).view_as(output)
        changed = output.clone()
        for reader in readers:
            places = head_columns(reader, output.device)
            weight, bias = linear_map(reader.projection.module)  # type: ignore[union-attr]
            with torch.autocast(output.device.type, enabled=False):
                normed = stage.normed(self._mixed(place, reader.rows).to(output.dtype))
                heads = torch.einsum("hbtw,whd->bthd", normed, weight[:, places].to(normed.dtype))
                heads = heads if bias is None else heads + bias[places]
            changed[..., places] = heads.to(output.dtype)
        return changed

    def at_mlp(self, place: int, given: Tensor) -> Tensor | None:
        stage = self.wiring.stages[place]
        row = stage.readers[0].rows
        if self.whole[row.start]:
            return None
        return stage.normed(self._mixed(place, row)[0].to(given.dtype)).view_as(given)

    def at_output(self, stream: Tensor) -> Tensor | None:
        last = len(self.counts) - 1
        if self.whole[last]:
            return None
        return self._mixed(len(self.wiring.stages), range(last, last + 1))[0].to(stream.dtype)

    def _mixed(self, place: int, rows: range) -> Tensor:
        """What readers are given, shape ``[rows, B, T, width]``."""
        other = self.other.streams[place]
        if not any(self.counts[rows.start : rows.stop]):
            return other.expand(len(rows), *other.shape)
        seen = self.wiring.graph.seen[rows.start]
        chosen = self.kept[rows.start : rows.stop, :seen].to(self.differences.device, self.differences.dtype)
        added = chosen @ self.differences[:seen].flatten(1)
        return precise(other) + added.view(len(rows), *other.shape)


@torch.no_grad()
def patched_logits(wiring: Wiring, ids: Tensor, kept: Tensor, other: Recorded) -> Tensor:
    """Logits at the last position of a run with every edge outside a circuit patched, shape ``[B, V]``.

    Args:
        wiring: Of the model, in evaluation mode.
        ids: Clean prompts, shape ``[B, T]``.
        kept: The circuit, True where an edge is kept, shape ``[readers, writers]``.
        other: The run that is patched in.
    """
    return _Patching(wiring, kept, other).logits(ids)


@dataclass(frozen=True)
class CircuitOptions:
    """How edges are patched and what that is measured by.

    Args:
        metric: Higher is better. ``logit_difference``: log-odds of the right against the wrong answers, nats;
            ``probability`` of the right ones, ``probability_difference`` less that of the wrong ones; ``kl``: minus
            KL(p_clean || p), nats; or a function of (logits ``[B, V]``, pairs, clean logits ``[B, V]``).
        ablation: What a patched edge brings: what its writer writes on the ``counterfactual`` prompt, its ``mean`` over
            the clean prompts of the same length at each position, or ``zero``.
        batch_size: Pairs per pass.

    Raises:
        ValueError: A choice is unknown or the batch size below 1.

    Example:
        >>> CircuitOptions(ablation="means")
        Traceback (most recent call last):
        ValueError: unknown ablation 'means'; did you mean 'mean'? Valid: counterfactual, mean, zero
    """

    metric: Metric = "logit_difference"
    ablation: Ablation = "counterfactual"
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_choice("ablation", self.ablation, get_args(Ablation))
        require_at_least("batch_size", self.batch_size, 1)
        if not callable(self.metric):
            require_choice("metric", self.metric, get_args(MetricName))

    @property
    def metric_name(self) -> str:
        """What the metric is called."""
        return getattr(self.metric, "__name__", "metric") if callable(self.metric) else self.metric

    def check(self, pairs: PromptPairs) -> None:
        """Checks that pairs have what metric and ablation need.

        Raises:
            ValueError: They have not; the prompt is named.
        """
        require_pairs("pairs", pairs)
        if self.metric in ("logit_difference", "probability_difference"):
            lacking = next((name for name, wrong in zip(pairs.names, pairs.wrong, strict=True) if not wrong), None)
            if lacking is not None:
                raise ValueError(f"metric {self.metric!r} needs wrong answers, of which prompt {lacking!r} has none")
        if self.ablation == "mean":
            for group in pairs.batches(len(pairs)):
                if len(group) == 1:
                    raise ValueError(
                        f"ablation 'mean' takes the mean over prompts of one length, and {pairs.names[group[0]]!r} is "
                        f"the only one of {len(pairs.clean[group[0]])} tokens"
                    )

    def value(self, logits: Tensor, pairs: PromptPairs, clean: Tensor) -> Tensor:
        """The metric of each pair, shape ``[B]``.

        Raises:
            ValueError: A function gives something else.
        """
        if callable(self.metric):
            found = self.metric(logits, pairs, clean)
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != (len(pairs),):
                raise ValueError(
                    f"metric {self.metric_name} gives one value per pair, a tensor of shape ({len(pairs)},); got "
                    f"{shape}"
                )
            return found
        logs = precise(logits).log_softmax(-1)
        if self.metric == "kl":
            before = precise(clean).detach().log_softmax(-1)
            return -(before.exp() * (before - logs)).sum(-1)
        right = _sums(logs, pairs.answers)
        if self.metric == "probability":
            return right.exp()
        wrong = _sums(logs, pairs.wrong)
        return right - wrong if self.metric == "logit_difference" else right.exp() - wrong.exp()


def require_pairs(name: str, pairs: object) -> None:
    """Checks that something is pairs of prompts.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(pairs, PromptPairs):
        raise ValueError(
            f"{name} are PromptPairs, such as text_pairs(tokenizer, ...) makes; got {type(pairs).__name__} "
            f"{pairs!r:.60}"
        )


def _sums(logs: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of sets of tokens, shape ``[B]``."""
    return torch.stack([row[list(ids)].logsumexp(0) for row, ids in zip(logs, tokens, strict=True)])


def check_tokens(model: nn.Module, pairs: PromptPairs) -> None:
    """Checks that a model knows the tokens of prompts and answers, and has positions for all of them.

    Raises:
        ValueError: It has not; the prompt is named.
    """
    config: Any = getattr(transformers_model(model), "config", None)
    if config is None:
        return
    text = config.get_text_config()
    vocabulary, longest = (getattr(text, name, None) for name in ("vocab_size", "max_position_embeddings"))
    for name, *sets in zip(pairs.names, pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, strict=True):
        ids = [token for tokens in sets for token in tokens]
        if vocabulary and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"prompt {name!r} has tokens beyond the model's {vocabulary}: from {min(ids)} to {max(ids)}"
            )
        if longest and len(sets[0]) > longest:
            raise ValueError(f"prompt {name!r} has {len(sets[0])} tokens, more than the model's {longest} positions")


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs of one length, their clean tokens, and the run that is patched in."""

    places: list[int]
    pairs: PromptPairs
    ids: Tensor
    other: Recorded


@contextmanager
def wired(
    model: nn.Module, pairs: PromptPairs, options: CircuitOptions, graph: CircuitGraph | None = None
) -> Iterator[Wiring]:
    """The wiring of a model that is put back as it was, with parameters that ask for no gradient.

    Raises:
        ValueError: It is of another graph than a circuit that is of this one.
    """
    options.check(pairs)
    check_tokens(model, pairs)
    device = next(model.parameters()).device
    wiring = Wiring.of(model, torch.tensor(pairs.clean[0], device=device)[None])
    if graph is not None and wiring.graph != graph:
        raise ValueError(
            f"the circuit is of another graph, of {graph.n_edges} edges; the model has {wiring.graph.n_edges}"
        )
    with preserved(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield wiring


def shared_places(pairs: PromptPairs, options: CircuitOptions, replicas: Replicas) -> list[list[int]]:
    """The places of a replica's pairs in batches of one length each, so that every replica has about as many."""
    return replicas.share(pairs.batches(batch_size_of(pairs, options, replicas)))


def batch_size_of(pairs: PromptPairs, options: CircuitOptions, replicas: Replicas) -> int:
    """Pairs per pass, so few that every replica has some."""
    return min(options.batch_size, -(-len(pairs) // replicas.size))


def batches(
    wiring: Wiring, pairs: PromptPairs, options: CircuitOptions, done: list[Cost], replicas: Replicas
) -> Iterator[Batch]:
    """A replica's pairs in batches with what is patched in.

    Args:
        wiring: Of the model.
        pairs: The pairs.
        options: Ablation and batch size.
        done: The cost of the passes is added.
        replicas: That share out the pairs.
    """
    device = next(wiring.model.parameters()).device
    means: dict[int, Recorded] = {}
    for places in shared_places(pairs, options, replicas):
        chosen = pairs.take(places)
        ids = torch.tensor(chosen.clean, device=device)
        length = ids.shape[1]
        if options.ablation == "counterfactual":
            other = record(wiring, torch.tensor(chosen.corrupted, device=device))
            done.append(Cost(forwards=len(places)))
        else:
            if length not in means:
                means[length] = _constant(wiring, pairs, length, options, done)
            other = means[length].expanded(len(places))
        yield Batch(places, chosen, ids, other)


def _constant(wiring: Wiring, pairs: PromptPairs, length: int, options: CircuitOptions, done: list[Cost]) -> Recorded:
    """The mean run over all clean prompts of a length, or nothing at all, as the run of one sample."""
    device = next(wiring.model.parameters()).device
    group = [ids for ids in pairs.clean if len(ids) == length]
    if options.ablation == "zero":
        shown = record(wiring, torch.tensor(group[:1], device=device))
        done.append(Cost(forwards=1))
        return Recorded(torch.zeros_like(shown.writes), [torch.zeros_like(one) for one in shown.streams])
    writes: Tensor | None = None
    streams: list[Tensor] = []
    for start in range(0, len(group), options.batch_size):
        shown = record(wiring, torch.tensor(group[start : start + options.batch_size], device=device))
        sums = shown.writes.sum(1, keepdim=True)
        parts = [precise(one).sum(0, keepdim=True) for one in shown.streams]
        writes = sums if writes is None else writes + sums
        streams = parts if not streams else [old + new for old, new in zip(streams, parts, strict=True)]
        done.append(Cost(forwards=len(shown.logits)))
    assert writes is not None
    return Recorded(writes / len(group), [one / len(group) for one in streams])


def measure(
    wiring: Wiring,
    pairs: PromptPairs,
    options: CircuitOptions,
    circuits: Sequence[Tensor],
    *,
    progress: Progress | None = None,
    replicas: Replicas = Replicas(),  # noqa: B008 - frozen
) -> tuple[Tensor, Cost]:
    """The metric of patched runs, one per circuit and pair.

    Args:
        wiring: Of the model, within :func:`wired`.
        pairs: The pairs.
        options: Metric and ablation.
        circuits: True where an edge is kept, each of shape ``[readers, writers]``.
        progress: Called with (runs done, runs in all), on this rank.
        replicas: That share out the pairs; each gets all values.

    Returns:
        Values, shape ``[circuits, pairs]``, float64, and the passes of all replicas.

    Raises:
        ValueError: A value is not finite; the prompt is named.
    """
    values = torch.zeros(len(circuits), len(pairs), dtype=torch.float64)
    done: list[Cost] = []
    whole, finished = wiring.graph.edges(), 0
    total = len(circuits) * sum(map(len, shared_places(pairs, options, replicas)))
    with torch.no_grad():
        for batch in batches(wiring, pairs, options, done, replicas):
            clean = patched_logits(wiring, batch.ids, whole, batch.other)
            for row, kept in enumerate(circuits):
                logits = clean if torch.equal(kept, whole) else patched_logits(wiring, batch.ids, kept, batch.other)
                values[row, batch.places] = options.value(logits, batch.pairs, clean).double().cpu()
                finished += len(batch.places)
                if progress is not None:
                    progress(finished, total)
            runs = 1 + sum(not torch.equal(kept, whole) for kept in circuits)
            done.append(Cost(forwards=len(batch.places) * runs))
    values = torch.stack(replicas.gather_objects(values)).sum(0)
    broken = (~values.isfinite()).any(0).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"{options.metric_name} of prompt {pairs.names[broken[0]]!r} is not finite")
    return values, total_cost(replicas, sum(done, Cost()))
