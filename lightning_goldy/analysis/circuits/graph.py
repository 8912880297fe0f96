r"""The graph of a decoder's parts: who writes to the residual stream, who reads from it, and where that happens.

The stream before a reader is the sum of what was written before it,

.. math:: x_v = \sum_{u \text{ before } v} u(\text{run}),

and an edge (u, v) is that u is one of the summands of v's input. Writers are the embedding, every head and every MLP;
readers are the query, key and value inputs of every head, every MLP's input and the final norm, each taken before its
own norm. Keys and values that a group of query heads shares (grouped-query attention) are one reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import precise
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.architecture import (
    Block,
    HeadProjection,
    UnsupportedArchitectureError,
    describe_architecture,
    require_next_tokens,
)
from lightning_goldy.core.architecture.blocks import MLP, Attention
from lightning_goldy.core.architecture.families import canonical_modules, inside_prefix
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.sharding import is_sharded
from lightning_goldy.core.tasks import accepts, prompt_learning, transformers_model

INPUT, OUTPUT = "input", "output"
Part = Literal["query", "key", "value", "mlp", "output"]


@dataclass(frozen=True)
class CircuitGraph(AnalysisResult):
    """Writers and readers of the residual stream, in the order of the forward pass.

    Args:
        writers: ``input``, then per block its heads ``a0.h0``, ... and its MLP ``m0``.
        readers: Per block the inputs of heads ``a0.h0.q``, ``a0.h0.k``, ``a0.h0.v`` (``a0.g0.k`` where a group shares
            its keys), the MLP's ``m0``, and last ``output``.
        seen: For each reader how many writers come before it: it has an edge from each of these.
        owners: For each reader the places of the writers whose input it is; none for ``output``.
        layers: For each writer its block; -1 for ``input``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> graph = CircuitGraph.of(model)
        >>> graph.writers, graph.n_edges
        (('input', 'a0.h0', 'a0.h1', 'm0', 'a1.h0', 'a1.h1', 'm1'), 46)
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    seen: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> CircuitGraph:
        """The graph of a decoder; a forward pass over a few made-up tokens tells who reads what.

        Args:
            model: A causal language model, or anything that contains one.

        Raises:
            UnsupportedArchitectureError: The stream before a reader is not the sum of what was written before it.
        """
        return Wiring.of(model).graph

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return sum(self.seen)

    def edges(self) -> Tensor:
        """True where a reader has an edge from a writer, shape ``[readers, writers]``."""
        places = torch.arange(len(self.writers))
        return places[None] < torch.tensor(self.seen)[:, None]

    def place(self, edge: str) -> tuple[int, int]:
        """Row and column of an edge by name, as ``m0->a1.h0.q``.

        Raises:
            ValueError: There is no such edge; the message says which end is unknown.

        Example:
            >>> graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
            >>> graph.place("m0->output")
            (1, 1)
            >>> graph.place("m0->m0")
            Traceback (most recent call last):
            ValueError: there is no edge 'm0->m0': 'm0' is written after 'm0' has read
        """
        writer, arrow, reader = edge.partition("->")
        for kind, name, names in (("writer", writer, self.writers), ("reader", reader, self.readers)):
            if not arrow or name not in names:
                raise ValueError(
                    f"there is no edge {edge!r}: no {kind} {name!r}; there are {', '.join(names[:8])}, ..."
                )
        row, column = self.readers.index(reader), self.writers.index(writer)
        if column >= self.seen[row]:
            raise ValueError(f"there is no edge {edge!r}: {writer!r} is written after {reader!r} has read")
        return row, column

    def name(self, row: int, column: int) -> str:
        """The edge of a row and a column."""
        return f"{self.writers[column]}->{self.readers[row]}"


@dataclass(frozen=True)
class Reader:
    """Where one kind of readers of a block take their input.

    Args:
        part: Which.
        rows: Their rows among the graph's readers.
        projection: The projection whose output they decide; None for an MLP and for the output.
    """

    part: Part
    rows: range
    projection: HeadProjection | None = None


