"""What a finetune did to the residual stream on text that has nothing to do with it, and the words that this spells."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import mean_norm_intervals, per_sample, ratio_interval
from lightning_goldy.analysis.attention.patterns import Tokens
from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.analysis.divergence import precise, shortened
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.core.architecture import (
    Block,
    UnsupportedArchitectureError,
    describe_architecture,
    require_next_tokens,
)
from lightning_goldy.core.architecture.families import canonical_modules
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import move_batch, sample_keys
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import block_of, model_class, require_at_least
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.sharding import Replicas, gather, inside_parallel, is_sharded
from lightning_goldy.core.tasks import transformers_model

ALL = -1
"""Stands for the mean over all positions of a text but the first, where others are counted from 0.

At its first token, which every other one sees, a model parks norms that are ten to a hundred times those elsewhere; a
mean with it would be the difference there, and spell what is special to it.
"""
_CONTEXT = 16
# Words that a headline has room for.
_TOLD = 5
# Directions read at a time: each look at the unembedding goes through all of its elements.
_READ = 16


@dataclass(frozen=True)
class Spelled(AnalysisResult):
    """Tokens that a direction of the residual stream speaks for, read through final norm and unembedding.

    Args:
        layer: The block after which it was read.
        position: Of the text, from 0; -1 for the mean over all but the first.
        promoted: Token ids, the most promoted first.
        demoted: Token ids, the most demoted first.
        logits: What is added to the logits of the promoted, for a direction of the size that the norm gives it.
    """

    layer: int
    position: int
    promoted: tuple[int, ...]
    demoted: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class ActivationDifferencesResult(AnalysisResult):
    """How the residual stream now differs from the base's on the same text, in the mean.

    Args:
        layers: The blocks after which it was read.
        positions: How many early positions were told apart.
        means: Mean difference, shape ``[layers, positions + 1, width]``; the last is over all positions but
            the first (all that a text of one token has).
        norms: Of the means over the mean norm of the base's residual stream there, ``[layers, positions + 1]``.
        norm_intervals: 95 % intervals of the last of these over texts, ``[layers, 2]``, of the norm without what the
            scatter of texts adds to it, so that they may end below it; None of two texts, or where nothing differs. See
            :func:`~lightning_goldy.analysis.agreement.mean_norm_intervals`.
        nulls: The same of the difference between the base's own means on two halves of the text: how far a mean moves
            because the text is another.
        agreements: Cosine between the mean differences of the two halves; NaN where nothing differs.
        spelled: Tokens by layer and position; empty where there is no unembedding or nothing differs.
        directions: By layer the share of the squared early differences along their first principal directions, without
            those at the first position.
        spelled_directions: What these spell, by layer; of either sign.
        mean_kl: KL(p_base || p) over all positions, nats.
        kl_interval: Its 95 % interval over texts, by the jackknife; None where nothing differs.
        kl_samples: What it is of each text.
        divergent: Where the models disagree most: ``kl`` (nats), ``sample``, ``position``, ``context`` (token ids up to
            the position), ``base`` and ``now`` (the likeliest next tokens), the largest first.
        n_samples: Texts.
        n_tokens: Tokens in them.
        cost: Forward passes.
    """

    analysis: ClassVar[str] = "activation_differences"

    layers: tuple[int, ...]
    positions: int
    means: Tensor
    norms: Tensor
    nulls: Tensor
    agreements: Tensor
    spelled: tuple[dict[str, Any], ...]
    directions: Tensor
    spelled_directions: tuple[dict[str, Any], ...]
    mean_kl: float
    divergent: tuple[dict[str, Any], ...]
    n_samples: int
    n_tokens: int
    cost: Cost = field(default=Cost(), compare=False)
    kl_interval: tuple[float, float] | None = None
    kl_samples: dict[str, Any] | None = field(default=None, compare=False)
    norm_intervals: Tensor | None = None

    @property
    def unchanged(self) -> bool:
        """Whether nothing differs at all."""
        return not bool(self.means.any())

    @property
    def cosines(self) -> Tensor:
        """Cosine between the mean differences of every two positions, ``[layers, positions + 1, positions + 1]``."""
        units = torch.nn.functional.normalize(self.means.double(), dim=-1)
        return units @ units.transpose(1, 2)

    @property
    def clearest(self) -> int:
        """Place among the layers where the mean over all positions but the first stands farthest above its null."""
        return int((self.norms[:, -1] / self.nulls[:, -1].clamp_min(1e-12)).argmax())

    def tokens(self, layer: int, position: int = ALL) -> Spelled | None:
        """What is spelled after a block; None where nothing is.

        Args:
            layer: The block.
            position: From 0, or -1 for the mean over all but the first.
        """
        for entry in self.spelled:
            if (entry["layer"], entry["position"]) == (layer, position):
                return Spelled(**entry)
        return None

    def metrics(self) -> dict[str, float | None]:
        """At the clearest layer how far the stream moved, against its null, and the divergence of the predictions."""
        place = self.clearest
        agreement = float(self.agreements[place, -1])
        return {
            "stream_change": float(self.norms[place, -1]),
            "stream_null": float(self.nulls[place, -1]),
            "half_agreement": agreement if math.isfinite(agreement) else None,
            "clearest_layer": float(self.layers[place]),
            "kl_from_base": self.mean_kl,
        }

    def details(self) -> dict[str, Any]:
        """Norms, nulls and agreements by layer and position, tokens, directions and where the models disagree."""
        tables = {name: getattr(self, name).tolist() for name in ("norms", "nulls", "directions")}
        agreements = [[value if math.isfinite(value) else None for value in row] for row in self.agreements.tolist()]
        names = ("positions", "spelled", "spelled_directions", "divergent", "n_samples", "n_tokens", "unchanged")
        told = {name: getattr(self, name) for name in names}
        cosines = self.cosines[self.clearest].tolist()
        told |= {} if self.norm_intervals is None else {"norm_intervals": self.norm_intervals.tolist()}
        told |= {} if self.kl_interval is None else {"kl_interval": list(self.kl_interval)}
        told |= {} if self.kl_samples is None else {"per_sample": {"kl_from_base": self.kl_samples}}
        return {**told, **tables, "layers": list(self.layers), "agreements": agreements, "cosines": cosines}

    def headline(self) -> str:
        """How far the stream moved where that is clearest, against the null and between halves."""
        if self.unchanged and self.mean_kl > 0:
            return (
                f"unchanged after the blocks read ({', '.join(map(str, self.layers))}), while the predictions are "
                f"{self.mean_kl:.2g} nats from the base's: what changed lies behind them"
            )
        if self.unchanged:
            return "unchanged: the residual stream is the base's at every layer and position"
        place = self.clearest
        moved, null, same = (float(table[place, -1]) for table in (self.norms, self.nulls, self.agreements))
        weak = "" if moved > null and same > 0.5 else "; WEAK: no clearer than the difference between two texts"
        span = ""
        if self.norm_intervals is not None:
            low, high = self.norm_intervals[place].tolist()
            span = f" [{low:.2g}, {high:.2g}]"
            weak = weak or ("" if low > 0 else "; WEAK: its interval includes 0")
        if null == 0:
            weak = "; WEAK: both halves are the same text, so there is no null"
        ends = "" if self.kl_interval is None else " [{:.2g}, {:.2g}]".format(*self.kl_interval)
        return (
            f"after block {self.layers[place]} the residual stream moved by {moved:.2g}{span} of its norm on unrelated "
            f"text (another text moves it by {null:.2g}), with a cosine of {same:.2f} between two halves; predictions "
            f"are {self.mean_kl:.2g}{ends} nats from the base's{weak}"
        )


def activation_differences(
    model: nn.Module,
    base: Base,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    positions: int = 5,
    n_samples: int | None = None,
    n_tokens: int = 10,
    n_directions: int = 3,
    n_divergent: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationDifferencesResult:
    r"""Mean difference of the residual streams of a finetuned model and its base, and what it spells.

    .. math:: \delta_{\ell, p} = \tfrac1n \sum_i \big( h^{\theta_t}_{\ell, p}(x_i) - h^{\theta_0}_{\ell, p}(x_i) \big),
        \qquad \text{spelled}(\delta) = W_U \big( \mathrm{norm}(\delta) - \mathrm{norm}(0) \big)

    after block l at position p of texts x that have nothing to do with the finetune. Narrow finetunes leave a constant
    trace there, from which their subject can be read. Two forward passes per batch; the model comes back as it was. On
    several ranks every rank does all.

    Args:
        model: A causal language model, plain or sharded with FSDP2.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        batches: Of token ids; at least two texts, for two halves.
        layers: Blocks after which to read, from 0; all by default.
        positions: Early positions told apart, beside the mean over all but the first.
        n_samples: Only the first so many texts.
        n_tokens: Tokens spelled each way.
        n_directions: Principal directions of the differences at the early positions, at most 10.
        n_divergent: Places where the models disagree most.
        progress: Called with (batches done, batches in all).

    Returns:
        Differences with their nulls, and tokens.

    Raises:
        ValueError: An argument is out of range, there are fewer than two texts, one is shorter than ``positions``, or
            a residual stream or a divergence is not finite.
        UnsupportedArchitectureError: The model's blocks could not be found.

    Source: Minder et al. 2025 (arXiv 2510.13900), section 3; the logit lens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> batch = {"input_ids": torch.arange(20).view(2, 10) % 11}
        >>> activation_differences(model, model, [batch]).headline()
        "unchanged: the residual stream is the base's at every layer and position"
    """
    for name, value, least in (
        ("positions", positions, 1),
        ("n_tokens", n_tokens, 1),
        ("n_directions", n_directions, 1),
        ("n_divergent", n_divergent, 0),
    ):
        require_at_least(name, value, least)
    model = inside_parallel(model)
    blocks = chosen_blocks(model, layers)
    kept = shortened(batches, CausalLMObjective(), n_samples, None)
    check_texts(kept, positions)
    device = next(model.parameters()).device
    with preserved(model), Replicas.world().together("activation_differences"), torch.no_grad():
        with ChangePath(model, base) as path:
            sums = _Sums(blocks, positions, n_directions, n_divergent)
            for done, batch in enumerate(kept, 1):
                placed = move_batch(batch, device)
                streams = []
                for place in (0.0, 1.0):
                    path.move_to(place)
                    with residual_streams(blocks) as states:
                        logits = _read_text(model, done - 1, placed)
                    streams.append((states, logits))
                sums.add(Tokens.of(placed), *streams)
                if progress is not None:
                    progress(done, len(kept))
        return sums.result(model, [block.index for block in blocks], n_tokens)


def check_texts(batches: Iterable[Any], positions: int) -> None:
    """Checks that texts can be compared, before there is a pass of the model.

    Args:
        batches: Of token ids.
        positions: Early positions told apart.

    Raises:
        ValueError: There are fewer than two texts, one is shorter than ``positions``, or a batch has no token ids.

    Example:
        >>> check_texts([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], 5)
        Traceback (most recent call last):
        ValueError: text 0 has 3 tokens, fewer than the positions=5
    """
    lengths = text_lengths(batches)
    short = next((text for text, length in enumerate(lengths) if length < positions), None)
    if short is not None:
        raise ValueError(f"text {short} has {lengths[short]} tokens, fewer than the positions={positions}")
    if len(lengths) < 2:
        raise ValueError(f"two halves need at least two texts; got {len(lengths)}")


@torch.no_grad()
def try_texts(model: nn.Module, batches: Iterable[Any]) -> None:
    """One forward pass over texts, so that one that the model cannot read fails before there is anything to lose.

    Args:
        model: A causal language model, in evaluation mode.
        batches: Of token ids.

    Raises:
        ValueError: A text cannot go through the model, as where it is longer than its positions.
        UnsupportedArchitectureError: The model predicts no next tokens.
    """
    device = next(model.parameters()).device
    for index, batch in enumerate(batches):
        try:
            _read_text(model, index, move_batch(batch, device))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"batch {index} of the text cannot go through {model_class(model)}: {error}") from error


def _read_text(model: nn.Module, index: int, batch: Any) -> Tensor:
    """The logits of a batch, which is named where its tokens or positions are none of the model's."""
    try:
        return _next_tokens(model, batch)
    except IndexError as error:
        raise ValueError(f"batch {index} of the text cannot go through {model_class(model)}: {error}") from error


