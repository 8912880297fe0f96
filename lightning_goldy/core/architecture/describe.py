"""What a model is made of, read from the names of its family's modules or found with one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product, takewhile
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_goldy.core.architecture.blocks import Architecture, UnsupportedArchitectureError
from lightning_goldy.core.architecture.families import (
    FamilySpec,
    HeadCounts,
    available_architectures,
    build_block,
    canonical_modules,
    family_spec,
    head_counts,
    inside_prefix,
    is_projection,
    join_names,
    projection_width,
    read_registered,
)
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import model_class

# What attention calls, whichever kernel runs below it; softmax is what eager attention has in common.
_ATTENTION_FUNCTIONS = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax)
_USUAL_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)
_FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def describe_architecture(model: nn.Module, *, sample_batch: Any = None) -> Architecture:
    """Finds the blocks, attention and MLP modules of a model, and the weights of each head.

    A registered family is read from module names. Any other model is probed with one forward pass, which leaves no
    trace on it; under FSDP2 all ranks must then call this together.

    Args:
        model: A model or anything that contains one: bare, with a task head, under PEFT, DistributedDataParallel,
            ``torch.compile`` or in a LightningModule. Of several models inside, the outermost registered one counts.
        sample_batch: What a probe calls the model with: a mapping, a tuple or a tensor; None builds token ids.

    Returns:
        The architecture, with live references to the modules.

    Raises:
        UnsupportedArchitectureError: An encoder-decoder, or a part could not be found.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> architecture = describe_architecture(GPT2LMHeadModel(config))
        >>> architecture.family, architecture.n_heads, architecture.blocks[1].attention_output_name
        ('gpt2', 2, 'transformer.h.1.attn.c_proj')
        >>> [(part.name, part.index[1]) for part in architecture.blocks[0].value.head_slice(1)[:1]]
        [('transformer.h.0.attn.c_attn.weight', slice(20, 24, None))]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = canonical_modules(model)
    # Every submodule of a Hugging Face model may carry a configuration; the outermost comes first.
    found = ((name, _configuration(module)) for name, module in modules.items())
    configured = [(name, config) for name, config in found if config is not None]
    owner, config = configured[0] if configured else ("", getattr(modules[""], "config", None))
    family = configured[0][1].model_type if configured else model_class(modules[""])
    try:
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedArchitectureError("an encoder-decoder has two stacks of blocks; describe one of the two")
        for name, registered in configured:
            if registered.model_type in available_architectures():
                owner, family = name, registered.model_type
                return read_registered(modules, owner, config=registered, spec=family_spec(registered))
        return probe_architecture(modules, owner, config=config, family=family, sample_batch=sample_batch)
    except UnsupportedArchitectureError as error:
        kind = f"model_type {family!r}" if configured else "no model_type"
        raise UnsupportedArchitectureError(
            f"cannot describe {model_class(modules[owner])} ({kind}): {error}. "
            f"Registered: {', '.join(available_architectures())}; add a family with @register_architecture"
        ) from error


