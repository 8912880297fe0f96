"""What a transformers model is and predicts, found through the wrappers around it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from lightning_goldy.core.naming import model_class

Task = Literal["causal_lm", "shifted_lm", "seq2seq", "tokens", "classes", "spans"]
"""How the labels of a transformers head belong to its logits; ``shifted_lm`` predicts next tokens from labels that are
shifted already."""

OWN_LOSS = "pass objective=FunctionObjective(lambda model, batch: model(**batch).loss) for the model's own loss"
"""The advice that always works."""

# Lists of transformers, in the order in which a class is looked for in them.
_REGISTRIES: tuple[tuple[str, Task], ...] = (
    ("SEQ_TO_SEQ_CAUSAL_LM", "causal_lm"),
    ("SPEECH_SEQ_2_SEQ", "causal_lm"),
    ("CAUSAL_LM", "causal_lm"),
    ("IMAGE_TEXT_TO_TEXT", "causal_lm"),
    ("MULTIMODAL_LM", "causal_lm"),
    ("MASKED_LM", "tokens"),
    ("TOKEN_CLASSIFICATION", "tokens"),
    ("SEQUENCE_CLASSIFICATION", "classes"),
    ("IMAGE_CLASSIFICATION", "classes"),
    ("AUDIO_CLASSIFICATION", "classes"),
    ("VIDEO_CLASSIFICATION", "classes"),
    ("MULTIPLE_CHOICE", "classes"),
    ("NEXT_SENTENCE_PREDICTION", "classes"),
    ("QUESTION_ANSWERING", "spans"),
)
# Listed beside those that shift their labels, which these do not.
_UNSHIFTED: dict[str, Task] = {
    **dict.fromkeys(("XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "XLNetLMHeadModel"), "tokens"),
    **dict.fromkeys(
        (
            "BartForCausalLM",
            "BigBirdPegasusForCausalLM",
            "BlenderbotForCausalLM",
            "BlenderbotSmallForCausalLM",
            "CpmAntForCausalLM",
            "MarianForCausalLM",
            "MBartForCausalLM",
            "MvpForCausalLM",
            "PegasusForCausalLM",
            "PLBartForCausalLM",
            "TrOCRForCausalLM",
            "WhisperForCausalLM",
        ),
        "shifted_lm",
    ),
}
_LOSSES: dict[str, Task] = {
    "ForCausalLM": "causal_lm",
    "ForConditionalGeneration": "causal_lm",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "ForVideoClassification": "classes",
    "ForAudioClassification": "classes",
    "ForQuestionAnswering": "spans",
}


def task_of(model: nn.Module) -> Task | None:
    """What the head of a transformers model predicts; None where there is none, or it is not known."""
    head = transformers_model(model)
    if head is None:
        return None
    encoder_decoder = bool(getattr(head.config, "is_encoder_decoder", False))
    kind: Any = type(head)
    task = _task_of_class(kind, encoder_decoder)
    # A class that transformers does not list says by its name which of the losses of transformers is its own.
    return task or _task_of_loss(getattr(head, "loss_type", None), encoder_decoder)


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """A model and what it wraps, from the outside inwards: ``torch.compile``, substituted values, PEFT."""
    inner: Any = model
    while inner is not None:
        yield inner
        wrapped = getattr(inner, "_orig_mod", None)
        wrapped = getattr(inner, "wrapped", None) if wrapped is None else wrapped
        if not isinstance(wrapped, nn.Module) and hasattr(inner, "get_base_model"):
            wrapped = inner.get_base_model()
        inner = wrapped if isinstance(wrapped, nn.Module) and wrapped is not inner else None


def transformers_model(model: nn.Module, *, anywhere: bool = True) -> Any:
    """The transformers model inside known wrappers, or else the only one anywhere inside; None where there is none.

    Args:
        model: Any model.
        anywhere: Whether to look inside modules whose calls need not be those of the model within.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # then no such model exists
        return None
    inner = model
    for inner in unwrapped(model):
        if isinstance(inner, library.PreTrainedModel):
            return inner
    outermost = _outermost(inner, library.PreTrainedModel) if anywhere else []
    return outermost[0] if len(outermost) == 1 else None


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT puts before a batch's own, for which the model gives logits too.

    Raises:
        ValueError: The method changes the labels or the loss too, so that logits and labels do not correspond.
    """
    kind, count = prompt_learning(model)
    if kind == "CPT":
        raise ValueError(f"PEFT's {kind} weighs its tokens by a loss of its own; {OWN_LOSS}")
    # A prefix is a cache, before which there are no queries.
    return 0 if kind in ("PREFIX_TUNING", "CARTRIDGE") else count


def prompt_learning(model: nn.Module) -> tuple[str, int]:
    """PEFT's method that learns tokens or keys ahead of a batch's own, and their number; empty and 0 without one.

    Within ``disable_adapter()`` there is none.
    """
    for inner in unwrapped(model):
        config = getattr(inner, "active_peft_config", None) if hasattr(inner, "peft_config") else None
        if config is not None and config.is_prompt_learning and not getattr(inner, "_adapters_disabled", False):
            return getattr(config.peft_type, "value", str(config.peft_type)), int(config.num_virtual_tokens)
    return "", 0


def unregularised(model: nn.Module) -> nn.Module:
    """What a PEFT model calls, adapters included, where PEFT adds to its loss as AdaLoRA does; else the model."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    added: Any = model
    return added.get_base_model() if getattr(config, "peft_type", None) == "ADALORA" else model