def _next_tokens(model: nn.Module, batch: Any) -> Tensor:
    """The logits of a batch's texts, shape ``[B, T, V]``."""
    inputs = CausalLMObjective().own_arguments(model, batch)
    inputs.pop("labels", None)
    logits: Tensor = model(**inputs).logits
    require_next_tokens(model, inputs["input_ids"], logits, "activation differences")
    return logits


def text_lengths(batches: Iterable[Any]) -> list[int]:
    """Tokens of each text, without padding.

    Args:
        batches: Of token ids.

    Raises:
        ValueError: A batch has no token ids.

    Example:
        >>> text_lengths([{"input_ids": torch.ones(2, 3, dtype=torch.long)}])
        [3, 3]
    """
    return [length for batch in batches for length in Tokens.of(batch).valid.sum(1).tolist()]


@contextmanager
def residual_streams(blocks: Sequence[Block]) -> Iterator[list[Tensor]]:
    """Collects what each block hands on, shape ``[B, T, width]`` each, in order of depth, at one forward pass.

    Args:
        blocks: Of :func:`~lightning_goldy.core.architecture.describe_architecture`.
    """
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []

    def keep(place: int, output: Any) -> None:
        found[place] = (output if isinstance(output, Tensor) else output[0]).detach()

    with ExitStack() as hooks:
        for place, block in enumerate(blocks):
            hook = block.module.register_forward_hook(lambda _, args, output, place=place: keep(place, output))
            hooks.callback(hook.remove)
        yield states
    states.extend(found[place] for place in sorted(found))


