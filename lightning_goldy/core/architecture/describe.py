"""What a model is made of, read from the names of its family's modules or found with forward passes and verified."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product, takewhile
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from lightning_goldy.core.architecture.blocks import (
    MLP,
    Architecture,
    Attention,
    Block,
    Missing,
    NamedModule,
    UnsupportedArchitectureError,
    is_experts,
    require_stack,
)
from lightning_goldy.core.architecture.families import (
    FamilySpec,
    HeadCounts,
    available_architectures,
    canonical_modules,
    family_spec,
    head_counts,
    inside_prefix,
    is_projection,
    join_names,
    known_fused,
    projection_width,
    read_attention,
    read_registered,
)
from lightning_goldy.core.isolation import isolated_rng, preserved
from lightning_goldy.core.naming import kind_of, model_class
from lightning_goldy.core.sharding import is_sharded

_USUAL_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def describe_architecture(
    model: nn.Module, *, sample_batch: Any = None, stack: Literal["encoder", "decoder"] | None = None
) -> Architecture:
    """Finds the blocks, attention and MLP modules of a model, and the weights of each head.

    A registered family is read from module names. Any other model is probed with a few forward passes, which leave no
    trace on it; under FSDP2 all ranks must then call this together. What a probe guesses is verified by what the blocks
    compute. Attention and MLPs stand alone: one that is absent or could not be told is refused where it is asked for.

    Args:
        model: A model or anything that contains one: bare, with a task head, under PEFT, DistributedDataParallel,
            ``torch.compile`` or in a LightningModule. Of several models inside, the outermost registered one counts.
        sample_batch: What a probe calls the model with: a mapping, a tuple or a tensor; None makes up token ids, an
            image or sound, as the configuration tells.
        stack: Of an encoder-decoder only the ``encoder`` or the ``decoder``; None describes both, the encoder first.

    Returns:
        The architecture, with live references to the modules.

    Raises:
        UnsupportedArchitectureError: The blocks or their attention could not be found.

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
    if stack is not None:
        require_stack(stack)
    modules = canonical_modules(model)
    adapted = (name for name, part in modules.items() if "AdaptedAttention" in type(part).__name__)
    wrapped = next((name for name in adapted if model_class(modules[name]).startswith("AdaptedAttention")), None)
    if wrapped is not None:
        raise UnsupportedArchitectureError(
            f"{model_class(model)}: PEFT's adaption prompt adds attention of its own in {wrapped!r}, which is not that "
            "of the model's heads; describe the model inside `with model.disable_adapter():`, or without the adapter"
        )
    # Every submodule of a Hugging Face model may carry a configuration; the outermost comes first.
    found = ((name, _configuration(module)) for name, module in modules.items())
    configured = [(name, config) for name, config in found if config is not None]
    owner, config = configured[0] if configured else ("", getattr(modules[""], "config", None))
    family = configured[0][1].model_type if configured else model_class(modules[""])
    try:
        for name, registered in [] if has_two_stacks(modules, owner, config) else configured:
            if registered.model_type in available_architectures() and stack is None:
                owner, family = name, registered.model_type
                return read_registered(modules, owner, config=registered, spec=family_spec(registered))
        return probe_architecture(modules, owner, config=config, family=family, sample_batch=sample_batch, stack=stack)
    except UnsupportedArchitectureError as error:
        kind = f"model_type {family!r}" if configured else "no model_type"
        raise UnsupportedArchitectureError(
            f"cannot describe {model_class(modules[owner])} ({kind}): {error}. "
            f"Registered: {', '.join(available_architectures())}; add a family with @register_architecture"
        ) from error


def _configuration(module: nn.Module) -> Any:
    kind = type(module)
    if kind.__getattr__ is nn.Module.__getattr__ and "config" not in vars(module) and not hasattr(kind, "config"):
        # A module takes long to say that it has no such attribute.
        return None
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
        result = func(*args, **(kwargs or {}))
        # Routers take a softmax too, over experts: of a matrix, or of one per sample.
        if self.stack and func in ATTENTION_FUNCTIONS and (result.ndim > 3 or (result.ndim == 3 and len(result) > 1)):
            self.events.append(_Event("attention", tuple(self.stack)))
        return result

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        # A projection inside a projection is an adapter's own affair.
        adapted = any(_writes(self.modules[outer]) for outer in self.stack)
        self.stack.append(name)
        if _writes(module) and not adapted:
            self.events.append(_Event("projection", tuple(self.stack)))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()