def accepts(model: nn.Module, argument: str, *, unnamed: bool = False) -> bool:
    """Whether the model's forward names this argument; looks through PEFT and ``torch.compile`` wrappers.

    Args:
        model: The model.
        argument: A keyword.
        unnamed: Whether a forward that takes any keyword accepts it too.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    names, anything = _keywords(base.forward)
    return (unnamed and anything) or argument in names


# By the functions behind bound methods. To read a signature takes as long as a layer of a small model.
_KEYWORDS: WeakKeyDictionary[Callable[..., Any], tuple[frozenset[str], bool]] = WeakKeyDictionary()


def _keywords(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The arguments that a forward names, and whether it takes any other keyword."""
    # What stands in a module's own attribute goes with the module.
    function = forward.__func__ if isinstance(forward, MethodType) else None
    known = _KEYWORDS.get(function) if isinstance(function, FunctionType) else None
    if known is None:
        parameters = inspect.signature(forward).parameters
        known = frozenset(parameters), any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        if isinstance(function, FunctionType):
            _KEYWORDS[function] = known
    return known


@lru_cache(maxsize=256)
def _task_of_class(kind: type, encoder_decoder: bool) -> Task | None:
    from transformers.models.auto import modeling_auto  # only ever called with one of its models

    # A subclass, as FSDP2 makes one, is what its bases are.
    for name in (base.__name__ for base in kind.__mro__):
        if name in _UNSHIFTED:
            return _UNSHIFTED[name]
        for registry, task in _REGISTRIES:
            listed = getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES", {}).values()
            if any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in listed):
                return "seq2seq" if task == "causal_lm" and encoder_decoder else task
    return None


def _task_of_loss(loss: str | None, encoder_decoder: bool) -> Task | None:
    task = _LOSSES.get(loss or "")
    return "seq2seq" if task == "causal_lm" and encoder_decoder else task


def _outermost(module: nn.Module, kind: type) -> list[nn.Module]:
    if isinstance(module, kind):
        return [module]
    return [inner for child in module.children() for inner in _outermost(child, kind)]


def vocabulary_of(model: nn.Module) -> int | None:
    """Tokens that a model knows; None where nothing tells."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def labels_classes(model: nn.Module) -> bool:
    """Whether a transformers model labels with classes: it has no head over its tokens."""
    head = transformers_model(model)
    return head is not None and head.get_output_embeddings() is None


def require_unscaled(module: nn.Module, children: Iterable[nn.Module] | None = None) -> None:
    """Refuses a model whose forward pass divides weights in place in evaluation mode, as a deep RWKV does.

    Args:
        module: The model.
        children: Its modules, where they are listed already.

    Raises:
        ValueError: It does; the setting that keeps it from that is named.
    """
    for child in module.modules() if children is None else children:
        # Asked of what it holds: a module takes long to say that it has no such attribute.
        if "layers_are_rescaled" in vars(child):
            config: Any = child.config
            if 0 < config.rescale_every < config.num_hidden_layers:
                raise ValueError(
                    f"{model_class(module)} divides the weights of its later layers in evaluation mode, so that values "
                    f"of the two modes do not compare: set its config's rescale_every to 0; it is "
                    f"{config.rescale_every} with {config.num_hidden_layers} layers"
                )
