"""A door for code written against ``golden_params``: its names, arguments and result keys over this package.

New code calls :mod:`lightning_goldy.analysis`. What differs from the original, because the original was wrong:

- Everything runs in evaluation mode. The original scored in training mode, so that dropout changed every gradient, and
  left the model there.
- The model's weights, gradients, modes and random states come back as they were. The original cleared gradients, took
  numbers from the global random state, and restored weights only when nothing failed.
- The fluctuation strategy decides what is found. In the original it moved a pool whose masks were thrown away: the
  result was always the top share of the summed gradients.
- Scores are of the responses, and then of the divergence itself at partly masked weights. The original took gradients
  of the mean log-probability over the whole vocabulary, in which the response had no part.
- ``kl_divergence`` is the mean over the response tokens, in nats, on samples that did not choose the mask. The original
  averaged over padding too, on samples that had chosen it.
- Samples are encoded one at a time, so that padding plays no part and every response begins where its own query ends.
  The original cut all rows of a batch at the length of the longest query.
- Exactly the budget is masked, rounded half up as everywhere in this package; the original rounded up.
- Every rank takes part. In the original, rank 0 worked alone and the others waited for a barrier it never reached.
- ``get_golden_params`` heeds ``sample_size``; the original always took the first 128.
- An empty data set or a share of 0 is an error, not an empty result.
- Masks are saved as safetensors, or their summary as JSON. The original pickled them; loading a pickle runs its code.
"""

from __future__ import annotations

import functools
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.continuations import GenerationComparison, compare_generations
from lightning_goldy.analysis.golden import Fluctuation, Search, golden_parameters, reverse_golden_parameters
from lightning_goldy.core.files import atomic_write
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import require_at_least
from lightning_goldy.core.objective import IGNORE_INDEX
from lightning_goldy.core.pieces import padded_batches
from lightning_goldy.report import generations_table
from lightning_goldy.report.formatting import show

PromptFunction = Callable[[list[Any], Any], tuple[Any, Any]]
"""``prompt_func(samples, processing_class)`` gives token ids of the queries, and of the queries with responses."""

__all__ = ["GoldilocksMixin", "get_reverse_golden_params"]