def _writes(module: nn.Module) -> bool:
    return is_projection(module) or is_experts(module)


@contextmanager
def _recording(modules: Mapping[str, nn.Module], block_lists: Sequence[str]) -> Iterator[_Recorder]:
    recorder = _Recorder(modules)
    names: dict[int, str] = {}
    handles = []
    try:
        for name, module in modules.items():
            inside = any(name != blocks and name.startswith(inside_prefix(blocks)) for blocks in block_lists)
            if inside and names.setdefault(id(module), name) == name:
                handles.append(module.register_forward_pre_hook(partial(recorder.enter, name)))
                handles.append(module.register_forward_hook(recorder.leave))
        with recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def probe_architecture(
    modules: Mapping[str, nn.Module],
    owner: str,
    *,
    config: Any,
    family: str,
    sample_batch: Any,
    stack: str | None = None,
) -> Architecture:
    """Describes a model of any family from forward passes in evaluation mode.

    The blocks are the list of modules that holds most parameters, of one class where there is such a list. In each, the
    attention output projection is the first projection of input width heads x head_dim called after attention is
    computed, and the MLP is what writes to the residual stream outside attention. Both are verified: a head that is
    closed in the attention function must be a slice of the projection's input, and of an MLP whose writers are silenced
    nothing may remain. ``query_key_value`` is None in blocks whose projections are fused in no known way or unusually
    named.
    """
    model = modules[owner]
    block_lists = [_find_blocks(modules, name) for name in _stack_names(modules, owner, config, stack)]
    two = has_two_stacks(modules, owner, config)
    batch = sample_inputs(model, config, decoder=two) if sample_batch is None else sample_batch
    if two and isinstance(batch, Mapping) and not {"decoder_input_ids", "labels"} & set(batch):
        batch = {**batch, **_decoder_ids(model, config)}
    text = config.get_text_config() if hasattr(config, "get_text_config") and not two else config
    blocks: list[Block] = []
    # Compiled code would not call hooks that it was not traced with.
    with preserved(model), torch.no_grad():
        with _recording(modules, block_lists) as recorder:
            call_model(model, batch)
        known: dict[Any, tuple[str, str]] = {}
        all_counts = []
        for block_list in block_lists:
            names = [join_names(block_list, child) for child in dict(modules[block_list].named_children())]
            guesses, counts = _guess(modules, names, recorder.events, text)
            all_counts += counts
            run = partial(call_model, model, batch)
            blocks += [verified(run, block, known=known) for block in _numbered(guesses, len(blocks))]
    stacks = tuple(name for name in ("encoder", "decoder") if two and stack in (None, name))
    if not all_counts:
        _require_mlp(blocks, text)
        return Architecture(family, "probe", tuple(blocks), 0, 0, 0, stacks)
    first, described = all_counts[0], next(block for block in blocks if block.has_attention)
    groups = described.n_key_value_heads if isinstance(described.attention_part, Attention) else first.n_key_value_heads
    return Architecture(family, "probe", tuple(blocks), first.n_heads, groups, first.head_dim, stacks)


def _numbered(guesses: Sequence[Block], start: int) -> Iterator[Block]:
    for number, block in enumerate(guesses, start):
        yield Block(number, block.name, block.module, block.attention_part, block.mlp_part)


def has_two_stacks(modules: Mapping[str, nn.Module], owner: str, config: Any) -> bool:
    """Whether it is a whole encoder-decoder; each of its halves carries the same configuration."""
    if not getattr(config, "is_encoder_decoder", False):
        return False
    return {"encoder", "decoder"} <= {name.rpartition(".")[2] for name, _ in _inside(modules, owner)}


def _stack_names(modules: Mapping[str, nn.Module], owner: str, config: Any, stack: str | None) -> list[str]:
    """The modules whose blocks are described: the model, or the encoder and the decoder of an encoder-decoder."""
    if has_two_stacks(modules, owner, config):
        wanted = ("encoder", "decoder") if stack is None else (stack,)
        return [next(name for name, _ in _inside(modules, owner) if name.rpartition(".")[2] == part) for part in wanted]
    if stack is not None:
        raise UnsupportedArchitectureError(f"stack={stack!r} names a part of an encoder-decoder, which this is not")
    return [owner]


