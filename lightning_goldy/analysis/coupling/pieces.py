"""Which pieces of knowledge and which tensors are coupled."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, describe_architecture
from lightning_goldy.core.architecture.blocks import NamedModule, expert_counts, expert_names, expert_of, output_weight
from lightning_goldy.core.batches import batch_tensors, map_batch
from lightning_goldy.core.naming import canonical_name, require_choice, suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.pieces import (
    QUESTION_TEMPLATE,
    AnswerTokens,
    KnowledgePiece,
    PadCollator,
    Sample,
    encode_pieces,
)
from lightning_goldy.core.space import ParameterSpace, SpaceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = Sequence[KnowledgePiece] | Iterable[Any]
_KEYS = {"input_ids", "attention_mask", "labels"}
_NOTHING = dict.fromkeys(("question", "answer", "category", "group", "hop"))


@dataclass(frozen=True, eq=False)
class PieceSamples:
    """Samples of one piece each.

    Args:
        descriptions: Of each piece ``id``, ``question``, ``answer``, ``category``, ``group``, ``hop``; all but the id
            None where it came as tokens.
        samples: Of a causal language model ``input_ids``, ``attention_mask`` and ``labels`` of shape ``[T]`` without
            padding; else a batch of one. None where the piece failed.
        failures: Why pieces failed, by number.
    """

    descriptions: tuple[dict[str, Any], ...]
    samples: tuple[Any, ...]
    failures: dict[int, str]

    def name(self, index: int) -> str:
        """How messages call a piece."""
        described = self.descriptions[index]
        asked = "" if described["question"] is None else f" ({described['question']!r})"
        return f"piece {index}, id {described['id']!r}{asked}"

    def example(self, model: nn.Module) -> Any:
        """What an unregistered model can be called with to find its parts; None lets it be built."""
        first = next((sample for sample in self.samples if isinstance(sample, dict)), None)
        if first is None:
            return None
        batch = joined_batch([first], next(model.parameters()).device)
        return {name: value for name, value in batch.items() if name != "labels"}

    def listed(self, failures: Mapping[int, str]) -> tuple[dict[str, Any], ...]:
        """The pieces that failed, in order: ``index``, ``id`` and ``reason``."""
        return tuple(
            {"index": index, "id": self.descriptions[index]["id"], "reason": reason}
            for index, reason in sorted(failures.items())
        )


def piece_samples(
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective,
    template: str = QUESTION_TEMPLATE,
    tokens: AnswerTokens = "answer",
) -> PieceSamples:
    """One sample per piece, in the order given; padding on either side is taken off.

    Args:
        pieces: Knowledge pieces, or batches that the objective understands.
        tokenizer: For knowledge pieces.
        objective: Decides how a batch is cut into samples.
        template: The prompt of a knowledge piece.
        tokens: Which of its answer's tokens count.

    Raises:
        ValueError: There is no piece, knowledge pieces lack a tokenizer, or a batch is malformed.

    Example:
        >>> ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
        >>> batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}
        >>> [each["input_ids"].tolist() for each in piece_samples([batch], objective=CausalLMObjective()).samples]
        [[5, 6], [7, 8, 9]]
    """
    given = list(pieces)
    if not given:
        raise ValueError("there is no piece")
    kinds = {isinstance(piece, KnowledgePiece) for piece in given}
    if len(kinds) > 1:
        first = isinstance(given[0], KnowledgePiece)
        odd = next(i for i, piece in enumerate(given) if isinstance(piece, KnowledgePiece) != first)
        raise ValueError(f"pieces mixes knowledge pieces and batches: number {odd} is a {type(given[odd]).__name__}")
    if True in kinds:
        require_choice("tokens", tokens, get_args(AnswerTokens))
        return _encoded(given, tokenizer, {"template": template, "tokens": tokens})
    samples = [sample for batch in given for sample in _rows(batch, objective)]
    descriptions = tuple({"id": str(number), **_NOTHING} for number in range(len(samples)))
    return PieceSamples(descriptions, tuple(samples), {})


def sample_length(sample: Any) -> int:
    """Tokens of a sample; 1 where it has no second dimension."""
    if isinstance(sample, Mapping) and "input_ids" in sample:
        return int(sample["input_ids"].shape[-1])
    return max((tensor.shape[1] for tensor in batch_tensors(sample) if tensor.ndim > 1), default=1)


def signature(sample: Any) -> str:
    """Samples of one signature can share a batch."""
    return "" if is_bare(sample) else str([tuple(tensor.shape) for tensor in batch_tensors(sample)])


def joined_batch(samples: Sequence[Any], device: torch.device) -> Any:
    """Samples of one signature as a batch, padded on the right where they are token sequences.

    Example:
        >>> def sample(n):
        ...     return dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(n, dtype=torch.int64))
        >>> joined_batch([sample(1), sample(2)], torch.device("cpu"))["labels"].tolist()
        [[1, -100], [1, 1]]
    """
    if is_bare(samples[0]):
        # Padding is masked, so that any token that exists will do.
        return map_batch(PadCollator(0)(samples), lambda tensor: _moved(tensor, device))
    columns = [list(batch_tensors(sample)) for sample in samples]
    number = iter(range(len(columns[0])))

    def joined(_: Tensor) -> Tensor:
        at = next(number)
        return _moved(torch.cat([column[at] for column in columns]), device)

    return map_batch(samples[0], joined)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # Autograd cannot keep tensors that were made in inference mode.
    return (tensor.clone() if tensor.is_inference() else tensor).to(device)


def is_bare(sample: Any) -> bool:
    """Whether a sample is one sequence of tokens that can be padded."""
    return isinstance(sample, Mapping) and set(sample) == _KEYS and sample["input_ids"].ndim == 1


def _encoded(
    pieces: list[KnowledgePiece], tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> PieceSamples:
    if tokenizer is None:
        raise ValueError("knowledge pieces need the model's tokenizer: pass tokenizer=")
    samples: list[Sample | None]
    failures: dict[int, str] = {}
    try:
        samples = list(encode_pieces(pieces, tokenizer, **options))
    except ValueError as error:
        if options["template"].count("{question}") != 1:
            raise
        samples = []
        for number, piece in enumerate(pieces):
            try:
                samples += encode_pieces([piece], tokenizer, **options)
            except ValueError as reason:
                samples.append(None)
                failures[number] = str(reason)
        if not failures:
            raise error
    names = ("id", *_NOTHING)
    descriptions = tuple({name: value for name, value in asdict(piece).items() if name in names} for piece in pieces)
    return PieceSamples(descriptions, tuple(samples), failures)


def _rows(batch: Any, objective: Objective) -> list[Any]:
    if not isinstance(objective, CausalLMObjective) or not isinstance(batch, Mapping):
        return list(objective.samples(batch))
    if not {key for key, value in batch.items() if value is not None} <= _KEYS:
        return list(objective.samples(batch))
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"a batch of pieces is a dict with 'input_ids' of shape [B, T]; this one has {sorted(batch)}")
    given = {name: ids if batch.get(name) is None else batch[name] for name in ("input_ids", "labels")}
    given["attention_mask"] = torch.ones_like(ids) if batch.get("attention_mask") is None else batch["attention_mask"]
    for name, tensor in given.items():
        if tensor.shape != ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}")
    return [_unpadded({name: tensor[row] for name, tensor in given.items()}) for row in range(len(ids))]


def _unpadded(row: Sample) -> Sample:
    real = row["attention_mask"].nonzero().flatten()
    if not len(real):
        return row
    return {name: tensor[int(real[0]) : int(real[-1]) + 1] for name, tensor in row.items()}


Part = Literal["mlp_output", "attention_output"]
Select = Part | Sequence[str] | ParameterSpace
Layers = tuple[int, int] | str | None
PARTS = get_args(Part)


def check_selection(select: Select, layers: Layers) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: ``select`` or ``layers`` is malformed.
    """
    if isinstance(select, str) and select not in PARTS:
        raise ValueError(
            f"unknown select {select!r}; {suggestion(select, PARTS)}, a list of patterns of parameter names such as "
            f"[{select!r}], or a ParameterSpace"
        )
    if not isinstance(select, (str, ParameterSpace)) and not (select and all(isinstance(name, str) for name in select)):
        raise ValueError(f"select must name at least one pattern of parameter names; got {select!r}")
    if layers is None:
        return
    if isinstance(layers, str):
        word, _, count = layers.partition(":")
        well = word == "last" and count.isdecimal() and int(count) >= 1
    else:
        well = len(layers) == 2 and all(isinstance(number, int) and not isinstance(number, bool) for number in layers)
    if not well:
        raise ValueError(
            f"layers is None, (a, b) for the layers from a up to but not including b, or 'last:4'; got {layers!r}"
        )