@dataclass(frozen=True)
class Stage:
    """Attention or the MLP of a block: what it reads, through which norm, and how it writes.

    Args:
        name: Dotted name of the block.
        block: The block.
        readers: Its readers.
        writers: The columns of its writers.
        seen: Writers before it reads.
        norm: Between the stream and its readers; None where they read the stream itself.
        beside: Whether it reads what the block was given, as attention does, and an MLP that runs beside attention.
        output: What makes its output: the attention output projection or the MLP's.
        post: A norm over that output, before it is added; None without.
        scale: What is added is the output times this.
    """

    name: str
    block: Block
    readers: tuple[Reader, ...]
    writers: range
    seen: int
    norm: nn.Module | None
    beside: bool
    output: nn.Module
    post: nn.Module | None
    scale: float = 1.0

    @property
    def is_attention(self) -> bool:
        """Whether it writes by heads."""
        return self.readers[0].part == "query"

    @property
    def output_name(self) -> str:
        """Dotted name of what makes its output."""
        return self.block.attention_output_name if self.is_attention else self.block.mlp_output_name

    def normed(self, stream: Tensor) -> Tensor:
        """What its readers make of a stream of any shape ``[..., width]``, in the norm's own type."""
        if self.norm is None:
            return stream
        # Not by a call, at which the hooks of a run would take it for the stream.
        return self.norm.forward(stream)

    def contributions(self, written: Tensor, heads: Tensor | None, output: Tensor | None) -> Tensor:
        r"""What each of its writers adds to the stream, shape ``[writers, B, T, width]``; their sum is what it adds.

        .. math:: u_h = c \, g \odot \frac{o_h - \bar o_h}{s}, \qquad o_h = z_h W_O^{(h)} + \tfrac1H b_O

        with the norm over the output (centred where it centres, gain g) frozen on the run's own spread s; without one
        ``u_h = c o_h``. A bias of the projection, and one of the norm, belongs to no head and is shared out equally.

        Args:
            written: What it adds before the scale, shape ``[B, T, width]``.
            heads: Of attention the projection's input, shape ``[B, T, heads * head_dim]``.
            output: Of attention the projection's output, shape ``[B, T, width]``.
        """
        if heads is None or output is None:
            return precise(written)[None] * self.scale
        layout = self.block.output.layout
        weight, bias = linear_map(self.output)
        parts = precise(weight).unflatten(0, (layout.n_heads, layout.head_dim))  # [H, D, width]
        split = precise(heads).unflatten(-1, (layout.n_heads, layout.head_dim))  # [B, T, H, D]
        found = torch.einsum("bthd,hdw->hbtw", split, parts)
        if bias is not None:
            found = found + precise(bias) / layout.n_heads
        if self.post is not None:
            found = _frozen(self.post, output, written, found)
        return found * self.scale