def _inside(modules: Mapping[str, nn.Module], owner: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in modules.items() if name.startswith(inside_prefix(owner)))


def _find_blocks(modules: Mapping[str, nn.Module], owner: str) -> str:
    alike: list[tuple[int, int, str]] = []
    mixed: list[tuple[int, int, str]] = []
    for name, module in _inside(modules, owner):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            classes = {type(modules[join_names(name, child)]) for child in module._modules}
            size = sum(parameter.numel() for parameter in module.parameters())
            if len(classes) == 1:
                alike.append((size, len(module), name))
            elif isinstance(module, nn.ModuleList):  # as hybrids keep their blocks
                mixed.append((size, len(module), name))
    largest = [max(found, key=lambda entry: entry[:2]) for found in (alike, mixed) if found]
    if not largest:
        raise UnsupportedArchitectureError("there is no list of blocks (a ModuleList of modules of one class)")
    # A list that holds little of what a mixed one holds is one of experts.
    return largest[0 if 2 * largest[0][0] >= largest[-1][0] else -1][2]


def sample_inputs(model: nn.Module, config: Any, *, decoder: bool = False) -> dict[str, Tensor]:
    """Something that a model can be called with, made from its configuration.

    Raises:
        UnsupportedArchitectureError: The configuration does not tell.
    """
    owner: Any = model
    device = next(model.parameters()).device
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    made: dict[str, Tensor] = {}
    kind = getattr(owner, "main_input_name", "input_ids")
    if kind == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        dtype = next(model.parameters()).dtype
        made[kind] = torch.linspace(-1, 1, getattr(config, "num_channels", 3) * size * size, device=device, dtype=dtype)
        made[kind] = made[kind].reshape(1, -1, size, size)  # [1, channels, height, width]
    elif kind == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        bins, length = config.num_mel_bins, 2 * config.max_source_positions
        dtype = next(model.parameters()).dtype
        made[kind] = torch.linspace(-1, 1, bins * length, device=device, dtype=dtype).reshape(1, bins, length)
    elif kind == "input_ids" and isinstance(vocabulary, int):
        made[kind] = torch.arange(2, 6, device=device)[None] % vocabulary  # [1, 4]
    if not made:
        raise UnsupportedArchitectureError(
            "nothing tells what it eats: pass a sample_batch to describe_architecture or HeadGates, with which it "
            "can be called"
        )
    return {**made, **(_decoder_ids(model, config) if decoder else {})}


def _decoder_ids(model: nn.Module, config: Any) -> dict[str, Tensor]:
    ids = torch.arange(3, 6, device=next(model.parameters()).device)[None]  # [1, 3]
    return {"decoder_input_ids": ids % config.get_text_config(decoder=True).vocab_size}


def call_model(model: nn.Module, batch: Any) -> None:
    """Calls a model with a mapping, a tuple or anything else, without labels.

    Raises:
        UnsupportedArchitectureError: The model raised.
    """
    try:
        # So that what a model draws is the same in every pass.
        with isolated_rng():
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    except _FORWARD_ERRORS as error:
        raise UnsupportedArchitectureError(f"its probe forward raised {type(error).__name__}: {error}") from error


def _guess(
    modules: Mapping[str, nn.Module], names: Sequence[str], events: Sequence[_Event], config: Any
) -> tuple[list[Block], list[HeadCounts]]:
    """The blocks of one list, first those with attention, whose MLPs say where those of the others are."""
    inside = {name: [event for event in events if name in event.stack[:1]] for name in names}
    attended = [name for name in names if any(event.kind == "attention" for event in inside[name])]
    if not attended:
        return [_without_attention(modules, name, inside[name], config) for name in names], []
    guesses: dict[str, Block] = {}
    all_counts, paths = [], set()
    for name in attended:
        counts, attention, mlp = _BlockProbe(modules, name, tuple(inside[name]), config).parts()
        all_counts.append(counts)
        guesses[name] = Block(0, name, modules[name], attention, mlp)
        if isinstance(mlp, MLP):
            paths |= {part.name[len(name) + 1 :].partition(".")[0] for part in mlp.parts}
    residual = projection_width(guesses[attended[0]].attention_output, "out")
    for name in names:
        if name not in guesses:
            absent = Missing("it computes no attention", absent=True)
            own = [event for event in inside[name] if event.stack[-1][len(name) + 1 :].partition(".")[0] in paths]
            mlp = _mlp(modules, name, own, residual, attention=None)
            if not any(join_names(name, path) in modules for path in paths):
                mlp = Missing("it has no MLP", absent=True)
            guesses[name] = Block(0, name, modules[name], absent, mlp)
    return [guesses[name] for name in names], all_counts


