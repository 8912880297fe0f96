"""Where the parts of a model family are, and the families that are registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_goldy.core.registry import Registry


@dataclass(frozen=True)
class FusedProjection:
    """One projection that makes queries, keys and values.

    Args:
        path: Its path within the block.
        order: ``concatenated`` for all queries, then all keys, then all values (GPT-2, Phi-3); ``interleaved`` for the
            query, key and value of head 0, then those of head 1, ... (GPT-NeoX).
    """

    path: str
    order: Literal["concatenated", "interleaved"]


@dataclass(frozen=True)
class HeadCounts:
    """Query heads, key/value groups, and the width of a head at the input of the output projection."""

    n_heads: int
    n_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class FamilySpec:
    """Where the parts of a family are. Paths are dotted and relative to the block.

    Args:
        blocks: How the path of the list of blocks ends, for example ``layers`` or ``encoder.layer``.
        attention: The module that contains the attention function and the output projection.
        output: The attention output projection.
        query_key_value: Three paths, or one fused projection; None where the layout is neither.
        mlp: The modules that make up the MLP, in order of call.
        mlp_output: The MLP output projection.
        heads: The head counts; None reads them from the configuration.
    """

    blocks: str
    attention: str
    output: str
    query_key_value: tuple[str, str, str] | FusedProjection | None
    mlp: tuple[str, ...]
    mlp_output: str
    heads: HeadCounts | None = None


Family = Callable[[Any], FamilySpec]
FAMILIES: Registry[Family] = Registry("model family")


def register_architecture(*model_types: str) -> Callable[[Family], Family]:
    """Registers a function from a model's configuration to its :class:`FamilySpec`.

    Args:
        *model_types: The ``config.model_type`` of every family of this form.

    Raises:
        ValueError: No model type was given, or one is registered already.

    Example:
        >>> @register_architecture("gpt2")
        ... def my_gpt2(config):
        ...     return FamilySpec("h", "attn", "attn.proj", None, ("mlp",), "mlp.proj")
        Traceback (most recent call last):
        ValueError: the architectures ['gpt2'] are registered already
    """
    if not model_types or not all(isinstance(model_type, str) for model_type in model_types):
        raise ValueError(f"register_architecture takes one or more model types as strings, got {model_types!r}")
    # The registry would refuse one name at a time, and only once the decorator meets its function.
    taken = [name for index, name in enumerate(model_types) if name in FAMILIES or name in model_types[:index]]
    if taken:
        raise ValueError(f"the architectures {taken} are registered already")
    return FAMILIES.register(*model_types)


def available_architectures() -> tuple[str, ...]:
    """The registered model types, in alphabetical order.

    Example:
        >>> "llama" in available_architectures()
        True
    """
    return tuple(sorted(FAMILIES))


def family_spec(config: Any) -> FamilySpec:
    """Where the parts of a registered family are.

    Args:
        config: A configuration; its ``model_type`` names the family.

    Raises:
        ValueError: The family is not registered.

    Example:
        >>> from types import SimpleNamespace
        >>> family_spec(SimpleNamespace(model_type="phi3")).output
        'self_attn.o_proj'
    """
    return FAMILIES[config.model_type](config)


@register_architecture("gpt2")
def _gpt2(config: Any) -> FamilySpec:
    return FamilySpec(
        "h", "attn", "attn.c_proj", FusedProjection("attn.c_attn", "concatenated"), ("mlp",), "mlp.c_proj"
    )


@register_architecture("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
def _llama(config: Any) -> FamilySpec:
    separate = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return FamilySpec("layers", "self_attn", "self_attn.o_proj", separate, ("mlp",), "mlp.down_proj")


@register_architecture("phi3")
def _phi3(config: Any) -> FamilySpec:
    fused = FusedProjection("self_attn.qkv_proj", "concatenated")
    return FamilySpec("layers", "self_attn", "self_attn.o_proj", fused, ("mlp",), "mlp.down_proj")


@register_architecture("gpt_neox")
def _gpt_neox(config: Any) -> FamilySpec:
    fused = FusedProjection("attention.query_key_value", "interleaved")
    return FamilySpec("layers", "attention", "attention.dense", fused, ("mlp",), "mlp.dense_4h_to_h")


@register_architecture("phi")
def _phi(config: Any) -> FamilySpec:
    separate = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return FamilySpec("layers", "self_attn", "self_attn.dense", separate, ("mlp",), "mlp.fc2")


@register_architecture("opt")
def _opt(config: Any) -> FamilySpec:
    separate = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return FamilySpec("decoder.layers", "self_attn", "self_attn.out_proj", separate, ("fc1", "fc2"), "fc2")


@register_architecture("bert", "roberta")
def _bert(config: Any) -> FamilySpec:
    separate = ("attention.self.query", "attention.self.key", "attention.self.value")
    mlp = ("intermediate", "output")
    return FamilySpec("encoder.layer", "attention", "attention.output.dense", separate, mlp, "output.dense")
