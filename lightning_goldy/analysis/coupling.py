"""Knowledge coupling: how alike the gradients of two answers are, and so how much learning one moves the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling_capture import Capture, CouplingError
from lightning_goldy.analysis.coupling_passes import OnError, Passes, RunOptions
from lightning_goldy.analysis.coupling_pieces import Pieces, PieceSamples, joined_batch, piece_samples
from lightning_goldy.analysis.coupling_result import ROWS, CouplingResult, cosines_of_gram
from lightning_goldy.analysis.coupling_run import CouplingRun, Gram
from lightning_goldy.analysis.coupling_selection import Layers, Select, check_selection, selected_parameters
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.pieces import QUESTION_TEMPLATE
from lightning_goldy.core.sharding import Replicas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def knowledge_coupling(
    model: nn.Module,
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    template: str = QUESTION_TEMPLATE,
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
    progress: Callable[[int, int], None] | None = None,
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
    check_coupling_arguments(options, select, layers)
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # a compiled graph does not call hooks
    objective = objective or CausalLMObjective()
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    samples = piece_samples(pieces, tokenizer=tokenizer, objective=objective, template=template)
    with preserved(model):
        parameters = selected_parameters(model, select, layers, sample_batch=example_batch(model, samples))
        capture = Capture(model, objective, parameters)
        gram = CouplingRun(Passes(capture, samples, options, replicas, progress)).gram()
    matrix, norms = _finished(gram, samples, normalize=normalize, center=center)
    return CouplingResult(
        matrix=matrix,
        norms=norms,
        log_probs=gram.log_probs,
        pieces=samples.descriptions,
        failed=listed_failures(samples, gram.failures),
        parameters=tuple(parameters),
        measure="gradient",
        normalize=normalize,
        center=center,
        projection=projection,
        projection_error=gram.error,
        seconds=time.perf_counter() - began,
    )


def check_coupling_arguments(options: RunOptions, select: Select, layers: Layers) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    check_selection(select, layers)
    if options.chunk_size != "auto" and (not isinstance(options.chunk_size, int) or options.chunk_size < 1):
        raise ValueError(f"chunk_size is 'auto' or a number of pieces, at least 1; got {options.chunk_size!r}")
    for name, least in (("projection", 2), ("memory_limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if options.on_error not in get_args(OnError):
        raise ValueError(
            f"unknown on_error {options.on_error!r}; {suggestion(str(options.on_error), get_args(OnError))}"
        )


def example_batch(model: nn.Module, samples: PieceSamples) -> Any:
    """What an unregistered model can be called with to find its parts; None lets it be built."""
    first = next((sample for sample in samples.samples if isinstance(sample, dict)), None)
    if first is None:
        return None
    batch = joined_batch([first], next(model.parameters()).device)
    return {name: value for name, value in batch.items() if name != "labels"}


def listed_failures(samples: PieceSamples, failures: dict[int, str]) -> tuple[dict[str, Any], ...]:
    """The pieces that failed, in order."""
    return tuple(
        {"index": index, "id": samples.descriptions[index]["id"], "reason": reason}
        for index, reason in sorted(failures.items())
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