def get_reverse_golden_params(
    model: nn.Module,
    eval_dataset: Sequence[Any],
    prompt_func: PromptFunction,
    processing_class: Any,
    top_k_percent: float = 30.0,
    chunk_size: int = 4,
    inflation_step: float = 1.2,
    max_inflation_factor: float = 2.0,
    decay_factor: float = 0.9,
    min_delta: float = 0.01,
    save_path: str | None = None,
    num_samples: int = 4,
    batch_size: int = 1,
    eval_sample_size: int = 8,
    max_stagnant_iterations: int = 5,
    fluctuation_strategy: str = "adaptive_sinusoidal",
    fluctuation_amplitude: float = 0.3,
    fluctuation_frequency: float = 0.1,
    momentum_factor: float = 0.8,
    exploration_temperature: float = 1.0,
    pad_token_id: int = 4,
) -> dict[str, Any]:
    """:func:`~lightning_goldy.analysis.reverse_golden_parameters` under its earlier name and arguments.

    Args:
        model: A causal language model.
        eval_dataset: Samples for ``prompt_func``.
        prompt_func: Turns a list of one sample into ids of shape ``[1, T]``: of the query, and of query and response.
        processing_class: Handed to ``prompt_func``, mostly a tokenizer.
        top_k_percent: Budget of each tensor, percent in (0, 100].
        chunk_size: Samples of one forward and backward pass, as far as batches hold so many.
        inflation_step: Of the strategy ``inflation``.
        max_inflation_factor: Largest pool as a multiple of the budget.
        decay_factor: Of the strategies ``inflation`` and ``exploration_decay``.
        min_delta: Growth of the divergence that counts, nats.
        save_path: ``*.safetensors`` for the masks, ``*.json`` for the summary.
        num_samples: Samples that score and choose, the first of the data set.
        batch_size: Samples per batch.
        eval_sample_size: Samples that measure, the next of the data set.
        max_stagnant_iterations: Iterations without growth that end the search.
        fluctuation_strategy: Registered strategy; an unknown one is an error.
        fluctuation_amplitude: How far the pool exceeds the budget, a fraction.
        fluctuation_frequency: Oscillations per iteration.
        momentum_factor: Share of its velocity that a pool keeps.
        exploration_temperature: Of ``exploration_decay``, nats.
        pad_token_id: Runs of it at either end of a sample are padding.

    Returns:
        ``masks`` (name to boolean tensor, on the parameter's device), ``summary`` (per tensor: ``shape``,
        ``active_count``, ``total_count``, ``density``, ``sparsity``) and ``kl_divergence`` (nats per token).

    Raises:
        ValueError: As the function below raises, or ``save_path`` has another ending.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=16, n_positions=8))
        >>> def prompts(samples, processing_class):
        ...     return torch.tensor([[s, s + 1] for s in samples]), torch.tensor([[s, s + 1, s + 2] for s in samples])
        >>> result = get_reverse_golden_params(model, [5, 6, 7, 8], prompts, None, top_k_percent=5.0, num_samples=2)
        >>> sorted(result), result["masks"]["transformer.wpe.weight"].sum().item()
        (['kl_divergence', 'masks', 'summary'], 2)
    """
    _check_path(save_path)
    chosen = [eval_dataset[index] for index in range(min(num_samples, len(eval_dataset)))]
    rest = range(len(chosen), min(len(chosen) + eval_sample_size, len(eval_dataset)))
    held_out = [eval_dataset[index] for index in rest]
    if chosen and not held_out:
        held_out = chosen
        warnings.warn(
            f"all {len(chosen)} samples choose the mask, so kl_divergence is measured on them and too high; lower "
            "num_samples or give more samples",
            stacklevel=2,
        )
    encode = functools.partial(_encoded, prompt_func, processing_class, pad_token_id)
    result = reverse_golden_parameters(
        model,
        encode(chosen, batch_size),
        eval_batches=encode(held_out, batch_size),
        top_k_percent=top_k_percent,
        strategy=fluctuation_strategy,
        search=Search(chunk_size=chunk_size, max_stagnant_iterations=max_stagnant_iterations),
        fluctuation=Fluctuation(
            amplitude=fluctuation_amplitude,
            frequency=fluctuation_frequency,
            momentum=momentum_factor,
            temperature=exploration_temperature,
            inflation_step=inflation_step,
            decay_factor=decay_factor,
            max_inflation_factor=max_inflation_factor,
            min_delta=min_delta,
        ),
    )
    return _answer(model, result.mask, save_path, kl_divergence=result.kl_divergence)