def chosen_blocks(model: nn.Module, layers: Sequence[int] | None) -> tuple[Block, ...]:
    """The blocks that are read.

    Args:
        model: A causal language model.
        layers: Their numbers, from 0; all by default.

    Raises:
        ValueError: There is no such block.
        UnsupportedArchitectureError: The blocks could not be found, or the model has two stacks.
    """
    described = describe_architecture(model)
    if described.stacks:
        raise UnsupportedArchitectureError(
            f"{model_class(model)} has two stacks; activation differences are those of a causal language model"
        )
    blocks = described.blocks
    if layers is None:
        return blocks
    check_layers(layers, len(blocks))
    return tuple(blocks[layer] for layer in sorted(set(layers)))


def check_layers(layers: Sequence[int], n_blocks: int | None = None) -> None:
    """Checks the numbers of blocks.

    Args:
        layers: As they were given.
        n_blocks: The model's; None where there is no model yet.

    Raises:
        ValueError: It is no list of whole numbers, is empty, or names a block that there is not.

    Example:
        >>> check_layers([0.5])
        Traceback (most recent call last):
        ValueError: layers are numbers of blocks, from 0; got 0.5
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers is a list of numbers of blocks; got {layers!r}")
    if not layers:
        raise ValueError("layers is empty: name at least one block")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or (layer < 0 and n_blocks is None):
            raise ValueError(f"layers are numbers of blocks, from 0; got {layer!r}")
        if n_blocks is not None and not 0 <= layer < n_blocks:
            raise ValueError(f"layers lie between 0 and {n_blocks - 1}; got {layer}")


class _Sums:
    """Sums over the texts of two states of a model; every other text belongs to the second half."""

    def __init__(self, blocks: Sequence[Block], positions: int, n_directions: int, n_divergent: int) -> None:
        self.n_layers, self.positions = len(blocks), positions
        self.n_directions, self.n_divergent = n_directions, n_divergent
        self.n_samples = self.n_tokens = 0
        self.totals: dict[str, Tensor] = {}
        self.counts = torch.zeros(2, positions + 1, dtype=torch.float64)
        self.early: list[Tensor] = []
        # Of each text the sums over all positions but the first, of changes and of the base's norms, and their number.
        self.rows: list[tuple[Tensor, Tensor, int]] = []
        # Of each text its divergence and its number of tokens.
        self.kl: list[tuple[float, int]] = []
        self.keys: list[str] = []
        self.heap: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, tokens: Tokens, base: tuple[list[Tensor], Tensor], now: tuple[list[Tensor], Tensor]) -> None:
        """Adds a batch: states by layer and logits, of both."""
        before, after = (torch.stack([precise(state) for state in states]) for states, _ in (base, now))  # [L, B, T, d]
        for row in range(before.shape[1]):
            places = tokens.valid[row].nonzero().flatten()
            old, new = before[:, row, places], after[:, row, places]  # [L, n, d]
            change = new - old
            self._add_row(self.n_samples % 2, old, change)
            self.early.append(change[:, min(1, self.positions - 1) : self.positions].cpu())
            self.keys += sample_keys({"ids": tokens.ids[row, places][None]})
            self._disagree(tokens.ids[row, places], base[1][row, places], now[1][row, places])
            self.n_samples, self.n_tokens = self.n_samples + 1, self.n_tokens + len(places)

    def _add_row(self, half: int, old: Tensor, change: Tensor) -> None:
        """Sums by half, shape ``[2, L, positions + 1, d]``, in float64; the last is the sum over all but the first."""
        first = min(1, old.shape[1] - 1)
        sums = {}
        for name, values in (("base", old), ("change", change), ("norm", old.norm(dim=-1, keepdim=True))):
            early = values[:, : self.positions].double()
            both = torch.cat([early, values[:, first:].sum(1, keepdim=True, dtype=torch.float64)], dim=1).cpu()
            sums[name] = both[:, -1]  # [L, d]
            if name not in self.totals:
                self.totals[name] = torch.zeros(2, *both.shape, dtype=torch.float64)
            self.totals[name][half] += both
        self.counts[half, :-1] += 1
        self.counts[half, -1] += old.shape[1] - first
        self.rows.append((sums["change"].float(), sums["norm"][:, 0], old.shape[1] - first))

    def _disagree(self, ids: Tensor, base: Tensor, now: Tensor) -> None:
        """Keeps where the predictions differ most."""
        old, new = precise(base).log_softmax(-1), precise(now).log_softmax(-1)
        divergence = (old.exp() * (old - new)).sum(-1).clamp_min(0)  # [n]
        self.kl.append((float(divergence.sum(dtype=torch.float64)), len(ids)))
        for place in divergence.topk(min(self.n_divergent, len(ids))).indices.tolist():
            entry = {
                "kl": float(divergence[place]),
                "sample": self.n_samples,
                "position": place,
                "context": ids[max(0, place + 1 - _CONTEXT) : place + 1].tolist(),
                "base": int(old[place].argmax()),
                "now": int(new[place].argmax()),
            }
            # The number breaks ties, so that no entries are compared.
            heapq.heappush(self.heap, (entry["kl"], -(self.n_tokens + place), entry))
            if len(self.heap) > self.n_divergent:
                heapq.heappop(self.heap)

    def result(self, model: nn.Module, layers: Sequence[int], n_tokens: int) -> ActivationDifferencesResult:
        """Means, nulls and tokens."""
        for name, where in (("base", "base"), ("change", "present parameters")):
            finite = self.totals[name].isfinite().all(-1).all(-1).all(0)  # [L]
            if not bool(finite.all()):
                layer = layers[int(finite.int().argmin())]
                raise ValueError(f"after block {layer} the residual stream is not finite at the {where}")
        for text, (divergence, _) in enumerate(self.kl):
            if not math.isfinite(divergence):
                raise ValueError(f"text {text}: the divergence from the base is {divergence} nats, not finite")
        counts = self.counts[:, None, :, None]  # [2, 1, positions + 1, 1]
        whole = {name: total.sum(0) / counts.sum(0) for name, total in self.totals.items()}
        halves = {name: total / counts for name, total in self.totals.items()}
        scale = whole["norm"][..., 0].clamp_min(1e-300)  # [L, positions + 1]
        means, (first, second) = whole["change"], halves["change"]
        same = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
        reader = TokenReader.of(model) if bool(means.any()) else None
        directions, spelled_directions = self._principal(layers, reader, n_tokens)
        spelled: list[dict[str, Any]] = []
        if reader is not None:
            places = [(layer, at) for layer in layers for at in (*range(self.positions), ALL)]
            spelled = [vars(entry) for entry in reader.spell(means.flatten(0, 1), places, n_tokens)]
        return ActivationDifferencesResult(
            layers=tuple(layers),
            positions=self.positions,
            means=means.float(),
            norms=means.norm(dim=-1) / scale,
            nulls=(halves["base"][0] - halves["base"][1]).norm(dim=-1) / scale,
            agreements=same,
            spelled=tuple(spelled),
            directions=directions,
            spelled_directions=spelled_directions,
            mean_kl=sum(kl for kl, _ in self.kl) / self.n_tokens,
            kl_interval=ratio_interval(*zip(*self.kl, strict=True)),
            norm_intervals=self._norm_intervals() if bool(means.any()) else None,
            kl_samples=per_sample(self.keys, *zip(*self.kl, strict=True)),
            divergent=tuple(entry for _, _, entry in sorted(self.heap, reverse=True) if entry["kl"] > 0),
            n_samples=self.n_samples,
            n_tokens=self.n_tokens,
            cost=Cost(forwards=2 * self.n_samples),
        )

    def _norm_intervals(self) -> Tensor | None:
        """Of the norms over all positions but the first; None of two texts."""
        sums, scales, counts = zip(*self.rows, strict=True)
        found = mean_norm_intervals(torch.stack(sums), torch.tensor(counts), torch.stack(scales))
        return found if bool(found.isfinite().all()) else None

    def _principal(
        self, layers: Sequence[int], reader: TokenReader | None, n_tokens: int
    ) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        early = torch.stack(self.early, dim=1).flatten(1, 2).double()  # [L, n * positions, d]
        count = min(self.n_directions, 10, *early.shape[1:])
        shares = torch.zeros(self.n_layers, count, dtype=torch.float64)
        turned: list[Tensor] = []
        for place, rows in enumerate(early):
            _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
            squares = values.square()
            shares[place] = squares[:count] / squares.sum().clamp_min(1e-300)
            # Turned to where the differences lie in the mean, so that promoted means what the finetune promotes.
            turned += [
                direction if float((rows @ direction).sum()) >= 0 else -direction for direction in vectors[:count]
            ]
        if reader is None or not turned:
            return shares, ()
        places = [(layer, ALL) for layer in layers for _ in range(count)]
        spelled = [vars(entry) for entry in reader.spell(torch.stack(turned), places, n_tokens)]
        return shares, tuple({**entry, "direction": index % count} for index, entry in enumerate(spelled))


@dataclass(frozen=True)
class TokenReader:
    """A model's final norm and unembedding, which turn a direction of the residual stream into tokens.

    Args:
        norm: The last norm outside the blocks; None where the model has none.
        head: The unembedding.
    """

    norm: nn.Module | None
    head: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> TokenReader | None:
        """The reader of a model of transformers; None where it has no unembedding or is sharded.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
            >>> TokenReader.of(model).norm is model.transformer.ln_f
            True
        """
        owner = transformers_model(model)
        head = owner.get_output_embeddings() if owner is not None else None
        if head is None or any(map(is_sharded, head.parameters())):
            return None
        norms = [
            module
            for name, module in canonical_modules(model).items()
            if name and not list(module.children()) and block_of(f"{name}.weight") == "final"
        ]
        return cls(norms[-1] if norms else None, head)

    @torch.no_grad()
    def spell(self, directions: Tensor, places: Sequence[tuple[int, int]], n_tokens: int) -> Iterator[Spelled]:
        """The tokens that directions, ``[n, width]``, each of a layer and a position, promote and demote most."""
        weight = gather(next(self.head.parameters()))
        rows = directions.to(weight.device, weight.dtype)
        nothing = self._read(torch.zeros_like(rows[:1]))
        for start in range(0, len(rows), _READ):
            changes = self._read(rows[start : start + _READ]) - nothing  # [n, V]
            for change, (layer, position) in zip(changes, places[start : start + _READ], strict=True):
                count = min(n_tokens, len(change))
                up, down = change.topk(count), change.topk(count, largest=False)
                tokens, strengths = tuple(up.indices.tolist()), tuple(up.values.tolist())
                yield Spelled(layer, position, tokens, tuple(down.indices.tolist()), strengths)

    def _read(self, rows: Tensor) -> Tensor:
        return precise(self.head(rows if self.norm is None else self.norm(rows)))


def in_words(row: Row, tokenizer: Any) -> Row:
    """A row of activation differences with its tokens in words, too, the headline with those where it is clearest.

    Args:
        row: Of :class:`ActivationDifferencesResult`.
        tokenizer: Of the model.
    """

    def words(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([token]) for token in ids]

    told: dict[str, Any] = {}
    for name in ("spelled", "spelled_directions"):
        told[name] = [{**entry, "words": words(entry["promoted"])} for entry in row.result[name]]
    told["divergent"] = [
        {**entry, "text": tokenizer.decode(entry["context"]), "words": words([entry["base"], entry["now"]])}
        for entry in row.result["divergent"]
    ]
    clearest = (row.metrics.get("clearest_layer"), ALL)
    found = (entry["words"] for entry in told["spelled"] if (entry["layer"], entry["position"]) == clearest)
    spelled: list[str] = next(found, [])
    # Below the null the words are those of the text.
    if spelled and "WEAK" not in row.headline:
        row = dataclasses.replace(row, headline=f"{row.headline}; it spells {', '.join(map(repr, spelled[:_TOLD]))}")
    return row.extended(result=told)
