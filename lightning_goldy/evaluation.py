"""What a model knows: the share of questions that greedy decoding answers exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.collate import PadCollator
from lightning_goldy.core.encoding import encode_pairs
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.data.tokenization import padding_id


def answers_known(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    batch_size: int = 256,
) -> list[bool]:
    r"""Whether greedy decoding from each prompt gives the answer and then ends.

    .. math:: a_t = \arg\max_v \, p_\theta(v \mid q, a_{<t}) \quad \text{for every token } a_t
        \text{ of the answer and its end-of-text token}

    That is what greedy decoding does as long as it is right, so one forward pass per batch decides.

    Args:
        model: A causal language model; comes back as it was, in the mode that it was in.
        tokenizer: With an eos token.
        questions: Prompts and answers.
        batch_size: Questions per forward pass.

    Returns:
        One truth value per question.

    Raises:
        ValueError: There are no questions, an answer is empty or has words that the tokenizer does not know.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=8))
        >>> answers_known(model, byte_tokenizer(), [("2+2=", "4")])
        [False]
    """
    if not questions:
        raise ValueError("there are no questions to answer")
    samples = encode_pairs(tokenizer, questions)
    collate = PadCollator(padding_id(tokenizer))
    device = next(model.parameters()).device
    objective = CausalLMObjective()
    known: list[bool] = []
    with preserved(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = map_batch(collate(samples[start : start + batch_size]), lambda tensor: tensor.to(device))
            target = objective.logits_and_targets(model, batch)
            wrong = (target.logits.argmax(dim=-1) != target.targets).long()
            errors = wrong.new_zeros(target.n_samples).index_add(0, target.sample, wrong)  # [B]
            known += (errors == 0).tolist()
    return known


def share_known(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    batch_size: int = 256,
) -> float:
    """The share of questions that greedy decoding answers exactly, in [0, 1]; see :func:`answers_known`.

    Args:
        model: A causal language model.
        tokenizer: With an eos token.
        questions: Prompts and answers.
        batch_size: Questions per forward pass.

    Raises:
        ValueError: There are no questions, or an answer cannot be tokenised.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=8))
        >>> share_known(model, byte_tokenizer(), [("2+2=", "4")])
        0.0
    """
    known = answers_known(model, tokenizer, questions, batch_size)
    return sum(known) / len(known)