def linear_map(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight of shape ``[in, out]`` and bias of a projection; of an adapted or packed one by what it computes."""
    if type(projection) is nn.Linear:
        return projection.weight.detach().T, None if projection.bias is None else projection.bias.detach()
    if model_class(projection) == "Conv1D":
        known: Any = projection
        return known.weight.detach(), known.bias.detach()
    base: Any = getattr(projection, "base_layer", projection)
    width = getattr(base, "in_features", None) or base.nx
    sample = next(projection.parameters())
    with torch.no_grad():
        units = torch.eye(width, device=sample.device, dtype=sample.dtype if sample.is_floating_point() else None)
        bias = projection.forward(torch.zeros_like(units[:1]))
        return projection.forward(units) - bias, bias[0]


def _frozen(norm: nn.Module, output: Tensor, written: Tensor, parts: Tensor) -> Tensor:
    """Parts of a norm's input as parts of its output, with its spread kept at that of the whole."""
    width = output.shape[-1]
    with torch.no_grad():
        test = torch.linspace(1, 2, width, device=output.device, dtype=output.dtype)
        test[::2] *= -1
        zero, plain, moved = (precise(norm.forward(one[None])[0]) for one in (test * 0, test, test + 1))
        centred = bool(torch.allclose(plain, moved, atol=1e-3 * float(plain.abs().max())))
        whole, test = precise(output), precise(test)
        if centred:
            whole, parts, test = (value - value.mean(-1, keepdim=True) for value in (whole, parts, test))
        gain = (plain - zero) / test
        scaled = gain * whole
        inverse = ((precise(written) - zero) * scaled).sum(-1, keepdim=True)
        inverse = inverse / scaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
        return parts * gain * inverse + zero / len(parts)


@dataclass(frozen=True)
class Wiring:
    """A graph and where in a model its parts are.

    Args:
        graph: The graph.
        model: What is called.
        entry: The first block, whose input is what ``input`` writes.
        stages: In the order of the forward pass.
        exit: The module after the last block, which reads the output.
        last_only: Whether the model can be asked for the last position's logits alone.
    """

    graph: CircuitGraph
    model: nn.Module
    entry: nn.Module
    stages: tuple[Stage, ...]
    exit: nn.Module
    last_only: bool

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor | None = None) -> Wiring:
        """Finds norms by what they are given and give at one forward pass, and checks every sum.

        Args:
            model: The model.
            ids: Token ids of shape ``[1, T]`` to look with; made up by default.
        """
        _require_decoder(model)
        described = describe_architecture(model)
        if described.stacks:
            raise UnsupportedArchitectureError(f"{model_class(model)} has two stacks; circuits are those of a decoder")
        device = next(model.parameters()).device
        if ids is None:
            config: Any = next(part.config for part in model.modules() if hasattr(part, "config"))
            ids = torch.arange(3, 11)[None] % config.get_text_config().vocab_size
        with preserved(model), torch.no_grad():
            seen, logits = _Seen.of(model, ids.to(device))
            silent = [
                block.attention_output
                for block in described.blocks
                if block.has_attention and not seen.gave[block.attention_output_name].any()
            ]
            if silent:
                # A stream that attention adds nothing to (projections that begin at 0) tells not who reads it when.
                seen, _ = _Seen.of(model, ids.to(device), silent)
            wiring = _wire(model, described.blocks, seen)
            require_next_tokens(model, ids, logits, "circuits")
            _require_causal(model, ids.to(device), logits)
        return wiring

    def logits(self, ids: Tensor) -> Tensor:
        """Logits at the last position, shape ``[B, V]``."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self.last_only else {}
        return call(self.model, ids, **options)[:, -1]


def call(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """The logits of a model of token ids."""
    if accepts(model, "use_cache"):
        options["use_cache"] = False
    output: Any = model(input_ids=ids, **options)
    return output if isinstance(output, Tensor) else output.logits


def _require_decoder(model: nn.Module) -> None:
    inner = transformers_model(model)
    if inner is not None and not accepts(inner, "input_ids"):
        raise UnsupportedArchitectureError(f"{model_class(model)} takes no tokens; circuits are those of a decoder")
    if any(map(is_sharded, model.parameters())):
        raise UnsupportedArchitectureError(
            "a sharded model's circuits are not found, for each process must hold the whole model: use DDPStrategy or "
            "one device, or `goldy analyze CHECKPOINT --circuits TASK` afterwards"
        )
    method, count = prompt_learning(model)
    if count:
        raise UnsupportedArchitectureError(
            f"PEFT's {method} puts {count} positions of its own before a prompt, whose circuits are not found; call "
            "inside `with model.disable_adapter():`"
        )


def _require_causal(model: nn.Module, ids: Tensor, logits: Tensor) -> None:
    """Checks that the last token changes nothing at those before it."""
    changed = ids.clone()
    changed[:, -1] = ids[:, 0] if not torch.equal(ids[:, -1], ids[:, 0]) else (ids[:, 0] + 1) % logits.shape[-1]
    before, after = logits[:, :-1], call(model, changed)[:, :-1]
    # What is rounded to few digits differs by the other shapes that experts are given.
    coarse = before.element_size() < 4 or torch.is_autocast_enabled(before.device.type)
    apart = float((after - before).abs().max()) if before.numel() else 0.0
    if apart > (2e-2 if coarse else 1e-4) * float(before.abs().max()):
        raise UnsupportedArchitectureError(
            f"circuits are those of a causal language model; in {model_class(model)} a token changes what is said at "
            "those before it"
        )


@dataclass
class _Seen:
    """What modules were given and gave at one forward pass: the first tensor of each."""

    given: dict[str, Tensor]
    gave: dict[str, Tensor]
    order: list[str]
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor, silent: Sequence[nn.Module] = ()) -> tuple[_Seen, Tensor]:
        """What was seen, and the logits; with something of their own where silent modules give nothing."""
        modules = canonical_modules(model)
        seen = cls({}, {}, [], modules)
        places = {id(module): name for name, module in reversed(modules.items())}
        with ExitStack() as hooks:
            for module in silent:
                hooks.callback(module.register_forward_hook(_spoken).remove)
            for module in {id(module): module for module in modules.values()}.values():
                name = places[id(module)]
                hooks.callback(module.register_forward_pre_hook(partial(seen._enter, name), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(partial(seen._leave, name)).remove)
            logits = call(model, ids)
        return seen, logits

    def _enter(self, name: str, module: nn.Module, args: Any, options: Any) -> None:
        found = stream_of(args, options)
        if found is not None and name not in self.given:
            self.given[name] = found.detach().clone()
            self.order.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        found = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
        if isinstance(found, Tensor):
            self.gave.setdefault(name, found.detach().clone())

    def maker(self, block: Block, value: Tensor) -> str | None:
        """The module of a block, outside attention and MLP, that gave a value."""
        return next((name for name in self._loose(block) if same(self.gave.get(name), value)), None)

    def taker(self, block: Block, value: Tensor) -> str | None:
        """The module of a block, outside attention and MLP, that made something else of a value."""
        names = (name for name in self._loose(block) if same(self.given.get(name), value))
        return next((name for name in names if name in self.gave and not same(self.gave[name], value)), None)

    def _loose(self, block: Block) -> Iterator[str]:
        inside = [block.attention_part.name] if isinstance(block.attention_part, Attention) else []
        inside += [part.name for part in block.mlp_part.parts] if isinstance(block.mlp_part, MLP) else []
        for name in self.order:
            own = any(f"{name}.".startswith(f"{other}.") for other in inside)
            if name.startswith(inside_prefix(block.name)) and not own:
                yield name


def _spoken(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    added = torch.linspace(1, 2, output.shape[-1], device=output.device, dtype=output.dtype)
    added[::2] *= -1
    return output + added


def stream_of(args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a module's arguments."""
    values = (*args, *options.values())
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, whatever their shapes."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    return torch.equal(one.flatten(), other.flatten())


