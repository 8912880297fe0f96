"""Knowledge coupling: how alike the gradients of two answers are, and so how much learning one moves the other."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling.gram import (
    Block,
    BlockStore,
    FolderBlocks,
    MemoryBlocks,
    Projection,
    RowBuffer,
    Rows,
    inner_products,
    squared_norms,
)
from lightning_goldy.analysis.coupling.passes import (
    RECOVERABLE,
    Capture,
    CouplingError,
    Footprint,
    OnError,
    Progress,
    RunOptions,
    made_passes,
)
from lightning_goldy.analysis.coupling.pieces import (
    Layers,
    Pieces,
    PieceSamples,
    Select,
    check_selection,
    joined_batch,
    piece_samples,
    sample_length,
    selected_parameters,
    signature,
)
from lightning_goldy.analysis.coupling.statistics import ROWS, CouplingResult, cosines_of_gram
from lightning_goldy.analysis.result import Cost, total_cost
from lightning_goldy.core.architecture.blocks import of_expert
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import block_of, canonical_name, model_class
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, AnswerTokens
from lightning_goldy.core.sharding import RankError, Replicas, gather
from lightning_goldy.core.store import available_memory, raw_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Activations that a pass may keep on a CPU, bytes: passes of more rows are hardly faster there.
_CPU_ACTIVATIONS = 128 << 20
# Pieces in a block: so many that building gradients costs little beside multiplying them.
_BLOCK_SIZE, _FOLDER_BLOCK_SIZE = 256, 1024
_PROJECTED = "projected gradient"


class Gram(NamedTuple):
    """Inner products of the gradients of all pieces.

    Args:
        matrix: Shape ``[N, N]``, float64; zero where a piece failed.
        squares: Squared norms, exact also after a projection; NaN where a piece failed.
        log_probs: Mean log-probability of each answer, nats; NaN where a piece failed.
        failures: Why pieces failed, by number.
        error: Bound on the root mean square error of a cosine; None without a projection.
        precision: What the rows were multiplied in.
        cost: Passes, over all replicas.
    """

    matrix: Tensor
    squares: Tensor
    log_probs: Tensor
    failures: dict[int, str]
    error: float | None
    precision: torch.dtype
    cost: Cost = Cost()


class CouplingRun:
    """One computation of all inner products: passes over the pieces, blocks of gradients, their products.

    Args:
        capture: Gives gradients of pieces.
        pieces: The samples.
        options: How to go about it.
        replicas: Share the blocks.
        progress: Called with (pieces done, pieces in all) on this rank.
    """

    def __init__(
        self, capture: Capture, pieces: PieceSamples, options: RunOptions, replicas: Replicas, progress: Progress | None
    ) -> None:
        self.capture, self.pieces, self.options = capture, pieces, options
        self.replicas, self.progress = replicas, progress
        self.samples = {index: sample for index, sample in enumerate(pieces.samples) if sample is not None}
        self.lengths = {index: sample_length(sample) for index, sample in self.samples.items()}
        # The longest first, so that memory that does not suffice is found out at once.
        order = [(-self.lengths[index], signature(sample), index) for index, sample in self.samples.items()]
        self.order = [index for *_, index in sorted(order)]
        self.projection = None if options.projection is None else Projection(options.projection, seed=options.seed)
        self.names = list(capture.parameters) if self.projection is None else [_PROJECTED]
        self.tokens = 1
        """Tokens in one pass, unless the number of pieces is given."""

    def gram(self) -> Gram:
        """Runs everything; every rank must call.

        Raises:
            CouplingError: A piece failed and that is an error, or the memory does not suffice.
            StoreError: The workspace is of another run.
        """
        replicas = self.replicas
        with self.capture.attached() as passes:
            with replicas.together("a first piece"):
                footprint = self.probe()
            common = passes()
            store, blocks = self._planned(footprint)
            with replicas.together("the passes over the pieces"):
                self.fill(store, blocks)
        # By tensor each gradient is built once in all; of a folder, whose products are of whole pieces, by block.
        by_tensor = not store.shared and len(self.names) >= replicas.size > 1
        names = replicas.deal(self._by_size()) if by_tensor else self.names
        store.exchange(len(blocks), replicas, names)
        summaries = [store.summary(number) for number in range(len(blocks))]
        numbers = range(len(blocks) - 1, -1, -1)
        with replicas.together("the products of gradients"):
            for number in numbers if by_tensor else replicas.deal(numbers):
                if not store.has_products(number):
                    store.put_products(number, self._products(store, summaries, number, names))
        with replicas.together("the products of gradients"):
            result = self._assembled(store, summaries, vectors_only=not footprint.rows)
        store.finish(len(blocks))
        if not store.shared and replicas.size > 1:
            matrix = replicas.sum_(result.matrix.to(self.capture.device))
            result = result._replace(matrix=matrix.cpu())
        return result._replace(cost=total_cost(replicas, passes(), common))

    def probe(self) -> Footprint:
        """Tries pieces until one runs; says what the others will need.

        Raises:
            CouplingError: A piece failed and that is an error, or all did.
        """
        reasons = dict(self.pieces.failures)
        for index, reason in reasons.items():
            self.failed(index, reason)
        for index in self.order:
            batch = joined_batch([self.samples[index]], self.capture.device)
            try:
                return self.capture.probe(batch, self.lengths[index])
            except (CouplingError, RankError, torch.OutOfMemoryError):
                raise
            except RECOVERABLE as error:
                reasons[index] = self.failed(index, str(error), error)
        index, reason = next(iter(reasons.items()))
        raise CouplingError(f"every piece failed, the first so: {self.pieces.name(index)}: {reason}")

    def fill(self, store: BlockStore, blocks: Sequence[list[int]]) -> None:
        """Captures this replica's share of the blocks, unless they are there."""
        numbers = self.replicas.share(range(len(blocks)))
        total, done = sum(len(blocks[number]) for number in numbers), 0
        # Of a folder where some products are there, only the rows that others need.
        missing = [number for number in range(len(blocks)) if not store.has_products(number)]
        for number in numbers:
            needed = any(number <= other for other in missing)
            if needed and not store.has_block(number):
                store.put_block(number, self._captured(blocks[number], store.kept, done, total))
            done += len(blocks[number])
            if self.progress is not None:
                self.progress(done, total)

    def _captured(self, indices: list[int], kept: torch.device, done: int, total: int) -> Block:
        block = Block()
        buffers = {name: RowBuffer(len(indices), kept) for name in self.names}

        def run(chunk: list[int]) -> tuple[Tensor, dict[str, Rows]]:
            batch = joined_batch([self.samples[index] for index in chunk], self.capture.device)
            return self.capture.run(batch, len(chunk))

        halve = self._halve if self.options.chunk_size == "auto" else None
        for chunk, outcome in made_passes(indices, self._fits, run, on_memory=halve):
            if isinstance(outcome, Exception):
                block.failures[chunk[0]] = self.failed(chunk[0], str(outcome), outcome)
            else:
                self._add(block, buffers, chunk, *outcome)
            if self.progress is not None:
                self.progress(done + len(block.indices) + len(block.failures), total)
        if block.indices:
            block.parts = {name: buffer.rows() for name, buffer in buffers.items()}
        return block

    def _add(
        self, block: Block, buffers: dict[str, RowBuffer], chunk: list[int], log_probs: Tensor, rows: dict[str, Rows]
    ) -> None:
        squares = torch.stack([squared_norms(part).to(log_probs.device) for part in rows.values()]).cpu()
        known = log_probs.double().tolist()
        good = []
        for at, index in enumerate(chunk):
            reason = _reason(known[at], squares[:, at], list(rows))
            if reason:
                block.failures[index] = self.failed(index, reason)
            else:
                good.append(at)
        if not good:
            return
        if len(good) < len(chunk):
            rows = {name: part.of(good) for name, part in rows.items()}
        block.indices += [chunk[at] for at in good]
        block.squares += squares.sum(dim=0)[good].tolist()
        block.log_probs += [known[at] for at in good]
        if self.projection is not None:
            rows = {_PROJECTED: Rows(self.projection(rows))}
        for name, part in rows.items():
            buffers[name].add(part)

    def _halve(self) -> None:
        torch.cuda.empty_cache()
        self.tokens = max(1, self.tokens // 2)

    def _fits(self, chunk: list[int], index: int) -> bool:
        if not self.capture.batched or signature(self.samples[chunk[0]]) != signature(self.samples[index]):
            return False
        if self.options.chunk_size != "auto":
            return len(chunk) < self.options.chunk_size
        return (len(chunk) + 1) * self.lengths[chunk[0]] <= self.tokens

    def failed(self, index: int, reason: str, error: Exception | None = None) -> str:
        """The reason, where a failed piece is no error."""
        if self.options.on_error == "raise":
            raise CouplingError(f"{self.pieces.name(index)}: {reason}") from error
        return reason

    def _planned(self, footprint: Footprint) -> tuple[BlockStore, list[list[int]]]:
        """Where rows go, and which pieces make a block; the same on every rank."""
        # Sharded processes must make the same passes, so that they too must agree.
        ranks, device = Replicas.world() if self.capture.sharded else self.replicas, self.capture.device
        limit = self.options.memory_limit or available_memory() // (2 * ranks.size)
        budget = _CPU_ACTIVATIONS if device.type != "cuda" else torch.cuda.mem_get_info(device)[0] // 3
        tokens = int(budget / max(1.0, footprint.activations))
        limit, self.tokens = map(min, zip(*ranks.gather_objects((limit, tokens)), strict=True))
        projection, order = self.projection, self.order
        needs = [footprint.rows * length + footprint.fixed for length in self.lengths.values()]
        if projection is not None:
            needs = [float(projection.dimensions * self.capture.precision.itemsize)] * len(needs)
        total = math.fsum(needs)
        store: BlockStore
        if self.options.workspace is not None:
            store = self._folder(max(1, min(_FOLDER_BLOCK_SIZE, int(limit / 2 / max(needs)))))
            size = store.block_size
        elif total <= limit:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            store = MemoryBlocks(device if total <= 0.4 * free else torch.device("cpu"), device)
            size = min(_BLOCK_SIZE, math.ceil(len(order) / self.replicas.size))
        else:
            raise CouplingError(
                f"the gradients of {len(order)} pieces need about {total / 2**30:.3g} GiB, more than the "
                f"{limit / 2**30:.3g} GiB of memory_limit: pass workspace=, a folder on a disk with room for them, or "
                "projection=8192, or select fewer layers"
            )
        return store, [order[at : at + size] for at in range(0, len(order), size)]

    def _folder(self, block_size: int) -> FolderBlocks:
        assert self.options.workspace is not None
        if self.capture.sharded:
            raise CouplingError("workspace= needs a model that every process holds whole; under FSDP2 pass projection=")
        settings = _run_settings(self.capture, self.pieces, self.options)
        # The first rank decides the size of the blocks; a folder that is there already has decided.
        for turn in (True, False):
            with self.replicas.together("opening the workspace"):
                if (self.replicas.rank == 0) is turn:
                    folder = FolderBlocks(
                        self.options.workspace, settings, block_size=block_size, compute=self.capture.device
                    )
        return folder

    def _by_size(self) -> list[str]:
        """The tensors, the largest first."""
        parameters = self.capture.parameters
        return sorted(self.names, key=lambda name: -parameters[name].numel() if name in parameters else 0)

    def _products(self, store: BlockStore, summaries: Sequence[Block], number: int, names: Sequence[str]) -> Tensor:
        sizes = [len(block.indices) for block in summaries[: number + 1]]
        total = torch.zeros(sizes[-1], sum(sizes), dtype=torch.float64, device=self.capture.device)
        for name in names if sizes[-1] else ():
            own = store.part(number, name)
            for other, target in enumerate(total.split(sizes, dim=1)):
                if other == number:
                    target += inner_products(own)
                elif sizes[other]:
                    target += inner_products(own, store.part(other, name))
        return total.cpu()

    def _assembled(self, store: BlockStore, summaries: Sequence[Block], *, vectors_only: bool) -> Gram:
        pieces, projection = self.pieces, self.projection
        count = len(pieces.samples)
        matrix = torch.zeros(count, count, dtype=torch.float64)
        squares, log_probs = (torch.full((count,), math.nan, dtype=torch.float64) for _ in range(2))
        failures, before = dict(pieces.failures), torch.empty(0, dtype=torch.int64)
        for number, block in enumerate(summaries):
            own = torch.tensor(block.indices, dtype=torch.int64)
            before = torch.cat([before, own])
            products = store.products(number)
            if products is not None:
                matrix[own[:, None], before] = products
                matrix[before[:, None], own] = products.T
            squares[own] = torch.tensor(block.squares, dtype=torch.float64)
            log_probs[own] = torch.tensor(block.log_probs, dtype=torch.float64)
            failures.update(block.failures)
        error = None if projection is None else projection.error(vectors_only=vectors_only)
        return Gram(matrix, squares, log_probs, dict(sorted(failures.items())), error, self.capture.precision)


def _reason(log_prob: float, squares: Tensor, names: Sequence[str]) -> str:
    """Why a piece has no direction to compare; empty when it has one."""
    if not math.isfinite(log_prob):
        return f"the mean log-probability of its answer is {log_prob}"
    for name, square in zip(names, squares.tolist(), strict=True):
        if not math.isfinite(square):
            return f"its gradient with respect to {name} is not finite"
    if not float(squares.sum()) > 0:
        return "its gradient with respect to the selected parameters is zero, so it has no direction"
    return ""


def _run_settings(capture: Capture, pieces: PieceSamples, options: RunOptions) -> dict[str, str]:
    """Names and hashes of all that decides the numbers of a coupling; every rank must call."""
    device, model, objective = capture.device.type, capture.model, capture.objective
    names, function = list(capture.parameters), getattr(getattr(objective, "function", None), "__qualname__", "")
    random = f"{options.projection} dimensions with seed {options.seed}"
    samples = (
        part for sample in pieces.samples for part in ((b"\1",) if sample is None else (b"\2", *batch_tensors(sample)))
    )
    named = (*model.named_parameters(), *model.named_buffers())
    weights = (part for name, tensor in named for part in (canonical_name(name).encode(), gather(tensor)))
    return {
        "pieces": f"{len(pieces.samples)} with hash {_hash(samples)}",
        "weights": _hash(weights),
        "model": f"{model_class(model)} with hash {_hash([repr(model).encode()], size=8)}",
        "selection": f"{len(names)} tensors with hash {_hash([repr(names).encode()], size=8)}",
        "objective": f"{type(objective).__module__}.{type(objective).__qualname__} {function}".strip(),
        "projection": "none" if options.projection is None else random,
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none",
    }


def _hash(parts: Iterable[Any], *, size: int = 16) -> str:
    """Of tensors and bytes."""
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(raw_bytes(part))
        else:
            digest.update(part)
    return digest.hexdigest()


def knowledge_coupling(
    model: nn.Module,
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    template: str = QUESTION_TEMPLATE,
    tokens: AnswerTokens = "answer",
    select: Select = "mlp_output",
    layers: Layers = None,
    normalize: bool = True,
    center: bool = False,
    chunk_size: int | Literal["auto"] = "auto",
    projection: int | None = None,
    seed: int = 0,
    workspace: str | Path | None = None,
    memory_limit: int | None = None,
    on_error: OnError = "raise",
    progress: Progress | None = None,
    split_over_ranks: bool = True,
) -> CouplingResult:
    r"""Cosines between the gradients of the answers' log-probabilities.

    .. math::
        C_{ij} = \frac{\langle g_i, g_j \rangle}{\lVert g_i \rVert \, \lVert g_j \rVert}, \qquad
        g_i = \nabla_\theta \frac{1}{|T_i|} \sum_{t \in T_i} \log p_\theta(x_t \mid x_{<t})

    over all tokens T of an answer and the chosen tensors. A small step that raises the log-probability of answer i
    changes that of answer j in proportion. No gradient is ever stored: of a linear layer it is a sum over positions,
    :math:`\sum_t b_t \otimes a_t`, whose inner products follow from the layer's inputs a and the gradients b at its
    outputs, which one backward pass gives for many pieces at once; nothing but activations is differentiated. Vectors
    such as norms, and weights that do not belong to one linear layer, such as embeddings, are differentiated piece by
    piece. A first piece is differentiated both ways to find out which are which.

    The model comes back as it was. The order of the pieces, padding, chunks and the number of ranks change nothing but
    rounding. On several ranks the pieces are shared out; every rank must call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        pieces: Knowledge pieces, or batches that the objective understands, one piece a row; the same on every rank.
        tokenizer: The model's, for knowledge pieces.
        objective: What to differentiate; next-token prediction by default.
        template: The prompt of a knowledge piece.
        tokens: Which tokens of a knowledge piece's answer count: ``answer`` all of it, ``answer_with_end`` the
            end-of-text token too, ``first_token`` the first. Of batches their labels decide.
        select: ``mlp_output`` or ``attention_output`` (the weight of that projection in every block), patterns of
            parameter names, or a space. Frozen parameters count too; under LoRA the first two mean the adapted weights,
            and ``["*lora_*"]`` the adapters.
        layers: Only blocks ``(a, b)``, from a up to but not including b, as Python counts; or the ``"last:4"``.
        normalize: False gives inner products, nats squared per squared parameter unit.
        center: Subtracts the mean gradient over the pieces before.
        chunk_size: Pieces in one pass; ``auto`` as many as keep 128 MiB of activations on a CPU, or a third of the free
            memory of a GPU.
        projection: Keep so many random combinations of each gradient only, e.g. 8192, instead of all of it: for many
            pieces. Norms stay exact.
        seed: Of the projection.
        workspace: A folder of this run alone for blocks of gradients that memory has no room for; an interrupted run
            goes on where it stopped. The largest files go when all is done.
        memory_limit: Bytes that gradients may take in memory; half of what is available by default.
        on_error: ``raise``, or ``nan`` to list pieces that fail and leave their rows NaN: pieces that cannot be
            tokenised or run, and gradients that are zero or not finite.
        progress: Called with (pieces done, pieces in all) on this rank.
        split_over_ranks: Whether to share pieces out over the ranks of an initialised process group.

    Returns:
        The matrix with its pieces.

    Raises:
        CouplingError: A piece failed, the memory does not suffice, or the model is split in a way that hides its
            layers.
        ValueError: An argument is malformed, or there is no piece.
        SpaceError: The selection matches no parameter.
        StoreError: The workspace holds another run.

    Source: gradient inner products between examples: Charpiat et al., "Input similarity from the neural network
        perspective" (2019), and TracIn, Pruthi et al. (2020); from activations as in Goodfellow, "Efficient per-example
        gradient computations" (2015), carried over to pairs.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
        >>> result = knowledge_coupling(GPT2LMHeadModel(config), [{"input_ids": ids}])
        >>> result.matrix.shape, round(float(result.matrix[0, 2]), 5), result.n_layers
        (torch.Size([3, 3]), 1.0, 2)
    """
    options = RunOptions(chunk_size, projection, seed, workspace, memory_limit, on_error)
    check_selection(select, layers)
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # a compiled graph does not call hooks
    objective = objective_for(model, objective)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    samples = piece_samples(pieces, tokenizer=tokenizer, objective=objective, template=template, tokens=tokens)
    with preserved(model):
        parameters = selected_parameters(model, select, layers, sample_batch=samples.example(model))
        capture = Capture(model, objective, parameters)
        gram = CouplingRun(capture, samples, options, replicas, progress).gram()
    matrix, norms = _finished(gram, samples, normalize=normalize, center=center)
    return CouplingResult(
        matrix=matrix,
        norms=norms,
        log_probs=gram.log_probs,
        pieces=samples.descriptions,
        failed=samples.listed(gram.failures),
        parameters=tuple(parameters),
        measure="gradient",
        normalize=normalize,
        center=center,
        projection=projection,
        projection_error=gram.error,
        seconds=time.perf_counter() - began,
        cost=gram.cost,
    )


def _finished(gram: Gram, samples: PieceSamples, *, normalize: bool, center: bool) -> tuple[Tensor, Tensor]:
    """The matrix and the norms, from inner products."""
    matrix, squares = gram.matrix, gram.squares
    good = torch.isfinite(squares)
    # A projection's own squared norms have its error; these are exact.
    matrix.diagonal()[good] = squares[good]
    if center:
        squares = _center(gram, good, samples)
    norms = squares.sqrt()
    if normalize:
        matrix = cosines_of_gram(matrix, norms)
    matrix[~good] = torch.nan
    matrix[:, ~good] = torch.nan
    return matrix.to(gram.precision), norms


def _center(gram: Gram, good: Tensor, samples: PieceSamples) -> Tensor:
    """Subtracts the mean gradient, in place: H G H over the pieces that did not fail. Returns the squared norms."""
    matrix = gram.matrix
    count, before = int(good.sum()), matrix.diagonal().clone()
    means = matrix.sum(dim=1) / count  # failed pieces have zeros
    mean = means[good].mean()
    for start in range(0, len(matrix), ROWS):
        matrix[start : start + ROWS] -= means[start : start + ROWS, None] + means - mean
    squares = torch.where(good, matrix.diagonal(), torch.nan)
    # Less than rounding leaves of a gradient that is the mean.
    rounding = 1e-12 if gram.precision == torch.float64 else 1e-5
    lost = (good & ~(squares > rounding * before)).nonzero().flatten().tolist()
    if lost:
        raise CouplingError(
            f"center=True leaves nothing of {samples.name(lost[0])}: its gradient is the mean over the {count} pieces"
        )
    return squares


def layer_gradient_norms(
    model: nn.Module,
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    template: str = QUESTION_TEMPLATE,
    tokens: AnswerTokens = "answer",
    select: Select = "mlp_output",
    layers: Layers = None,
) -> dict[str, Tensor]:
    r"""Norms of the gradients of the answers' log-probabilities, by block.

    .. math:: \lVert g_i^l \rVert, \qquad \lVert g_i \rVert^2 = \sum_l \lVert g_i^l \rVert^2

    One ordinary backward pass per piece, so for a few pieces only: the way that ``knowledge_coupling`` avoids, and a
    check on it. The model comes back as it was.

    Args:
        model: A plain module.
        pieces: As for ``knowledge_coupling``.
        tokenizer: The model's, for knowledge pieces.
        objective: What to differentiate; next-token prediction by default.
        template: The prompt of a knowledge piece.
        tokens: Which tokens of a knowledge piece's answer count: ``answer`` all of it, ``answer_with_end`` the
            end-of-text token too, ``first_token`` the first. Of batches their labels decide.
        select: As for ``knowledge_coupling``.
        layers: As for ``knowledge_coupling``.

    Returns:
        By block, in the model's order, a tensor of shape ``[N]``, float64, nats per parameter unit.

    Raises:
        ValueError: A piece cannot be tokenised, or an argument is malformed.
        SpaceError: The selection matches no parameter.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> found = layer_gradient_norms(GPT2LMHeadModel(config), [{"input_ids": torch.tensor([[1, 2, 3]])}])
        >>> list(found), found["transformer.h.1"].shape
        (['transformer.h.0', 'transformer.h.1'], torch.Size([1]))
    """
    check_selection(select, layers)
    objective = objective_for(model, objective)
    samples = piece_samples(pieces, tokenizer=tokenizer, objective=objective, template=template, tokens=tokens)
    for index, reason in samples.failures.items():
        raise ValueError(f"{samples.name(index)}: {reason}")
    columns: dict[str, list[float]] = {}
    with preserved(model):
        parameters = selected_parameters(model, select, layers, sample_batch=samples.example(model))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        device = next(model.parameters()).device
        for sample in samples.samples:
            log_prob = objective.log_probs(model, joined_batch([sample], device)).sum()
            gradients = torch.autograd.grad(log_prob, list(parameters.values()), materialize_grads=True)
            squares = dict.fromkeys(map(block_of, parameters), 0.0)
            for name, gradient in zip(parameters, gradients, strict=True):
                squares[block_of(name)] += float(of_expert(name, gradient).double().square().sum())
            for block, square in squares.items():
                columns.setdefault(block, []).append(square**0.5)
    return {block: torch.tensor(values, dtype=torch.float64) for block, values in columns.items()}
