r"""Forward passes of a wired decoder: recorded, with gradients at every reader, or with single edges patched.

In a patched run every reader is given

.. math:: x_v = x'_v + \sum_{u: (u, v) \text{ kept}} (u - u'),

x' and u' of the run that is patched in, u of the patched run itself: what is outside the circuit says what it says
there. A reader all of whose edges are kept reads the stream as it is, and one without any reads x' itself, so that the
whole graph is the clean run and the empty one the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.circuits.graph import Reader, Stage, Wiring, linear_map, stream_of
from lightning_goldy.analysis.divergence import precise


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