def _without_attention(modules: Mapping[str, nn.Module], name: str, events: Sequence[_Event], config: Any) -> Block:
    """A block of a model in which nothing attends; of its parts the one that is called an MLP is its MLP."""
    absent = Missing("it computes no attention", absent=True)
    width = _residual_width(config)
    own = [event for event in events if kind_of(f"0.{event.stack[-1][len(name) + 1 :]}.weight") == "mlp"]
    mlp: MLP | Missing = Missing("it has no MLP", absent=True)
    if own and isinstance(width, int):
        mlp = _mlp(modules, name, own, width, attention=None)
    return Block(0, name, modules[name], absent, mlp)


def _residual_width(config: Any) -> Any:
    return next((size for key in ("hidden_size", "d_model", "n_embd") if (size := getattr(config, key, None))), None)


def _require_mlp(blocks: Sequence[Block], config: Any) -> None:
    """Refuses a model that has neither attention nor an MLP that could be told."""
    if any(isinstance(block.mlp_part, MLP) for block in blocks):
        return
    missing = next(block.mlp_part for block in blocks if isinstance(block.mlp_part, Missing))
    raise UnsupportedArchitectureError(
        f"no attention function ran in {blocks[0].name!r} (scaled_dot_product_attention or softmax; the attention "
        f"implementation is {getattr(config, '_attn_implementation', None)!r}), and no MLP can be told: "
        f"{missing.reason}. Analyses of parameters need neither, and coupling takes select=[patterns of names]"
    )


@dataclass(frozen=True)
class _BlockProbe:
    """One block with attention, and what happened in it."""

    modules: Mapping[str, nn.Module]
    block: str
    events: tuple[_Event, ...]
    config: Any

    def parts(self) -> tuple[HeadCounts, Attention, MLP | Missing]:
        at = next(index for index, event in enumerate(self.events) if event.kind == "attention")
        caller = self.events[at].stack
        counts = head_counts(*(self.modules[name] for name in reversed(caller)), self.config)
        if counts is None:
            raise UnsupportedArchitectureError(
                f"neither {caller[-1]!r} nor a configuration tells the heads' number and width"
            )
        before = [event.stack[-1] for event in self.events[:at] if event.kind == "projection"]
        after = [event.stack[-1] for event in self.events[at:] if event.kind == "projection"]
        output = _attention_output(self.modules, self.block, after, counts, _residual_width(self.config))
        pairs = zip(caller[-1].split("."), output.split("."), strict=False)
        attention = ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # what holds both
        path = slice(len(self.block) + 1, None)  # what follows the block's own name
        spec = FamilySpec(
            blocks=self.block.rpartition(".")[0],
            attention=attention[path],
            output=output[path],
            query_key_value=_usual_projections(self.modules, self.block, before, counts)
            or known_fused(self.config, self.block, before),
        )
        outside = self._outside(attention, output)
        residual = projection_width(self.modules[output], "out")
        mlp = _mlp(self.modules, self.block, outside, residual, attention=attention)
        return counts, read_attention(self.modules, self.block, spec, counts), mlp

    def _outside(self, attention: str, output: str) -> list[_Event]:
        """Projections that belong to no attention, that of a decoder to its encoder included."""
        projections = [event for event in self.events if event.kind == "projection"]
        if attention == self.block:
            last = max(index for index, event in enumerate(projections) if event.stack[-1] == output)
            return projections[last + 1 :]
        kind = type(self.modules[attention])
        return [
            event
            for event in projections
            if not event.stack[-1].startswith(f"{attention}.")
            and not any(type(self.modules[name]) is kind for name in event.stack)
        ]


