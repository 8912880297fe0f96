"""What an MLP output projection sees and makes at single tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.editors import EditRequest
from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective


def key_covariance(
    model: nn.Module, module: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, damping: float
) -> Tensor:
    r"""Second moment of a projection's inputs over all tokens but padding, damped.

    .. math:: C = \tfrac1N \sum_t k_t k_t^\top + \epsilon \, \tfrac1d \mathrm{tr}(\cdot) \, I

    Args:
        model: Contains the projection.
        module: The projection.
        batches: As a causal language model takes them.
        damping: epsilon.

    Returns:
        Shape ``[d_in, d_in]``, float64.

    Raises:
        ValueError: There is no batch, or every input is zero.
    """
    total: Tensor | None = None
    count = 0
    device = next(model.parameters()).device
    for each in batches:
        batch = {name: value.to(device) for name, value in each.items()}
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0  # [B, T]
        keys = by_token(seen[0], batch)[mask].double()  # [N, d_in]
        total = keys.T @ keys if total is None else total.addmm_(keys.T, keys)
        count += len(keys)
    mean = 0.0 if total is None else float(total.diagonal().mean()) / count
    if total is None or not (math.isfinite(mean) and mean > 0):
        raise ValueError(
            f"the keys' covariance needs batches with inputs that are finite and not all zero; mean {mean}"
        )
    total /= count
    total.diagonal().add_(damping * mean)
    return total


def key_position(request: EditRequest, index: int) -> int:
    """The token whose input to the projection is the key: the subject's last, or the prompt's last.

    Args:
        request: The edits.
        index: Which of them.

    Returns:
        A position in its sample.

    Raises:
        ValueError: The prompt is empty, or its tokens cannot be matched with its text.
    """
    sample, prompt, subject = request.samples[index], request.prompts[index], request.subjects[index]
    answer = int((sample["labels"] != IGNORE_INDEX).nonzero()[0])
    if not answer:
        raise ValueError(f"the answer to the prompt {prompt!r} has no token before it to edit at")
    if subject is None:
        return answer - 1
    start, end = subject
    if request.tokenizer.is_fast:
        found = request.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        last = max(place for place, (first, stop) in enumerate(found["offset_mapping"]) if first < end and stop > start)
        ids = found["input_ids"][: last + 1]
    else:
        ids = request.tokenizer(prompt[:end], add_special_tokens=False, verbose=False)["input_ids"]
    return _matched(sample, ids, prompt[:end])


def _matched(sample: Sample, ids: Sequence[int], text: str) -> int:
    tokens = sample["input_ids"].tolist()
    for skipped in (0, 1):  # a bos token
        if tokens[skipped : skipped + len(ids)] == list(ids):
            return skipped + len(ids) - 1
    raise ValueError(
        f"the tokens of {text!r}, which ends with the subject, do not begin its sample, so the subject's last token "
        "cannot be told: use a fast tokenizer, or end the subject where a token ends"
    )


@contextmanager
def seen_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """Input and output of the module in the next forward pass."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[:] = args[0].detach(), output.detach()

    with _hooked(module, record):
        yield seen


@contextmanager
def added_to(
    module: nn.Module, batch: Mapping[str, Tensor], places: tuple[Tensor, Tensor], changes: Tensor
) -> Iterator[None]:
    """Adds to the module's output at one token of each row."""

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = by_token(output, batch).clone()
        moved[places] = moved[places] + changes.to(output.dtype)
        return moved.view(output.shape)

    with _hooked(module, add):
        yield


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def by_token(part: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, T, d]``, also where a family flattens batch and time."""
    return part.reshape(*batch["input_ids"].shape, part.shape[-1])