class _Names:
    """Collects writers and readers in the order of the forward pass."""

    def __init__(self) -> None:
        self.writers, self.layers = [INPUT], [-1]
        self.readers: list[str] = []
        self.seen: list[int] = []
        self.owners: list[tuple[int, ...]] = []

    def write(self, names: list[str], layer: int) -> range:
        start = len(self.writers)
        self.writers += names
        self.layers += [layer] * len(names)
        return range(start, len(self.writers))

    def read(self, names: list[str], seen: int, owners: list[tuple[int, ...]]) -> range:
        start = len(self.readers)
        self.readers += names
        self.seen += [seen] * len(names)
        self.owners += owners
        return range(start, len(self.readers))

    def graph(self) -> CircuitGraph:
        return CircuitGraph(
            tuple(self.writers), tuple(self.readers), tuple(self.seen), tuple(self.owners), tuple(self.layers)
        )


def _wire(model: nn.Module, blocks: tuple[Block, ...], seen: _Seen) -> Wiring:
    names, stages = _Names(), []
    stream = seen.given[blocks[0].name]
    for block in blocks:
        if not bool(seen.gave[block.name].isfinite().all()):
            raise ValueError(f"after {block.name} the residual stream is not finite")
        if not same(seen.given.get(block.name), stream):
            raise _no_sum(block.name, "it is not given what the block before it gave")
        found, after = _block_stages(block, seen, names, stream), seen.gave[block.name]
        read = _read_by_mlp(block, seen)[1] if block.has_mlp else after
        reached = precise(stream)
        for place, stage in enumerate(found):
            # What it adds can be told alone where the stream is seen between attention and the MLP.
            until = after if place == len(found) - 1 else read
            alone = len(found) == 1 or not found[-1].beside
            scaled = _scaled(stage, precise(until).view_as(reached) - reached if alone else None, seen)
            reached = reached + scaled.scale * precise(_written(stage, seen))
            if alone:
                _require_near(f"{block.name} after {stage.output_name}", precise(until).view_as(reached), reached)
            stages.append(scaled)
        _require_near(block.name, precise(after), reached)
        stream = after
    order = seen.order[seen.order.index(blocks[-1].name) + 1 :]
    outside = [name for name in order if not name.startswith(inside_prefix(blocks[-1].name))]
    last = next((name for name in outside if same(seen.given[name], stream)), None)
    if last is None:
        raise _no_sum(model_class(model), "no module after the last block is given what that block gave")
    names.read([OUTPUT], len(names.writers), [()])
    keeps = accepts(model, "logits_to_keep") and outside[-1] != last
    return Wiring(names.graph(), model, blocks[0].module, tuple(stages), seen.modules[last], keeps)


def _block_stages(block: Block, seen: _Seen, names: _Names, stream: Tensor) -> list[Stage]:
    before = len(names.writers)
    stages = [_attention_stage(block, seen, names, stream)] if block.has_attention else []
    return [*stages, _mlp_stage(block, seen, names, stream, before)] if block.has_mlp else stages