def selected_parameters(
    model: nn.Module, select: Select, layers: Layers = None, *, sample_batch: Any = None
) -> dict[str, nn.Parameter]:
    """The tensors to compare gradients of, whether they are trained or frozen.

    Args:
        model: Any module.
        select: ``mlp_output`` or ``attention_output`` for the weight of that projection in every block (under LoRA the
            weight that is adapted; of a mixture the stacks of its experts and the shared experts), patterns of
            parameter names, or a space. One expert of a stack is named by its number: ``*.experts.down_proj[3]``.
        layers: Only blocks ``(a, b)``, from a up to but not including b, as Python counts; or the ``last:4``.
        sample_batch: What a model of an unregistered family can be called with.

    Returns:
        Parameters by canonical name, in the model's order; the whole stack under the name of each chosen expert.

    Raises:
        ValueError: An argument is malformed, or there are no such layers.
        SpaceError: A pattern, a name or the whole selection matches no parameter.
        UnsupportedArchitectureError: The projections cannot be found.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> list(selected_parameters(GPT2LMHeadModel(config), "mlp_output", "last:1"))
        ['transformer.h.1.mlp.c_proj.weight']
    """
    check_selection(select, layers)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    experts = expert_counts(model)
    for stack in expert_names(experts, experts):
        parameters[stack] = parameters[expert_of(stack)[0]]
    architecture = None
    if isinstance(select, str) or layers is not None:
        architecture = describe_architecture(model, sample_batch=sample_batch)
    if isinstance(select, str):
        assert architecture is not None
        chosen = _outputs(architecture, select, parameters)
    else:
        chosen = _matching(model, select, parameters)
    if layers is not None:
        assert architecture is not None
        chosen = _in_layers(architecture, layers, chosen, parameters)
    ordered = _in_order(model, experts)
    return {name: parameters[name] for name in ordered if name in chosen and expert_of(name)[0] not in chosen - {name}}