def _configuration(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if isinstance(getattr(config, "model_type", None), str) else None


class _Event(NamedTuple):
    """Attention was computed, or a projection called, inside these nested modules (names, outermost first)."""

    kind: Literal["attention", "projection"]
    stack: tuple[str, ...]


class _Recorder(TorchFunctionMode):
    """Writes down, in order, where attention is computed and which projections are called."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.stack: list[str] = []
        self.events: list[_Event] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack and func in _ATTENTION_FUNCTIONS:
            self.events.append(_Event("attention", tuple(self.stack)))
        return func(*args, **(kwargs or {}))

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        # A projection inside a projection is an adapter's own affair.
        adapted = any(is_projection(self.modules[outer]) for outer in self.stack)
        self.stack.append(name)
        if is_projection(module) and not adapted:
            self.events.append(_Event("projection", tuple(self.stack)))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()


@contextmanager
def _recording(modules: Mapping[str, nn.Module], block_list: str) -> Iterator[_Recorder]:
    recorder = _Recorder(modules)
    names: dict[int, str] = {}
    handles = []
    try:
        for name, module in modules.items():
            inside = name != block_list and name.startswith(inside_prefix(block_list))
            if inside and names.setdefault(id(module), name) == name:
                handles.append(module.register_forward_pre_hook(partial(recorder.enter, name)))
                handles.append(module.register_forward_hook(recorder.leave))
        with recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def probe_architecture(
    modules: Mapping[str, nn.Module], owner: str, *, config: Any, family: str, sample_batch: Any
) -> Architecture:
    """Describes a model of any family from one forward pass in evaluation mode.

    The blocks are the list of modules of one class that holds most parameters. In each, the attention output projection
    is the first projection of input width heads x head_dim called after attention is computed, and the MLP output
    projection is the last one outside attention that writes to the residual stream. ``query_key_value`` is None in
    blocks whose projections are fused or unusually named.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    block_list = _find_blocks(modules, owner)
    batch = _token_ids(modules[owner], config) if sample_batch is None else sample_batch
    events = _record(modules, owner, block_list, batch)
    all_counts, blocks = [], []
    for index, child in enumerate(dict(modules[block_list].named_children())):
        name = join_names(block_list, child)
        counts, spec = _probed_spec(modules, name, [event for event in events if event.stack[0] == name], config)
        all_counts.append(counts)
        blocks.append(build_block(modules, name, index=index, spec=spec, counts=counts))
    first = all_counts[0]
    return Architecture(family, "probe", tuple(blocks), first.n_heads, blocks[0].n_key_value_heads, first.head_dim)


def _record(modules: Mapping[str, nn.Module], owner: str, block_list: str, batch: Any) -> list[_Event]:
    """What happens inside the blocks during one forward pass in evaluation mode, which leaves no trace."""
    model = modules[owner]
    with preserved(model), torch.no_grad(), _recording(modules, block_list) as recorder, _uncompiled(model):
        try:
            _call(model, batch)
        except _FORWARD_ERRORS as error:
            raise UnsupportedArchitectureError(f"its probe forward raised {type(error).__name__}: {error}") from error
    return recorder.events


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled code would not call hooks that it was not traced with."""
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _find_blocks(modules: Mapping[str, nn.Module], owner: str) -> str:
    found: list[tuple[int, int, str]] = []
    for name, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name.startswith(inside_prefix(owner)):
            classes = {type(modules[join_names(name, child)]) for child in module._modules}
            if len(classes) == 1:
                size = sum(parameter.numel() for parameter in module.parameters())
                found.append((size, len(module), name))
    if not found:
        raise UnsupportedArchitectureError("there is no list of blocks (a ModuleList of modules of one class)")
    return max(found, key=lambda entry: entry[:2])[2]


def _token_ids(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UnsupportedArchitectureError("nothing tells what it eats: pass a sample_batch")
    device = next(model.parameters()).device
    return {"input_ids": torch.arange(2, 6, device=device)[None] % vocabulary}  # [1, 4]


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _probed_spec(
    modules: Mapping[str, nn.Module], block: str, events: list[_Event], config: Any
) -> tuple[HeadCounts, FamilySpec]:
    at = next((index for index, event in enumerate(events) if event.kind == "attention"), None)
    if at is None:
        raise UnsupportedArchitectureError(
            f"no attention function ran in {block!r} (scaled_dot_product_attention or softmax; the attention "
            f"implementation is {getattr(config, '_attn_implementation', None)!r})"
        )
    caller = events[at].stack
    counts = head_counts(*(modules[name] for name in reversed(caller)), config)
    if counts is None:
        raise UnsupportedArchitectureError(
            f"neither {caller[-1]!r} nor a configuration tells the heads' number and width"
        )
    before = [event.stack[-1] for event in events[:at] if event.kind == "projection"]
    after = [event.stack[-1] for event in events[at:] if event.kind == "projection"]
    output = _attention_output(modules, block, after, counts)
    pairs = zip(caller[-1].split("."), output.split("."), strict=False)
    attention = ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # what holds both
    outside = [name for name in before + after if not name.startswith(f"{attention}.")]
    if attention == block:
        outside = after[after.index(output) + 1 :]
    path = slice(len(block) + 1, None)  # what follows the block's own name
    spec = FamilySpec(
        blocks=block.rpartition(".")[0],
        attention=attention[path],
        output=output[path],
        query_key_value=_usual_projections(modules, block, before, counts),
        mlp=tuple(dict.fromkeys(_outermost(name, block, attention)[path] for name in outside)),
        mlp_output=_mlp_output(modules, block, outside, projection_width(modules[output], "out"))[path],
    )
    return counts, spec


def _attention_output(modules: Mapping[str, nn.Module], block: str, after: list[str], counts: HeadCounts) -> str:
    width = counts.n_heads * counts.head_dim
    output = next((name for name in after if projection_width(modules[name], "in") == width), None)
    if output is None:
        raise UnsupportedArchitectureError(
            f"no attention output projection: after attention, {block!r} called no Linear or Conv1D of input width "
            f"{counts.n_heads} heads x {counts.head_dim}"
        )
    if after.count(output) > 1:
        raise UnsupportedArchitectureError(
            f"{block!r} runs {after.count(output)} times per forward: its depths share it"
        )
    return output


def _mlp_output(modules: Mapping[str, nn.Module], block: str, outside: list[str], residual: int) -> str:
    writers = [name for name in outside if projection_width(modules[name], "out") == residual]
    if not writers:
        raise UnsupportedArchitectureError(
            f"no MLP output projection: outside attention, {block!r} called no Linear or Conv1D of output width "
            f"{residual} (fused mixture-of-experts weights are not supported)"
        )
    return writers[-1]


def _outermost(name: str, block: str, attention: str) -> str:
    """The largest module around a projection that is inside the block and does not contain attention."""
    parts = name.split(".")
    for depth in range(block.count(".") + 2, len(parts)):
        around = ".".join(parts[:depth])
        if not f"{attention}.".startswith(f"{around}."):
            return around
    return name


def _usual_projections(
    modules: Mapping[str, nn.Module], block: str, before: list[str], counts: HeadCounts
) -> tuple[str, str, str] | None:
    """Separate projections with usual names and the right widths; a fused layout cannot be told from outside."""
    for names, first in product(_USUAL_NAMES, before):
        parent, _, last = first.rpartition(".")
        paths = [f"{parent}.{name}" for name in names]
        if last == names[0] and all(path in before for path in paths):
            query, key, value = (projection_width(modules[path], "out") for path in paths)
            if query == counts.n_heads * counts.head_dim and key == value and query % key == 0 == key % counts.head_dim:
                first, second, third = (path[len(block) + 1 :] for path in paths)
                return first, second, third
    return None
