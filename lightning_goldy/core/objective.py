"""Objectives: how a batch becomes logits at target positions, log-probabilities per sample, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.core.batches import batch_tensors as batch_tensors
from lightning_goldy.core.batches import map_batch as map_batch
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.tasks import OWN_LOSS, Task, task_of, transformers_model, unregularised, virtual_tokens
from lightning_goldy.core.tasks import accepts as accepts

IGNORE_INDEX = -100
"""The label that marks a position without a target (the Hugging Face convention)."""


@dataclass(frozen=True, eq=False)
class TargetLogits:
    """The logits where there is something to predict.

    Args:
        logits: Shape ``[N, V]``, one row per target.
        targets: Shape ``[N]``, class or token indices.
        sample: Shape ``[N]``, the row of the batch that each target belongs to.
        n_samples: The number of rows of the batch.

    Example:
        >>> target = TargetLogits(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> target.log_probs().tolist() == [-torch.tensor(4.0).log().item()] * 2
        True
    """

    logits: Tensor
    targets: Tensor
    sample: Tensor
    n_samples: int

    def token_losses(self) -> Tensor:
        """Negative log-probability of each target, shape ``[N]``, nats; at least float32."""
        logits = self.logits if self.logits.dtype in (torch.float32, torch.float64) else self.logits.float()
        return F.cross_entropy(logits, self.targets, reduction="none")

    def log_probs(self) -> Tensor:
        """Mean log-probability of each sample's targets, shape ``[n_samples]``, nats.

        Raises:
            ValueError: A sample has no target, so its mean is undefined.
        """
        losses = self.token_losses()
        counts = torch.bincount(self.sample, minlength=self.n_samples)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"samples {empty[:5]} of a batch of {self.n_samples} have no target: every label is masked; leave them "
                "out"
            )
        total = losses.new_zeros(self.n_samples).index_add(0, self.sample, losses)
        return -total / counts

    def loss(self) -> Tensor:
        """Mean negative log-probability over all targets, a scalar, nats."""
        return self.token_losses().mean()


@runtime_checkable
class Objective(Protocol):
    """What an analysis needs to know of a task; anything with these four methods serves.

    A subclass needs the first alone: log-probabilities and losses are by default those of its logits.
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits at target positions and their targets."""
        ...

    def log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean log-probability of each sample's targets, shape ``[B]``, nats."""
        return self.logits_and_targets(model, batch).log_probs()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean negative log-probability over the target positions of the batch, a scalar, nats."""
        return self.logits_and_targets(model, batch).loss()

    def samples(self, batch: Any) -> Iterator[Any]:
        """The batch cut into batches of one sample."""
        return split_batch(batch)


class CausalLMObjective(Objective):
    r"""Next-token prediction on Hugging Face batches.

    .. math:: \log p(\text{response} \mid \text{query}) = \frac{1}{|T|} \sum_{t \in T} \log p(x_t \mid x_{<t})

    where T are the positions with a label other than -100 whose own attention mask and whose predecessor's are not 0
    (the first token after padding on the left has nothing to be predicted from). Without labels every non-padding next
    token is a target, in packed rows every one but the first of its document. Only the needed logits are computed where
    the model can do so (``logits_to_keep``) and fewer than half of the positions are targets. Behind virtual tokens
    (prompt tuning, p-tuning) the first token is predicted too, as by the model's own loss.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> loss = CausalLMObjective().loss(model, {"input_ids": ids})
        >>> torch.allclose(loss, model(input_ids=ids, labels=ids).loss)
        True
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits and targets at every target position.

        Args:
            model: A causal language model whose output has ``logits`` of shape ``[B, T, V]``.
            batch: A dict with ``input_ids`` of shape ``[B, T]`` and optionally ``labels`` of that shape and
                ``attention_mask`` of that shape or ``[B, 1, T, T]``.

        Raises:
            ValueError: The batch lacks ``input_ids``, its shapes differ, every target is masked, the model predicts
                something else, or its logits do not belong to the tokens one to one.
        """
        _require_task(self, model, ("causal_lm", "shifted_lm"))
        labels = self._labels(batch)
        n_virtual = virtual_tokens(model)
        targets, valid = labels[:, 1:], (labels != IGNORE_INDEX)[:, 1:]  # [B, T-1]; position t predicts token t+1
        if n_virtual == 0 and not valid.any():
            raise ValueError(_no_target(labels))
        inputs = self._inputs(model, batch)
        positions = valid.any(dim=0).nonzero().flatten()  # [K]
        if n_virtual == 0 and len(positions) < labels.shape[1] // 2 and accepts(model, "logits_to_keep"):
            logits = model(**inputs, logits_to_keep=positions).logits  # [B, K, V]
            _require_shape(self, model, logits, (len(labels), len(positions)), "positions to keep")
            return _gathered(model, logits, targets[:, positions], valid[:, positions])
        logits = _aligned_logits(self, model, model(**inputs).logits, labels)  # [B, n + T, V], n 0 or virtual tokens
        ahead = logits.shape[1] - labels.shape[1]
        if ahead:
            # The last virtual token predicts the first token.
            targets, valid = labels, labels != IGNORE_INDEX
            logits = logits[:, ahead - 1 : -1]
            positions = valid.any(dim=0).nonzero().flatten()
        if not valid.any():
            raise ValueError(_no_target(labels))
        return _gathered(model, _columns(logits, positions), targets[:, positions], valid[:, positions])

    def own_arguments(self, model: nn.Module, batch: Any, *, as_given: bool = False) -> dict[str, Any]:
        """What the model's own loss is to be asked with, so that it is this objective's.

        Args:
            model: The model.
            batch: A batch.
            as_given: Whether the model gets the batch as it is, labels that count for it alone and all.
        """
        if not as_given:
            return {**self._inputs(model, batch), "labels": self._labels(batch)}
        labels = self._labels(batch) if batch.get("labels") is None else batch["labels"]
        # By positions alone transformers keeps documents apart where no cache is kept, which is its default.
        uncached = accepts(model, "use_cache") and not _packed_by_positions(batch)
        return {**batch, "labels": labels, **({"use_cache": False} if uncached else {})}

    def samples(self, batch: Any) -> Iterator[Any]:
        """The batch cut into batches of one sample; a single row stays whole, with whatever describes its documents."""
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        return iter([batch]) if isinstance(ids, Tensor) and len(ids) == 1 else split_batch(batch)

    @staticmethod
    def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        inputs.update(_missing_positions(model, inputs))
        if accepts(model, "use_cache"):
            inputs["use_cache"] = False
        return inputs

    @staticmethod
    def _labels(batch: Any) -> Tensor:
        """The labels, -100 wherever nothing is to be predicted, shape ``[B, T]``."""
        ids, labels = _named(batch, "input_ids", "a causal language model's batch"), batch.get("labels")
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}")
        mask = padding_mask(batch)
        documents = document_ids(batch) if labels is None else None
        labels = ids if labels is None else labels
        if mask is None and documents is None:
            return labels.clone()
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.clone()
        if mask is not None:
            # Not in place on a view of itself: the predecessor's own mask counts.
            kept[:, 1:] &= mask[:, :-1]
        if documents is not None:
            kept[:, 1:] &= documents[:, 1:] == documents[:, :-1]
        return labels.masked_fill(~kept, IGNORE_INDEX)


class TokenObjective(Objective):
    r"""Labels that stand at the very positions whose logits predict them, of shape ``[B, T]``; nothing is shifted.

    .. math:: \log p = \frac{1}{|T|} \sum_{t \in T} \log p_t(y_t), \quad T = \{t : y_t \ne -100\}

    It serves models that want their labels shifted already, such as ``BartForCausalLM`` and ``XLMWithLMHeadModel``;
    :class:`MaskedLMObjective`, :class:`TokenClassifierObjective` and :class:`Seq2SeqObjective` are of this kind.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=11)
        >>> model = BertForMaskedLM(BertConfig(**sizes)).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 5, -100]])}
        >>> torch.allclose(TokenObjective().loss(model, batch), model(**batch).loss)
        True
    """

    tasks: tuple[Task, ...] = ("tokens", "shifted_lm")

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits and targets at every labelled position.

        Args:
            model: A model whose output has ``logits`` of shape ``[B, T, V]``.
            batch: A dict with ``labels`` of shape ``[B, T]`` and what the model takes.

        Raises:
            ValueError: The batch has no labels, all are masked, the model predicts something else, or its logits do
                not belong to the labels one to one.
        """
        _require_task(self, model, self.tasks)
        labels = _named(batch, "labels", f"a batch of {type(self).__name__}")
        if labels.ndim != 2 or labels.is_floating_point():
            raise ValueError(
                f"labels must be indices of shape [B, T]; got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        valid = labels != IGNORE_INDEX
        if not valid.any():
            raise ValueError(_no_target(labels))
        logits = _aligned_logits(self, model, model(**self._inputs(model, batch)).logits, labels)
        return _gathered(model, logits[:, logits.shape[1] - labels.shape[1] :], labels, valid)

    def own_arguments(self, model: nn.Module, batch: Any, *, as_given: bool = False) -> dict[str, Any]:
        """What the model's own loss is to be asked with, so that it is this objective's: the batch as it is."""
        return {**batch, **({"use_cache": False} if accepts(model, "use_cache") else {})}

    def _inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return {**inputs, **({"use_cache": False} if accepts(model, "use_cache") else {})}


class MaskedLMObjective(TokenObjective):
    """The tokens behind masks, as :class:`TokenObjective`: labels of -100 are no targets."""


class TokenClassifierObjective(TokenObjective):
    """A class for each token, as :class:`TokenObjective`: labels of -100 are no targets."""


class Seq2SeqObjective(TokenObjective):
    r"""What a decoder predicts from an encoder's input; the labels belong to the decoder and are not shifted.

    .. math:: \log p(y \mid x) = \frac{1}{|T|} \sum_{t \in T} \log p(y_t \mid y_{<t}, x), \quad T = \{t : y_t \ne -100\}

    Without ``decoder_input_ids`` the model makes them from the labels, by its own rule.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11, decoder_start_token_id=0)
        >>> model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[4, 5]])}
        >>> torch.allclose(Seq2SeqObjective().loss(model, batch), model(**batch).loss)
        True
    """

    tasks = ("seq2seq",)

    def _inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = super()._inputs(model, batch)
        if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            return inputs
        shift = getattr(transformers_model(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return {**inputs, "labels": batch["labels"]}
        return {**inputs, "decoder_input_ids": shift(labels=batch["labels"])}


class ClassifierObjective(Objective):
    r"""Classification by any module: ``(x, y)`` batches, or dicts with ``labels``.

    .. math:: \log p(y \mid x) = \log \mathrm{softmax}(f(x))_y

    Example:
        >>> batch = (torch.ones(2, 3), torch.tensor([0, 1]))
        >>> ClassifierObjective().log_probs(nn.Linear(3, 2), batch).shape
        torch.Size([2])
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits of shape ``[B, classes]`` and labels of shape ``[B]``, in a dict also ``[B, 1]``; -100 is no target.

        Raises:
            ValueError: The batch is neither an (x, y) pair nor a dict with ``labels``, the labels are not class indices
                of shape ``[B]``, or all are masked.
        """
        if isinstance(batch, Mapping) and "labels" in batch:
            labels = _column(batch["labels"])
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, labels = batch
            output = model(inputs)
        else:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"a classifier's batch is a pair (x, y) or a dict with 'labels'; this one is {found}")
        logits = output if isinstance(output, Tensor) else output.logits
        if labels.is_floating_point() or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must be class indices of shape [{logits.shape[0]}]; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if logits.ndim != 2:
            raise ValueError(
                f"ClassifierObjective needs logits of shape [B, classes]; {model_class(model)} gives "
                f"{tuple(logits.shape)} for labels of shape {tuple(labels.shape)}"
            )
        kept = labels != IGNORE_INDEX  # [B]
        if not kept.any():
            raise ValueError(f"a batch of {len(labels)} samples has no target: every label is masked (-100)")
        return _gathered(model, logits, labels, kept)

    def own_arguments(self, model: nn.Module, batch: Any, *, as_given: bool = False) -> dict[str, Any] | None:
        """What the model's own loss is to be asked with: the batch as it is; None for pairs, which have no names."""
        return dict(batch) if isinstance(batch, Mapping) else None


class SpanObjective(Objective):
    r"""Where an answer begins and ends in its text, as question-answering heads predict it.

    .. math:: \log p = \tfrac12 \left( \log p_{\text{start}}(s) + \log p_{\text{end}}(e) \right)

    As in transformers' own losses, positions from the text's length T on are no targets, and those below 0 are 0.

    Example:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=11)
        >>> model = BertForQuestionAnswering(BertConfig(**sizes)).eval()
        >>> ends = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), **ends}
        >>> torch.allclose(SpanObjective().loss(model, batch), model(**batch).loss)
        True
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits over the positions, shape ``[2 B, T]``, those of the starts before those of the ends.

        Args:
            model: A model whose output has ``start_logits`` and ``end_logits`` of shape ``[B, T]``.
            batch: A dict with ``start_positions`` and ``end_positions`` of shape ``[B]`` or ``[B, 1]``, and what the
                model takes.

        Raises:
            ValueError: The batch lacks positions, has none inside of the text, or one end of an answer alone inside.
        """
        _require_task(self, model, ("spans",))
        ends = [_column(_named(batch, f"{end}_positions", "a batch of SpanObjective")) for end in ("start", "end")]
        inputs = {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions")}
        output = model(**inputs)
        logits = [output.start_logits, output.end_logits]
        for given, scores in zip(ends, logits, strict=True):
            if given.shape != scores.shape[:1] or scores.ndim != 2:
                raise ValueError(
                    f"positions of shape {tuple(given.shape)} do not belong to the logits of shape "
                    f"{tuple(scores.shape)} that {model_class(model)} gives"
                )
        # Virtual tokens ahead shift the positions, for PEFT's own loss too.
        length, n_samples = logits[0].shape[1], len(ends[0])
        starts, stops = ends = [given.clamp(min=0) for given in ends]
        _require_whole_answers(starts, stops, length)
        targets = torch.cat(ends)
        target = _gathered(model, torch.cat(logits), targets, targets < length)
        return TargetLogits(target.logits, target.targets, target.sample % n_samples, n_samples)

    def own_arguments(self, model: nn.Module, batch: Any, *, as_given: bool = False) -> dict[str, Any]:
        """What the model's own loss is to be asked with: the batch as it is."""
        return dict(batch)


class FunctionObjective(Objective):
    """Any scalar loss as an objective.

    Args:
        function: ``function(model, batch) -> scalar`` loss, taken for a mean negative log-probability in nats.
        logits: Optional ``logits(model, batch) -> TargetLogits`` for the analyses that compare distributions.

    Example:
        >>> objective = FunctionObjective(lambda model, batch: (model(batch) ** 2).mean())
        >>> objective.log_probs(nn.Identity(), torch.tensor([[1.0], [2.0]])).tolist()
        [-1.0, -4.0]
    """

    def __init__(
        self,
        function: Callable[[nn.Module, Any], Tensor],
        logits: Callable[[nn.Module, Any], TargetLogits] | None = None,
    ) -> None:
        self.function = function
        self.logits = logits

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """What the given ``logits`` function returns.

        Raises:
            TypeError: None was given, so analyses of distributions cannot run on this objective.
        """
        if self.logits is None:
            raise TypeError(
                "this FunctionObjective has a loss but no logits; "
                "pass logits=, or use CausalLMObjective or ClassifierObjective"
            )
        return self.logits(model, batch)

    def log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        """Minus the loss of each sample on its own, shape ``[B]``."""
        return torch.stack([-self.loss(model, sample) for sample in self.samples(batch)])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The function's value on the whole batch, a scalar."""
        value = self.function(model, batch)
        if value.ndim:
            raise ValueError(f"the objective's function must return a scalar; got shape {tuple(value.shape)}")
        return value


def objective_for(model: nn.Module, given: Objective | None = None) -> Objective:
    """The objective that is asked for, or the one that a transformers model's class was made for.

    Args:
        model: Any model; transformers models are found inside PEFT, ``torch.compile`` and other wrappers.
        given: Taken as it is where there is one.

    Returns:
        The objective whose loss is the model's own; next-token prediction for what is no transformers model.

    Raises:
        ValueError: The class has no head, one that no objective knows, or one that predicts no classes.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=11)
        >>> type(objective_for(BertForTokenClassification(BertConfig(**sizes)))).__name__
        'TokenObjective'
    """
    if given is not None:
        return given
    head = transformers_model(model)
    if head is None:
        return CausalLMObjective()
    task = task_of(model)
    if task is None:
        raise ValueError(
            f"{model_class(head)}: how its labels belong to its outputs is not known (there are objectives for causal, "
            f"encoder-decoder and masked language models, and for classes of sequences, tokens and spans); {OWN_LOSS}"
        )
    if task == "classes" and not _predicts_one_class(head):
        problem = getattr(head.config, "problem_type", None) or "regression"
        raise ValueError(
            f"{model_class(head)} (problem_type {problem!r}, num_labels {head.config.num_labels}) predicts no single "
            f"class, so there is no log-probability of a label; {OWN_LOSS}"
        )
    return _OBJECTIVES[task]()


def check_own_loss(model: nn.Module, objective: Objective, batch: Any, *, as_given: bool = False) -> None:
    """Holds an objective's loss against the one that a transformers model computes by itself, on its first samples.

    The routers' auxiliary loss is no part of either, nor is the regulariser of AdaLoRA. Costs two forward passes over
    up to two samples.

    Args:
        model: The model, in evaluation mode; one that gives no loss of its own is not checked.
        objective: The objective; one of the user's own making is taken at its word.
        batch: A batch, on the model's device.
        as_given: Whether the model gets the batch as it is, as from a training step that takes the model's loss; what
            the objective does otherwise (labels and positions behind padding) is then a difference.

    Raises:
        ValueError: The two differ by more than rounding; both numbers are named.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)).eval()
        >>> check_own_loss(model, CausalLMObjective(), {"input_ids": torch.tensor([[1, 2, 3, 4]])})
    """
    head = transformers_model(model, anywhere=False)
    if head is None or type(objective) not in _CHECKED:
        return
    part = _first_samples(objective, batch)
    called = unregularised(getattr(model, "_orig_mod", model))  # a call with labels would be compiled anew
    arguments = objective.own_arguments(called, part, as_given=as_given)  # type: ignore[attr-defined]
    if arguments is None or not all(accepts(called, name, unnamed=True) for name in arguments if name in _LABELS):
        return
    if getattr(head.config, "output_router_logits", False) and accepts(called, "output_router_logits"):
        arguments["output_router_logits"] = False
    output = _called(head, called, arguments)
    own = getattr(output, "loss", None)
    if own is None:
        return
    found, logits = objective.loss(model, part), getattr(output, "logits", own)
    if _agree(own.mean(), found, logits):
        return
    reasons = _labels_behind_padding(part) if as_given else []
    if as_given and _packed_by_positions(part) and isinstance(objective, CausalLMObjective):
        reasons.append(_CACHED)
    shift = _missing_positions(called, part) if as_given and isinstance(objective, CausalLMObjective) else {}
    if shift and not _agree(own.mean(), _called(head, called, {**arguments, **shift}).loss.mean(), logits):
        reasons.append(_SHIFTED)
    raise ValueError(
        f"{model_class(head)}: its own loss on the probe's first samples is {own.mean().item():.6g}, that of "
        f"{type(objective).__name__} {found.item():.6g}: "
        f"{'; '.join(reasons) or 'labels and logits are read in two ways'}; {OWN_LOSS}, or check=False to analyse with "
        "this one"
    )


def _called(head: Any, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    problem = getattr(head.config, "problem_type", None)
    try:
        return model(**arguments)
    finally:
        if hasattr(head.config, "problem_type"):
            head.config.problem_type = problem  # which a first call with labels fills in


def padding_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """True where a token of ``input_ids`` is no padding, shape ``[B, T]``; None where every one is seen.

    A mask of shape ``[B, 1, T, T]`` hides a token of the padding from itself.

    Raises:
        ValueError: The mask has another shape.
    """
    mask, shape = _attention_mask(batch), batch["input_ids"].shape
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[-2:] == (shape[1], shape[1]) and mask.shape[0] in (1, shape[0]):
        return seen(mask).any(dim=1).diagonal(dim1=-2, dim2=-1).expand(shape)
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(shape)}")
    return mask != 0


def document_ids(batch: Mapping[str, Any]) -> Tensor | None:
    """Numbers of the packed documents that the tokens of each row belong to, shape ``[B, T]``, rising along a row.

    They are read from ``seq_idx``, a mask of shape ``[B, 1, T, T]`` in which a token does not see the one before,
    ``cu_seq_lens_q``, or ``position_ids`` that do not go on; None where the batch has none of these.

    Example:
        >>> positions = torch.tensor([[0, 1, 2, 0, 1]])
        >>> document_ids({"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": positions}).tolist()
        [[0, 0, 0, 1, 1]]
    """
    shape, mask = batch["input_ids"].shape, _attention_mask(batch)
    index, bounds, positions = (batch.get(key) for key in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    starts = torch.zeros(shape, dtype=torch.bool, device=batch["input_ids"].device)
    if isinstance(index, Tensor) and index.shape == shape:
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
    elif mask is not None and mask.ndim == 4 and mask.shape[-2:] == (shape[1], shape[1]):
        starts[:, 1:] = ~seen(mask).any(dim=1).diagonal(offset=-1, dim1=-2, dim2=-1)
    elif isinstance(bounds, Tensor) and shape[0] == 1:
        inside = bounds.flatten()
        starts[0, inside[(inside > 0) & (inside < shape[1])].long()] = True
    elif isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == shape[1]:
        step = positions[:, 1:] - positions[:, :-1]
        # Without a mask transformers takes every other step than 1 for the border of two documents.
        starts[:, 1:] = step <= 0 if mask is not None else step != 1
    else:
        return None
    return starts.long().cumsum(dim=1)


def seen(mask: Tensor) -> Tensor:
    """Where an attention mask hides nothing.

    A boolean or integer mask hides where it is False or 0; an additive one where it is so low that it stands for minus
    infinity: half the lowest number of its type and below, or -1e8 and below. What is above may be a bias by distance.
    """
    return mask > max(torch.finfo(mask.dtype).min / 2, _HIDDEN) if mask.is_floating_point() else mask != 0


_OBJECTIVES: dict[Task, type[Objective]] = {
    "causal_lm": CausalLMObjective,
    "shifted_lm": TokenObjective,
    "seq2seq": Seq2SeqObjective,
    "tokens": TokenObjective,
    "classes": ClassifierObjective,
    "spans": SpanObjective,
}
_CHECKED = (*_OBJECTIVES.values(), MaskedLMObjective, TokenClassifierObjective)
_LABELS = ("labels", "start_positions", "end_positions")
_SHIFTED = (
    "the padding on the left shifts the positions of the tokens, which this objective counts from each sample's first: "
    "put position_ids into the batch (attention_mask.cumsum(1) - 1, at least 0), or pad on the right"
)
_CACHED = (
    "while the model keeps a cache, its packed documents see each other, and the objective's do not: set its config's "
    "use_cache to False, or put use_cache=False into the batch"
)
# No bias by distance is as low, and no mask that is meant as minus infinity is higher where its type reaches this far.
_HIDDEN = -1e8


def _predicts_one_class(head: Any) -> bool:
    problem = getattr(head.config, "problem_type", None)
    if "MultipleChoice" in type(head).__name__ or problem == "single_label_classification":
        return True
    return problem is None and getattr(head.config, "num_labels", 2) > 1


def _require_task(objective: Objective, model: nn.Module, tasks: tuple[Task, ...]) -> None:
    task = task_of(model)
    if task is not None and task not in tasks:
        raise ValueError(
            f"{type(objective).__name__} does not fit {model_class(transformers_model(model))}, whose labels belong to "
            f"its logits in another way; pass objective={_OBJECTIVES[task].__name__}(), or none at all"
        )


def _named(batch: Any, name: str, what: str) -> Tensor:
    if not isinstance(batch, Mapping) or not isinstance(batch.get(name), Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{what} is a dict with {name!r}; this one is {found}")
    return batch[name]


def _column(labels: Tensor) -> Tensor:
    """Labels of single samples, which collating gives as ``[B, 1]`` where each was a list, in shape ``[B]``."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _attention_mask(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    # Models with several kinds of layers may be given a mask for each.
    return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, Mapping) else mask


def _no_target(labels: Tensor) -> str:
    n_samples, length = labels.shape
    return (
        f"a batch of {n_samples} samples of {length} tokens has no target: every label is masked (-100 or padding); "
        "leave such samples out"
    )


def _aligned_logits(objective: Objective, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """The logits, once they are known to belong to the labels one to one behind the virtual tokens."""
    n_virtual = virtual_tokens(model)
    ahead = logits.shape[1] - labels.shape[1] if logits.ndim == 3 else 0
    expected = (labels.shape[0], labels.shape[1] + (n_virtual if ahead == n_virtual else 0))
    _require_shape(objective, model, logits, expected, f"labels of shape {tuple(labels.shape)}")
    return logits


def _require_shape(objective: Objective, model: nn.Module, logits: Tensor, shape: tuple[int, int], what: str) -> None:
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ValueError(
            f"{type(objective).__name__}: logits of shape {tuple(logits.shape)} of {model_class(model)} do not belong "
            f"one to one to {what}, which need [{shape[0]}, {shape[1]}, V]; {OWN_LOSS}"
        )


def _gathered(model: nn.Module, logits: Tensor, labels: Tensor, kept: Tensor) -> TargetLogits:
    """Logits and targets where there is a target, of tensors of shape ``[B, ..., V]``, ``[B, ...]``, ``[B, ...]``."""
    sample = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.ndim - 1)).expand_as(kept)
    if bool(kept.all()):
        target = TargetLogits(logits.flatten(0, -2), labels.flatten(), sample.flatten(), len(labels))
    else:
        target = TargetLogits(logits[kept], labels[kept], sample[kept], len(labels))
    lowest, highest = (int(value) for value in target.targets.aminmax())
    if lowest < 0 or highest >= logits.shape[-1]:
        raise ValueError(
            f"labels from {lowest} to {highest} are none of the {logits.shape[-1]} that {model_class(model)} predicts; "
            "-100 marks what is no target"
        )
    return target


def _require_whole_answers(starts: Tensor, ends: Tensor, length: int) -> None:
    """Refuses answers of which one end is a target, and batches without any."""
    halves = ((starts < length) != (ends < length)).nonzero().flatten().tolist()
    if halves:
        at, positions = halves[0], torch.cat([starts, ends])
        raise ValueError(
            f"labels from {int(positions.min())} to {int(positions.max())} are none of the {length} that the model "
            f"predicts: sample {at} has its answer at positions {int(starts[at])} to {int(ends[at])}, of which one end "
            f"alone lies inside of the text of {length} tokens, and the model's own loss would weigh such ends by "
            f"their batch: put both at {length} or above, where they are no targets, or leave the sample out"
        )
    if not bool((starts < length).any()):
        raise ValueError(
            f"a batch of {len(starts)} samples has no target: every answer lies outside of the text, whose positions "
            f"go from 0 to {length - 1}"
        )


def _packed_by_positions(batch: Any) -> bool:
    """Whether nothing but its positions tells a batch's documents apart."""
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is not None or "use_cache" in batch:
        return False
    documents = document_ids(batch) if isinstance(batch.get("position_ids"), Tensor) else None
    return documents is not None and bool(documents.any())


def _first_samples(objective: Objective, batch: Any) -> Any:
    # All logits of a batch may take far more memory than those that an analysis needs.
    if len({len(tensor) if tensor.ndim else -1 for tensor in batch_tensors(batch)}) == 1:
        return map_batch(batch, itemgetter(slice(0, 2)))
    return batch


def _labels_behind_padding(part: Any) -> list[str]:
    """What to do about labels that a model's own loss counts and next-token prediction does not."""
    mask = padding_mask(part) if isinstance(part, Mapping) and "input_ids" in part else None
    labels = part.get("labels") if mask is not None else None
    if mask is None or not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return []
    counted = labels != IGNORE_INDEX
    first = counted[:, 1:] & mask[:, 1:] & ~mask[:, :-1]
    reasons = (
        (int((counted & ~mask).sum()), "labels stand where attention_mask is 0"),
        (int(first.sum()), "labels are of first tokens behind padding, which nothing tells"),
    )
    return [f"{count} {what}: make them {IGNORE_INDEX}" for count, what in reasons if count]


def _missing_positions(model: nn.Module, part: Mapping[str, Any]) -> dict[str, Tensor]:
    mask = part.get("attention_mask")
    if not isinstance(mask, Tensor) or "position_ids" in part or not accepts(model, "position_ids"):
        return {}
    # Virtual tokens shift every position, and PEFT leaves the counting to the model.
    return {} if virtual_tokens(model) else left_padding_positions(mask)


def _agree(own: Tensor, found: Tensor, logits: Tensor) -> bool:
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (own, found, logits) if tensor.is_floating_point())
    # TensorFloat-32 and bfloat16 inside of matrix products round by as much.
    epsilon = max(epsilon, {"highest": 0.0, "high": 2**-10, "medium": 2**-7}[torch.get_float32_matmul_precision()])
    tolerance = max(1e-4, 2 * epsilon) * max(1.0, abs(own.item()))
    return abs(own.item() - found.item()) <= tolerance


def _columns(logits: Tensor, positions: Tensor) -> Tensor:
    # A run of positions is a view; any others cost a copy here and a scatter in the backward pass.
    first, last = int(positions[0]), int(positions[-1])
    return logits[:, first : last + 1] if last - first + 1 == len(positions) else logits[:, positions]


def left_padding_positions(attention_mask: Tensor) -> dict[str, Tensor]:
    """The ``position_ids`` that a batch with padding on the left needs; none without such padding."""
    # With padding on the left, positions must count from each sample's first token, or the padding would matter.
    if attention_mask.ndim != 2 or bool((attention_mask[:, 0] != 0).all()):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)}
