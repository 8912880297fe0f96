"""Model families: where each keeps its attention and MLP, how it assembles its blocks and computes attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture.blocks import (
    MLP,
    Architecture,
    Attention,
    Block,
    HeadLayout,
    HeadProjection,
    Missing,
    NamedModule,
    QueryKeyValue,
    UnsupportedArchitectureError,
    is_experts,
)
from lightning_goldy.core.naming import Registry, canonical_name, model_class

FusedOrder: TypeAlias = Literal["concatenated", "interleaved", "grouped"]


@dataclass(frozen=True)
class FusedProjection:
    """One projection that makes queries, keys and values.

    Args:
        path: Its path within the block.
        order: ``concatenated`` for all queries, then all keys, then all values (GPT-2, Phi-3); ``interleaved`` for the
            query, key and value of head 0, then those of head 1, ... (GPT-NeoX); ``grouped`` for the queries, the key
            and the value of key/value group 0, then those of group 1, ... (Falcon 40B).
    """

    path: str
    order: FusedOrder


@dataclass(frozen=True)
class HeadCounts:
    """How many heads an attention module has, and how wide they are.

    Args:
        n_heads: Query heads.
        n_key_value_heads: Key/value groups.
        head_dim: Width of a head at the input of the output projection.
    """

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
        mlp: The modules that make up the MLP, in order of call; none leaves the MLP undescribed.
        mlp_output: The MLP output projection, or the module of the experts.
        heads: The head counts; None reads them from the configuration.
    """

    blocks: str
    attention: str
    output: str
    query_key_value: tuple[str, str, str] | FusedProjection | None
    mlp: tuple[str, ...] = ()
    mlp_output: str = ""
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


def _constant(spec: FamilySpec) -> Family:
    return lambda config: spec


_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value")
_GPT2 = FusedProjection("attn.c_attn", "concatenated")
_PHI3 = FusedProjection("self_attn.qkv_proj", "concatenated")
_NEOX = FusedProjection("attention.query_key_value", "interleaved")

for _types, _spec in (
    (("gpt2",), FamilySpec("h", "attn", "attn.c_proj", _GPT2, ("mlp",), "mlp.c_proj")),
    (_LLAMA, FamilySpec("layers", "self_attn", "self_attn.o_proj", _SEPARATE, ("mlp",), "mlp.down_proj")),
    (("phi3",), FamilySpec("layers", "self_attn", "self_attn.o_proj", _PHI3, ("mlp",), "mlp.down_proj")),
    (("gpt_neox",), FamilySpec("layers", "attention", "attention.dense", _NEOX, ("mlp",), "mlp.dense_4h_to_h")),
    (("phi",), FamilySpec("layers", "self_attn", "self_attn.dense", _SEPARATE, ("mlp",), "mlp.fc2")),
    (("opt",), FamilySpec("decoder.layers", "self_attn", "self_attn.out_proj", _SEPARATE, ("fc1", "fc2"), "fc2")),
    (
        ("bert", "roberta"),
        FamilySpec(
            "encoder.layer", "attention", "attention.output.dense", _BERT, ("intermediate", "output"), "output.dense"
        ),
    ),
):
    register_architecture(*_types)(_constant(_spec))


_FUSED_PATHS = {
    "bloom": "self_attention.query_key_value",
    "falcon": "self_attention.query_key_value",
    "gpt_bigcode": "attn.c_attn",
    "mpt": "attn.Wqkv",
    "persimmon": "self_attn.query_key_value",
}


def known_fused(config: Any, block: str, called: Sequence[str]) -> FusedProjection | None:
    """The fused projection of a family that is probed for all else: how it is laid out cannot be seen from outside.

    Args:
        config: Of the model; its ``model_type`` names the family.
        block: Dotted name of the block.
        called: Names of the projections that it calls before attention.

    Example:
        >>> from transformers import FalconConfig
        >>> known_fused(FalconConfig(new_decoder_architecture=True), "h.0", ["h.0.self_attention.query_key_value"])
        FusedProjection(path='self_attention.query_key_value', order='grouped')
    """
    family = getattr(config, "model_type", None)
    path = _FUSED_PATHS.get(family) if isinstance(family, str) else None
    if path is None or join_names(block, path) not in called:
        return None
    order: FusedOrder = "concatenated" if family == "mpt" else "interleaved"
    if family in ("falcon", "gpt_bigcode") and config.multi_query:
        order = "concatenated"
    if family == "falcon" and config.new_decoder_architecture:
        order = "grouped"
    return FusedProjection(path, order)


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under its name without wrappers; where a wrapper shares a name, the wrapped module."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            break
    # The added dot lets canonical_name see a wrapper that ends the name.
    pairs = model.named_modules(remove_duplicate=False)
    return {canonical_name(f"{name}.").rstrip("."): module for name, module in pairs}