def _attention_output(
    modules: Mapping[str, nn.Module], block: str, after: list[str], counts: HeadCounts, residual: Any
) -> str:
    width = counts.n_heads * counts.head_dim
    fitting = [n for n in after if is_projection(modules[n]) and projection_width(modules[n], "in") == width]
    # A gate on the heads or a router may be as wide at its input.
    writing = [name for name in fitting if projection_width(modules[name], "out") == residual]
    output = next(iter(writing or fitting), None)
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


def _mlp(
    modules: Mapping[str, nn.Module], block: str, events: Sequence[_Event], residual: int, *, attention: str | None
) -> MLP | Missing:
    """The part outside attention that writes to the residual stream; of several the one that is called an MLP."""
    called = list(dict.fromkeys(event.stack[-1] for event in events))
    grouped: dict[str, list[str]] = {}
    for name in called:
        around = _outermost(name, block, attention)
        # Projections of the block itself belong together.
        grouped.setdefault("" if around == name else around, []).append(name)
    writing = {
        group: writers for group, names in grouped.items() if (writers := _writers(modules, block, names, residual))
    }
    if not writing:
        return Missing(
            f"no MLP output projection: outside attention, {block!r} called no Linear, Conv1D or stacked experts of "
            f"output width {residual}"
        )
    chosen = list(writing)
    if len(chosen) > 1:
        chosen = [group for group in writing if group and kind_of(f"0.{group[len(block) + 1 :]}.weight") == "mlp"]
    if len(chosen) != 1:
        names = ", ".join(repr(name) for writers in writing.values() for name in writers)
        return Missing(f"which part of {block!r} is the MLP cannot be told: {names} write to the residual stream")
    group, writers = chosen[0], writing[chosen[0]]
    alone = len(writing) > 1
    parts = [group or name for name in (grouped[group] if alone else called) if not group or alone]
    if not alone:
        parts = [_outermost(name, block, attention) for name in called]
    named = tuple(NamedModule(name, modules[name]) for name in dict.fromkeys(parts))
    made = tuple(NamedModule(name, modules[name]) for name in writers)
    if len(made) == 1 and is_projection(made[0].module):
        return MLP(named, made[0], made)
    if len(named) != 1:
        return Missing(
            f"the MLP of {block!r} is written by {', '.join(repr(part.name) for part in made)}, in no one module"
        )
    return MLP(named, named[0], made)


def _writers(modules: Mapping[str, nn.Module], block: str, called: Sequence[str], residual: int) -> list[str]:
    """The last projection of each module that writes to the residual stream, and stacks of experts.

    Of a list of experts those that no token of the probe went to write as well.
    """
    last: dict[str, str] = {}
    for name in called:
        if is_experts(modules[name]):
            last[name] = name
        elif projection_width(modules[name], "out") == residual:
            last[name.rpartition(".")[0]] = name
    forms = {_form(name[len(block) :]) for name in last.values()}
    beginning = inside_prefix(block)
    return [name for name in modules if name.startswith(beginning) and _form(name[len(block) :]) in forms]