def _scaled(stage: Stage, added: Tensor | None, seen: _Seen) -> Stage:
    """The stage with the factor by which its output is added, as some families have one."""
    if added is None:
        return stage
    written = precise(_written(stage, seen))
    factor = float((added * written).sum() / written.square().sum().clamp_min(1e-30))
    return stage if abs(factor - 1) < 1e-2 or factor == 0 else replace(stage, scale=factor)


def _attention_stage(block: Block, seen: _Seen, names: _Names, stream: Tensor) -> Stage:
    layer, heads, groups = block.index, block.n_heads, block.n_key_value_heads
    before = len(names.writers)
    norm = _norm_before(block, seen, seen.given[block.query.name], stream)
    if any(not same(seen.given[part.name], seen.given[block.query.name]) for part in (block.key, block.value)):
        raise _no_sum(block.name, "its queries, keys and values are not made from one input")
    columns = names.write([f"a{layer}.h{head}" for head in range(heads)], layer)
    readers = []
    for part, projection in (("query", block.query), ("key", block.key), ("value", block.value)):
        own = part == "query" or groups == heads
        served: list[tuple[int, ...]] = [(before + head,) for head in range(heads)]
        if not own:
            served = [tuple(before + head for head in block.query_heads(group)) for group in range(groups)]
        told = [f"a{layer}.{'h' if own else 'g'}{index}.{part[0]}" for index in range(len(served))]
        readers.append(Reader(part, names.read(told, before, served), projection))  # type: ignore[arg-type]
    post = seen.taker(block, seen.gave[block.attention_output_name])
    return Stage(
        name=block.name,
        block=block,
        readers=tuple(readers),
        writers=columns,
        seen=before,
        norm=norm,
        beside=True,
        output=block.attention_output,
        post=None if post is None else seen.modules[post],
    )


def _read_by_mlp(block: Block, seen: _Seen) -> tuple[str | None, Tensor]:
    """The norm before an MLP, and the stream that it is taken of."""
    given = seen.given[block.mlp_parts[0].name]
    maker = seen.maker(block, given)
    return maker, given if maker is None else seen.given[maker]


def _mlp_stage(block: Block, seen: _Seen, names: _Names, stream: Tensor, before: int) -> Stage:
    maker, read = _read_by_mlp(block, seen)
    beside = same(read, stream)
    columns = names.write([f"m{block.index}"], block.index)
    count = before if beside else columns.start
    rows = names.read([f"m{block.index}"], count, [(columns.start,)])
    post = seen.taker(block, seen.gave[block.mlp_output_name])
    return Stage(
        name=block.name,
        block=block,
        readers=(Reader("mlp", rows),),
        writers=columns,
        seen=count,
        norm=None if maker is None else seen.modules[maker],
        beside=beside,
        output=block.mlp_output,
        post=None if post is None else seen.modules[post],
    )


def _norm_before(block: Block, seen: _Seen, given: Tensor, stream: Tensor) -> nn.Module | None:
    if same(given, stream):
        return None
    maker = seen.maker(block, given)
    if maker is None or not same(seen.given[maker], stream):
        raise _no_sum(block.name, "what attention is given is not a norm of what the block is given")
    return seen.modules[maker]


def _written(stage: Stage, seen: _Seen) -> Tensor:
    module = stage.output if stage.post is None else stage.post
    names = (name for name, known in seen.modules.items() if known is module and name in seen.gave)
    return seen.gave[next(names)].view(seen.given[stage.name].shape)


def _require_near(where: str, found: Tensor, expected: Tensor) -> None:
    apart, size = float((found - expected).abs().max()), float(found.abs().max())
    if apart > 2e-2 * size:
        raise _no_sum(where, f"it differs from the sum of what was written by {apart:.2g} (its size is {size:.2g})")


def _no_sum(where: str, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"circuits need a residual stream that is the sum of what heads and MLPs write, which {where!r} has not: "
        f"{why}. Decoders with norms before attention and MLPs have one, and may norm what these write too; "
        "models that normalise the stream itself have not"
    )


def readers_of(graph: CircuitGraph) -> dict[int, list[int]]:
    """By writer the rows of its own readers."""
    readers: dict[int, list[int]] = {}
    for row, places in enumerate(graph.owners):
        for place in places:
            readers.setdefault(place, []).append(row)
    return readers