def join_names(*names: str) -> str:
    """A dotted name; the model itself is called ''."""
    return ".".join(name for name in names if name)


def inside_prefix(name: str) -> str:
    """How the names of all modules inside a module begin."""
    return f"{name}." if name else ""


def _active_name(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name that leads through ``modules_to_save`` of PEFT to the copy that is called."""
    if ".modules_to_save." in name or ".original_module" in name:
        return name
    active = ""
    for part in name.split("."):
        active = join_names(active, part)
        wrapper: Any = modules.get(active)
        # Not by the module's attribute: it takes long to say that it has none.
        copies = None if wrapper is None else wrapper._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            adapter = next((one for one in wrapper.active_adapters if one in copies), None)
            used = wrapper.disable_adapters is False and adapter is not None
            active = f"{active}.modules_to_save.{adapter}" if used else f"{active}.original_module"
    return active


def _named(modules: Mapping[str, nn.Module], name: str) -> NamedModule:
    name = _active_name(modules, name)
    if name not in modules:
        raise UnsupportedArchitectureError(f"there is no module {name!r}")
    return NamedModule(name, modules[name])


def head_counts(*sources: Any) -> HeadCounts | None:
    """Head counts from the attributes of attention modules or configurations, the first that has one; None without."""

    def read(*names: str) -> int | None:
        found = (getattr(source, name, None) for source in sources for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    heads = read("num_attention_heads", "num_heads", "n_heads", "n_head")
    width = read("hidden_size", "n_embd", "d_model", "embed_dim")
    head_dim = read("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim") or (
        width and heads and width // heads
    )
    if not heads or not head_dim:
        return None
    groups = read("num_key_value_heads", "num_kv_heads", "kv_heads", "n_head_kv")
    return HeadCounts(heads, groups or heads, head_dim)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a Linear, a Conv1D of transformers, or an adapter around one."""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) or model_class(base) == "Conv1D"


def projection_width(module: nn.Module, side: Literal["in", "out"]) -> int:
    """Width of a projection's input or output, from its weight where that can be read."""
    base = getattr(module, "base_layer", module)
    weight = _plain_weight(base)
    if weight is not None:
        return weight.shape[_head_dimension(base, side)]
    attributes = {"in": ("in_features", "nx"), "out": ("out_features", "nf")}[side]
    return next(getattr(base, name) for name in attributes if hasattr(base, name))


def _plain_weight(base: nn.Module) -> nn.Parameter | None:
    """The weight, None where it is packed (quantised) or parametrized."""
    weight = base._parameters.get("weight")
    return weight if weight is not None and weight.ndim == 2 and weight.is_floating_point() else None


def _head_dimension(base: nn.Module, side: Literal["in", "out"]) -> int:
    """Linear keeps its weight as out x in, Conv1D as in x out."""
    return int((side == "in") == isinstance(base, nn.Linear))


def _projection(part: NamedModule, layout: HeadLayout, side: Literal["in", "out"]) -> HeadProjection:
    """The projection with everything that its heads divide; LoRA's A sees the inputs, its B makes the outputs."""
    module, base = part.module, getattr(part.module, "base_layer", part.module)
    base_name = part.name if base is module else f"{part.name}.base_layer"
    if _plain_weight(base) is None:
        return HeadProjection(part.name, module, layout, (), "its weight is packed or parametrized")
    axes = [(base, f"{base_name}.weight", _head_dimension(base, side))]
    if side == "out" and base.bias is not None:
        axes.append((base, f"{base_name}.bias", 0))
    obstacle = ""
    if base is not module:
        factor = "lora_A" if side == "in" else "lora_B"
        adapters = dict(getattr(module, factor, {}).items())
        variants = len(getattr(module, "lora_magnitude_vector", ())) or getattr(module, "lora_variant", None)
        if not adapters or variants:
            obstacle = f"it is adapted by {model_class(module)} in a form other than plain LoRA"
        for name, adapter in adapters.items():
            if isinstance(adapter, nn.Parameter):  # AdaLoRA keeps its factors in a ParameterDict
                axes.append((getattr(module, factor), f"{part.name}.{factor}.{name}", int(side == "in")))
                continue
            for kind, _ in adapter.named_parameters():
                if kind == "weight" or side == "out":
                    axes.append((adapter, f"{part.name}.{factor}.{name}.{kind}", int(side == "in")))
    return HeadProjection(part.name, module, layout, tuple(axes), obstacle)