def _in_order(model: nn.Module, experts: Mapping[str, int]) -> list[str]:
    """Names of parameters, a stack's own before those of its experts."""
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    return [row for name in names for row in (name, *(expert_names([name], experts) if name in experts else ()))]


def _outputs(architecture: Architecture, select: str, parameters: dict[str, nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in parameters.items() if expert_of(name)[1] is None}
    chosen = set()
    blocks = architecture.mlp_blocks if select == "mlp_output" else architecture.attention_blocks
    for block in blocks:
        parts = block.mlp_writers if select == "mlp_output" else (NamedModule("", block.attention_output),)
        for part in parts:
            weight = output_weight(part.module)
            if weight is None:
                raise SpaceError(
                    f"the {select} projection of {block.name} has no parameter called weight; select parameters by "
                    "pattern"
                )
            chosen.add(names[id(weight)])
    return chosen


def _matching(
    model: nn.Module, select: Sequence[str] | ParameterSpace, parameters: dict[str, nn.Parameter]
) -> set[str]:
    if isinstance(select, ParameterSpace):
        chosen = set(select.resolve(model))
        for name in sorted(chosen):
            if not parameters[name].is_floating_point():
                raise SpaceError(f"{name} holds {parameters[name].dtype}, which has no gradient")
        return chosen
    floating = [name for name, parameter in parameters.items() if parameter.is_floating_point()]
    matching = {pattern: _named(pattern, floating) for pattern in select}
    for pattern, names in matching.items():
        if not names:
            raise SpaceError(f"pattern {pattern!r} matches no parameter; {suggestion(pattern, floating)}")
    return set().union(*matching.values())


def _named(pattern: str, names: Sequence[str]) -> set[str]:
    """Names that a pattern matches; a stack by its own name, an expert by one that ends in its number."""
    stem, expert = expert_of(pattern)
    parts = ((name, *expert_of(name)) for name in names)
    return {name for name, stack, at in parts if at == expert and fnmatch.fnmatchcase(stack, stem)}


def _in_layers(
    architecture: Architecture, layers: tuple[int, int] | str, chosen: set[str], parameters: dict[str, nn.Parameter]
) -> set[str]:
    count = len(architecture.blocks)
    if isinstance(layers, str):
        wanted = int(layers.partition(":")[2])
        kept = range(count)[-wanted:] if wanted <= count else range(0)
    else:
        kept = range(count)[slice(*layers)]
    if not kept:
        raise ValueError(f"layers={layers!r} is none of the {count} layers, 0 to {count - 1}")
    owned = {id(parameter) for index in kept for parameter in architecture.blocks[index].module.parameters()}
    inside = {name for name in chosen if id(parameters[name]) in owned}
    if not inside:
        raise SpaceError(f"the selection has no parameter in layers {kept.start} to {kept.stop - 1}")
    return inside