class GoldilocksMixin:
    """The earlier mixin for trainers: needs ``self.model`` and ``self.processing_class``.

    An ``accelerator`` with ``unwrap_model`` is used when there is one. LightningModules use
    :class:`lightning_goldy.GoldyMixin`.

    Example:
        >>> class Trainer(GoldilocksMixin):
        ...     def __init__(self, model, processing_class):
        ...         self.model, self.processing_class = model, processing_class
        >>> Trainer(nn.Linear(1, 1), None).get_golden_params([], None)
        Traceback (most recent call last):
        ValueError: there is no sample: the batches are empty
    """

    model: nn.Module
    processing_class: Any

    def get_golden_params(
        self,
        eval_dataset: Sequence[Any],
        prompt_func: PromptFunction,
        sample_size: int | None = None,
        top_k_percent: float = 5.0,
        save_path: str | None = None,
        pad_token_id: int = 4,
    ) -> dict[str, Any]:
        """:func:`~lightning_goldy.analysis.golden_parameters` at a quorum of 1 under its earlier name.

        Args:
            eval_dataset: Samples for ``prompt_func``.
            prompt_func: As for :func:`get_reverse_golden_params`.
            sample_size: Samples that vote; by default ``rft_config.val_sample_size``, or 16.
            top_k_percent: Share that each sample marks, percent.
            save_path: ``*.safetensors`` or ``*.json``.
            pad_token_id: Runs of it at either end of a sample are padding.

        Returns:
            ``masks`` and ``summary``.
        """
        _check_path(save_path)
        if sample_size is None:
            sample_size = int(getattr(getattr(self, "rft_config", None), "val_sample_size", 16))
        samples = [eval_dataset[index] for index in range(min(sample_size, len(eval_dataset)))]
        model = self._unwrapped()
        batches = _encoded(prompt_func, self.processing_class, pad_token_id, samples, 1)
        result = golden_parameters(model, batches, top_k_percent=top_k_percent)
        return _answer(model, result.mask, save_path)

    def get_reverse_golden_params(
        self, eval_dataset: Sequence[Any], prompt_func: PromptFunction, *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        """:func:`get_reverse_golden_params` of ``self.model`` with ``self.processing_class``.

        Args:
            eval_dataset: Samples for ``prompt_func``.
            prompt_func: As there.
            *arguments: ``top_k_percent`` and what follows it there, in that order.
            **options: The same by name.

        Returns:
            ``masks``, ``summary`` and ``kl_divergence``.
        """
        return get_reverse_golden_params(
            self._unwrapped(), eval_dataset, prompt_func, self.processing_class, *arguments, **options
        )

    def compare_generations_with_mask(
        self,
        golden_mask_path: str,
        eval_dataset: Sequence[Any],
        prompt_func: PromptFunction,
        num_samples: int = 5,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        do_sample: bool = True,
    ) -> GenerationComparison:
        """Prints continuations with and without a saved mask, and returns them (the original returned nothing).

        Args:
            golden_mask_path: A safetensors file with a mask; a pickle is refused. The original went on without a mask
                when a file could not be read.
            eval_dataset: Samples for ``prompt_func``.
            prompt_func: As for :func:`get_reverse_golden_params`; only the query is used.
            num_samples: Drawn from the data set, the same ones each time.
            max_new_tokens: Longest continuation, tokens.
            temperature: Of the drawing.
            do_sample: Draw tokens; otherwise take the most probable one.

        Returns:
            The comparison.
        """
        mask = ParameterMask.load(golden_mask_path)
        places = random.Random(0).sample(range(len(eval_dataset)), min(num_samples, len(eval_dataset)))
        queries = [_ids(prompt_func([eval_dataset[place]], self.processing_class)[0]) for place in places]
        found = compare_generations(
            self._unwrapped(),
            self.processing_class,
            queries,
            mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            do_sample=do_sample,
        )
        show(generations_table(found.rows()))
        return found

    def _unwrapped(self) -> nn.Module:
        accelerator = getattr(self, "accelerator", None)
        return self.model if accelerator is None else accelerator.unwrap_model(self.model)


def _encoded(
    prompt_func: PromptFunction, processing_class: Any, pad_token_id: int, samples: Sequence[Any], batch_size: int
) -> list[dict[str, Tensor]]:
    """Each sample encoded alone, then padded on the right within its batch."""
    require_at_least("batch_size", batch_size, 1)
    encoded = []
    for sample in samples:
        query, whole = (_stripped(_ids(part), pad_token_id) for part in prompt_func([sample], processing_class))
        if len(whole) <= len(query):
            raise ValueError(
                f"prompt_func gave a query of {len(query)} tokens and {len(whole)} with its response: there is no "
                "response token; the second result holds query and response"
            )
        labels = whole.clone()
        labels[: len(query)] = IGNORE_INDEX
        encoded.append({"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": labels})
    return [*padded_batches(encoded, 0, batch_size)]


def _stripped(ids: Tensor, pad_token_id: int) -> Tensor:
    kept = (ids != pad_token_id).nonzero().flatten()
    return ids[int(kept[0]) : int(kept[-1]) + 1] if len(kept) else ids[:0]


def _ids(encoded: Any) -> Tensor:
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids") else encoded
    return torch.as_tensor(ids).reshape(-1).cpu()


def _answer(model: nn.Module, mask: ParameterMask, save_path: str | None, **more: float) -> dict[str, Any]:
    summary = {}
    for (name, each), count in zip(mask.items(), mask.count(), strict=True):
        total = math.prod(each.shape)
        density = count / total
        summary[name] = {
            "shape": list(each.shape),
            "active_count": count,
            "total_count": total,
            "density": density,
            "sparsity": 1.0 - density,
        }
    if save_path is not None and save_path.endswith(".json"):
        atomic_write(save_path, json.dumps({"summary": summary, **more}, indent=2))
    elif save_path is not None:
        mask.save(save_path, model=model)
    device = next(model.parameters()).device
    return {"masks": {name: each.to(device) for name, each in mask.items()}, "summary": summary, **more}


def _check_path(save_path: str | None) -> None:
    if save_path is not None and not save_path.endswith((".safetensors", ".json")):
        raise ValueError(
            f"save_path ends with '.safetensors' (the masks) or '.json' (the summary); got {save_path!r}. Nothing is "
            "pickled, so '.pt' is not written"
        )