def _split(width: int, size: int, name: str) -> int:
    if width < size or width % size:
        raise UnsupportedArchitectureError(f"the width {width} of {name!r} is not a multiple of {size}")
    return width // size


def _query_key_value(
    modules: Mapping[str, nn.Module], block: str, spec: FamilySpec, n_heads: int, head_dim: int
) -> QueryKeyValue | None:
    paths = spec.query_key_value
    if paths is None:
        return None
    if isinstance(paths, FusedProjection):
        part = _projection_at(modules, join_names(block, paths.path))
        layouts = _fused_layouts(part, paths.order, n_heads, head_dim)
        return QueryKeyValue(*(_projection(part, layout, "out") for layout in layouts))
    parts = [_projection_at(modules, join_names(block, path)) for path in paths]
    counts = [_split(projection_width(part.module, "out"), head_dim, part.name) for part in parts]
    return QueryKeyValue(*(_projection(p, HeadLayout(n, head_dim), "out") for p, n in zip(parts, counts, strict=True)))


def _fused_layouts(part: NamedModule, order: FusedOrder, n_heads: int, head_dim: int) -> list[HeadLayout]:
    """Where queries, keys and values lie in the output of one projection."""
    heads = _split(projection_width(part.module, "out"), head_dim, part.name)
    if order == "interleaved":
        each = _split(heads, 3, part.name)
        return [HeadLayout(each, head_dim, index * head_dim, 3 * head_dim) for index in range(3)]
    groups = _split(heads - n_heads, 2, part.name)
    if order == "grouped":
        run = _split(n_heads, groups, part.name)
        stride = (run + 2) * head_dim
        keys, values = (HeadLayout(groups, head_dim, (run + index) * head_dim, stride) for index in range(2))
        return [HeadLayout(n_heads, head_dim, 0, stride, run), keys, values]
    sizes, starts = (n_heads, groups, groups), (0, n_heads, n_heads + groups)
    return [HeadLayout(size, head_dim, start * head_dim) for size, start in zip(sizes, starts, strict=True)]


def _projection_at(modules: Mapping[str, nn.Module], name: str) -> NamedModule:
    part = _named(modules, name)
    if not is_projection(part.module):
        raise UnsupportedArchitectureError(f"{name!r} is a {model_class(part.module)}, not a Linear or Conv1D")
    return part


def read_attention(modules: Mapping[str, nn.Module], block: str, spec: FamilySpec, counts: HeadCounts) -> Attention:
    """A block's attention at the paths of its family; widths are the weights' own, for heads may have been removed."""
    output = _projection_at(modules, join_names(block, spec.output))
    n_heads = _split(projection_width(output.module, "in"), counts.head_dim, output.name)
    projections = _query_key_value(modules, block, spec, n_heads, counts.head_dim)
    attention = _named(modules, join_names(block, spec.attention))
    return Attention(
        name=attention.name,
        module=attention.module,
        output=_projection(output, HeadLayout(n_heads, counts.head_dim), "in"),
        n_key_value_heads=projections.key.layout.n_heads if projections else counts.n_key_value_heads,
        query_key_value=projections,
    )


def _read_mlp(modules: Mapping[str, nn.Module], block: str, spec: FamilySpec) -> MLP | Missing:
    if not spec.mlp:
        return Missing("its family was registered without an MLP")
    parts = tuple(_named(modules, join_names(block, path)) for path in spec.mlp)
    output = _named(modules, join_names(block, spec.mlp_output))
    if not is_experts(output.module):
        output = _projection_at(modules, output.name)
    return MLP(parts, output, (output,))


def read_registered(modules: Mapping[str, nn.Module], owner: str, *, config: Any, spec: FamilySpec) -> Architecture:
    """The architecture of a registered family; its owner is the module that carries the configuration."""
    counts = spec.heads or head_counts(config)
    if counts is None:
        raise UnsupportedArchitectureError("its configuration does not tell the number of heads and their width")
    lists = (
        name
        for name, module in modules.items()
        if name.startswith(inside_prefix(owner)) and f".{name}".endswith(f".{spec.blocks}")
        if isinstance(module, nn.ModuleList) and _active_name(modules, f"{name}.0.{spec.output}") in modules
    )
    name = next(lists, None)
    if name is None:
        raise UnsupportedArchitectureError(f"there is no list {spec.blocks!r} of blocks with {spec.output!r}")
    blocks = tuple(
        Block(
            index=index,
            name=(block := join_names(name, child)),
            module=modules[block],
            attention_part=read_attention(modules, block, spec, counts),
            mlp_part=_read_mlp(modules, block, spec),
        )
        for index, child in enumerate(modules[name]._modules)
    )
    return Architecture(config.model_type, "registry", blocks, *vars(counts).values())