def _form(path: str) -> str:
    """A path within a block in which the experts of a list are alike."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _outermost(name: str, block: str, attention: str | None) -> str:
    """The largest module around a projection that is inside the block and does not contain attention."""
    parts = name.split(".")
    for depth in range(block.count(".") + 2, len(parts)):
        around = ".".join(parts[:depth])
        if attention is None or not f"{attention}.".startswith(f"{around}."):
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


# What attention calls, whichever kernel runs below it; softmax is what eager attention has in common.
ATTENTION_FUNCTIONS = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax)
# As far apart as two kernels may be in half precision.
_CLOSE = 2e-2


def by_head(attended: Tensor, n_heads: int) -> Tensor | None:
    """A view of what an attention function returned with the heads in the third dimension from the end.

    Args:
        attended: Weights ``[..., H, Tq, Tk]`` or heads ``[..., H, Tq, D]``; samples and heads may be one dimension,
            and key/value groups and the heads of a group two.
        n_heads: H.

    Returns:
        None where the heads cannot be told.

    Example:
        >>> by_head(torch.zeros(6, 5, 5), 3).shape, by_head(torch.zeros(2, 5, 3), 3) is None
        (torch.Size([2, 3, 5, 5]), True)
    """
    if attended.ndim >= 4 and attended.shape[-3] == n_heads:
        return attended
    if attended.ndim == 3 and attended.shape[0] % n_heads == 0:
        return attended.unflatten(0, (-1, n_heads))
    if attended.ndim == 5 and attended.shape[-4] * attended.shape[-3] == n_heads:
        return attended.flatten(-4, -3)
    return None


def verify_attention(run: Callable[[], Any], attention: Attention) -> str:
    """Closes one head inside the attention function and looks for it at the input of the output projection.

    Args:
        run: Calls the model.
        attention: What was guessed.

    Returns:
        Why the guess is wrong or cannot be verified; empty when it holds.
    """
    layout, projection = attention.output.layout, attention.output.module
    head = layout.n_heads - 1
    columns = slice(layout.start(head), layout.start(head) + layout.head_dim)
    with _inputs(projection) as clean:
        run()
    mode = _ClosedHead(layout.n_heads, head)
    with _inputs(projection) as closed, mode.inside(attention.module):
        run()
    whose = f"{attention.output.name!r} is not verified as the attention output projection"
    if not mode.closed:
        return f"{whose}: in what its attention function returns {layout.n_heads} heads cannot be told"
    if len(clean) != 1 or len(closed) != 1 or clean[0].shape[-1] != layout.n_heads * layout.head_dim:
        return f"{whose}: it was called {len(clean)} times, or with another width than {layout.n_heads} heads"
    if bool((closed[0][..., columns] != 0).any()) or _moved_elsewhere(run, projection, columns, clean[0], closed[0]):
        return (
            f"{whose}: a head that is closed in the attention function is no slice of {layout.head_dim} of its input, "
            "as where all heads are normalised together before it"
        )
    return _verify_slices(attention, head, clean[0])


def _moved_elsewhere(
    run: Callable[[], Any], projection: nn.Module, columns: slice, clean: Tensor, closed: Tensor
) -> bool:
    """Whether closing a head has changed other columns than its own, by more than two equal passes differ."""
    rest = torch.ones(clean.shape[-1], dtype=torch.bool, device=clean.device)
    rest[columns] = False
    moved = float((closed - clean)[..., rest].double().abs().sum())
    if not moved:
        return False
    with _inputs(projection) as again:
        run()
    return moved > 4 * float((again[0] - clean)[..., rest].double().abs().sum())


def _verify_slices(attention: Attention, head: int, heads: Tensor) -> str:
    """A gate on a head and the head's zeroed weights must give the same output."""
    projection = attention.output
    if projection.obstacle or any(map(is_sharded, projection.module.parameters())):
        return ""  # its weights are not cut; gates work all the same
    inside = {id(value): name for name, value in projection.module.named_parameters()}
    values = {}
    for part in projection.head_slice(head):
        weight = part.parameter.detach().clone()
        part.of(weight).zero_()
        values[inside[id(part.parameter)]] = weight
    gated = heads.clone()
    gated.narrow(-1, projection.layout.start(head), projection.layout.head_dim).zero_()
    expected, found = projection.module(gated), functional_call(projection.module, values, (heads,))
    if _near(expected, found):
        return ""
    return f"the weights of head {head} of {projection.name!r} are not verified: zeroed, they do not act as a gate"