_NAME = "goldy_eager"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What an attention function is asked for.

    Args:
        module: The attention module.
        value: Values, shape ``[B, G, Tk, D]``, G groups of heads.
        mask: Additive, broadcasts to ``[B, H, Tq, Tk]`` and may have more keys; None when every key is visible.
        dropout: Share of the weights that is dropped in training.
    """

    module: nn.Module
    value: Tensor
    mask: Tensor | None
    dropout: float


Attended: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Heads, shape ``[B, Tq, H, D]``, and their weights, shape ``[B, H, Tq, Tk]``."""

Around: TypeAlias = Callable[[AttentionCall, Callable[[], Attended]], Attended]
"""``around(call, compute)`` gives what takes the place of ``compute()``."""

# By identity of the modules. No context variable: a backward pass that computes again may run in another thread.
_AROUND: dict[int, tuple[Around, ...]] = {}


class AttentionKernelError(UnsupportedArchitectureError):
    """A model's attention cannot be computed by its family's eager arithmetic; the message names the model."""


@contextmanager
def eager_attention(model: nn.Module, around: Around | None = None) -> Iterator[None]:
    """Has a model compute attention by its family's eager arithmetic, whatever implementation it is set to.

    Blocks may be nested: the function of the inner one is called first, and computes through that of the outer one.

    Args:
        model: A transformers model or anything that contains one; its implementation is restored after. Nothing else of
            it changes, so a sharded model stays as it is.
        around: Called in the place of each attention function.

    Raises:
        AttentionKernelError: The model does not take its attention function from ``AttentionInterface``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model, shapes = GPT2LMHeadModel(config), []
        >>> def see(call, compute):
        ...     heads, weights = compute()
        ...     shapes.append(tuple(weights.shape))
        ...     return heads, weights
        >>> with eager_attention(model, see):
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> shapes, model.config._attn_implementation
        ([(1, 2, 3, 3), (1, 2, 3, 3)], 'sdpa')
    """
    _register()
    owner: Any = next((part for part in model.modules() if hasattr(part, "set_attn_implementation")), None)
    if owner is None:
        raise AttentionKernelError(f"{model_class(model)} is no transformers model")
    configs = _configurations(model)
    before = [config._attn_implementation_internal for config in configs]
    parts = [] if around is None else [id(part) for part in model.modules()]
    functions = {part: _AROUND[part] for part in parts if part in _AROUND}
    try:
        if any(name != _NAME for name in before):
            owner.set_attn_implementation(_NAME)
        if any(config._attn_implementation_internal != _NAME for config in configs):
            raise _ignored(owner)
        _AROUND.update({part: (*functions.get(part, ()), around) for part in parts if around is not None})
        yield
    finally:
        for part in parts:
            _AROUND.pop(part, None)
        _AROUND.update(functions)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as eager attention adds it to the scores.

    A batch may bring a boolean one for its own kernel, which would be added as 0 and 1. No number is below the lowest
    of float32, in which families take the softmax of any type: a row of padding that sees nothing would become NaN.

    Args:
        mask: Boolean, True where visible, or additive.
        dtype: Of the scores.

    Example:
        >>> additive_mask(torch.tensor([True, False]), torch.float16).tolist()
        [0.0, -65504.0]
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask.clamp(min=torch.finfo(torch.float32).min) if mask.dtype == torch.float64 else mask


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    # Without a mask function of its own, the mask would be None and attention silently not causal.
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Attended:
    # The family's own: it knows of soft caps, sinks and groups. FSDP2 puts a class of its own before the family's.
    homes = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    functions: Iterator[Any] = (getattr(home, "eager_attention_forward", None) for home in homes)
    eager = next((function for function in functions if function is not None), None)
    if eager is None:
        raise _ignored(module)
    mask = additive_mask(attention_mask, query.dtype)
    call = AttentionCall(module, value, mask, options.get("dropout") or 0.0)
    compute: Callable[[], Attended] = partial(eager, module, query, key, value, mask, **options)
    for around in _AROUND.get(id(module), ()):
        compute = partial(around, call, compute)
    return compute()


def _configurations(model: nn.Module) -> list[Any]:
    found = (getattr(part, "config", None) for part in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


def _ignored(module: nn.Module) -> AttentionKernelError:
    return AttentionKernelError(f"{model_class(module)} ignores set_attn_implementation")