def verify_mlp(run: Callable[[], Any], block: Block, mlp: MLP) -> str:
    """Silences what writes the MLP's output: nothing of it may remain but what the MLP was given.

    Args:
        run: Calls the model.
        block: Whose MLP it is.
        mlp: What was guessed.

    Returns:
        Why the guess is wrong; empty when it holds.
    """
    whole = mlp.parts[0].module if len(mlp.parts) == 1 else block.module
    with _outputs([whole]) as clean, _outputs([part.module for part in mlp.writers]) as written:
        run()
    given: list[Tensor] = []
    with _outputs([whole]) as silent, ExitStack() as stack:
        hook = whole.register_forward_pre_hook(partial(_keep_inputs, given), with_kwargs=True)
        stack.callback(hook.remove)
        for part in mlp.writers:
            stack.callback(part.module.register_forward_hook(_silenced).remove)
        run()
    if not clean or len(clean) != len(silent):
        return f"{mlp.output.name!r} is not verified as the MLP's output: its MLP was not called"
    if not any(bool((value != 0).any()) for value in written):
        return ""  # what begins at zero can be seen by its place alone
    if len(mlp.parts) > 1:
        moved = not torch.equal(clean[0], silent[0])
        return "" if moved else f"{mlp.output.name!r} is not verified as the MLP's output: the block goes without it"
    if not bool((silent[0] != 0).any()) or any(_near(value, silent[0]) for value in given):
        return ""  # nothing is left, or the residual that some add inside
    names = ", ".join(repr(part.name) for part in mlp.writers)
    return f"the output of {mlp.parts[0].name!r} has a part that {names} do not write"


class _ClosedHead(TorchFunctionMode):
    """Zeroes one head in what attention functions return while a module runs."""

    def __init__(self, n_heads: int, head: int) -> None:
        super().__init__()
        self.n_heads, self.head = n_heads, head
        self.depth = self.closed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.depth and func in ATTENTION_FUNCTIONS and (seen := by_head(result, self.n_heads)) is not None:
            self.closed += 1
            keep = torch.ones(self.n_heads, 1, 1, dtype=result.dtype, device=result.device)
            keep[self.head] = 0
            return (seen * keep).reshape(result.shape)
        return result

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self.depth += 1

        def leave(*_: Any) -> None:
            self.depth -= 1

        handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda _, __, output: seen.append(_first(output).detach().clone()))
            stack.callback(handle.remove)
        yield seen


def _keep_inputs(given: list[Tensor], module: nn.Module, args: Any, options: Any) -> None:
    given += [value.detach().clone() for value in (*args, *options.values()) if isinstance(value, Tensor)]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _silenced(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _near(first: Tensor, second: Tensor) -> bool:
    if first.numel() != second.numel():
        return False
    apart = (first.double().flatten() - second.double().flatten()).abs().max()
    return float(apart) <= _CLOSE * float(first.double().abs().max())


def verified(run: Callable[[], Any], block: Block, *, known: dict[Any, tuple[str, str]]) -> Block:
    """The block with what was guessed wrongly taken out; of blocks of one make the first stands for all.

    Args:
        run: Calls the model.
        block: What was guessed.
        known: Earlier findings by make, added to.
    """
    attention, mlp = block.attention_part, block.mlp_part
    make = (type(block.module), *map(_make, (block, attention, mlp)))
    if make not in known:
        known[make] = (
            verify_attention(run, attention) if isinstance(attention, Attention) else "",
            verify_mlp(run, block, mlp) if isinstance(mlp, MLP) else "",
        )
    wrong_attention, wrong_mlp = known[make]
    if isinstance(mlp, MLP) and not wrong_mlp and len(mlp.parts) == 2:
        mlp = dataclasses.replace(mlp, between=_between(run, block, mlp))
    return Block(
        block.index,
        block.name,
        block.module,
        Missing(wrong_attention) if wrong_attention else attention,
        Missing(wrong_mlp) if wrong_mlp else mlp,
    )


_ACTIVATIONS = ("activation_fn", "activation", "act_fn", "act")


def _between(run: Callable[[], Any], block: Block, mlp: MLP) -> str | None:
    """What of the block makes the last projection's input from the first part's output; empty when they are equal."""
    with _outputs([mlp.parts[0].module]) as first, _inputs(mlp.output.module) as last:
        run()
    if len(first) != 1 or len(last) != 1:
        return None
    makers = {name: made for name in _ACTIVATIONS if callable(made := getattr(block.module, name, None))}
    for name, made in {"": nn.Identity(), **makers}.items():
        value = made(first[0])
        if isinstance(value, Tensor) and value.shape == last[0].shape and torch.equal(value, last[0]):
            return name
    return None


def _make(part: Block | Attention | MLP | Missing) -> Any:
    if isinstance(part, Attention):
        return type(part.module), type(part.output.module), part.output.layout, part.n_key_value_heads
    if isinstance(part, MLP):
        return tuple(type(writer.module) for writer in (*part.parts, *part.writers))
    return type(part)
