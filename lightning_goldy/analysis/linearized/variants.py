"""Variants of a model relative to a base: tangent, frozen attention, linear MLPs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lightning_goldy.analysis.precision import float64_throughout
from lightning_goldy.core.architecture import Architecture, Block, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.families import Attended, AttentionCall, AttentionKernelError, eager_attention
from lightning_goldy.core.autodiff import Substituted, call_with, forward_mode, nested_derivatives, require_seen
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.composed import composed_functions, without_checkpoints
from lightning_goldy.core.naming import model_class, require_choice, suggestion
from lightning_goldy.core.objective import accepts
from lightning_goldy.core.sharding import inside_parallel, is_sharded

At = Literal["base", "current"]
Variant = Literal["full", "frozen_attention", "linear_mlp", "tangent"]
Self = TypeVar("Self", bound="Intervention")

# While a model is run at its base for one intervention, all others on it stand aside.
_BASE_RUN: ContextVar[Intervention | None] = ContextVar("the intervention that runs the base", default=None)
# What interventions change at present, by what they say of it: the modules' identities.
_CHANGED: dict[str, set[int]] = {}


class BaseRelative(nn.Module):
    """A model that computes with its own parameters and with those of a base.

    Its parameters are the model's, so that it can be trained in the model's place. It gives up nothing else of the
    model: ``config`` and the arguments of ``forward`` are the model's too.

    Args:
        model: A plain model, not sharded.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes. Parameters that it
            lacks count as unchanged.

    Raises:
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.
        ValueError: The model is sharded.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, base: Base) -> None:
        super().__init__()
        model = inside_parallel(model)
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"{type(self).__name__} needs whole parameters, those of this {model_class(model)} are sharded; "
                "use it on a plain model or under DistributedDataParallel"
            )
        start = base_of(base, model).vector(model)
        self.model = model
        # A plain dict: the base is no part of this module's state.
        self._start: Mapping[str, Tensor] = start
        self._space = start.space
        self._placed: dict[str, Tensor] = dict(start)
        self.training = model.training

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def wrapped(self) -> nn.Module:
        """The model as it was given."""
        return self.model

    def get_base_model(self) -> nn.Module:
        """The model, whose forward names the arguments."""
        return Substituted(self.model, {}).get_base_model()

    def base_values(self) -> dict[str, Tensor]:
        """theta_0 by canonical name, on the device and in the dtype of the parameters."""
        for name, parameter in self._space.resolve(self.model).items():
            placed = self._placed[name]
            if placed.device != parameter.device or placed.dtype != parameter.dtype:
                self._placed[name] = self._start[name].to(parameter.device, parameter.dtype)
        return self._placed


class TangentModel(BaseRelative):
    r"""A model that is linear in its parameters: its tangent at the base.

    .. math:: f_1(x) = f(\theta_0; x) + J(\theta_0; x) (\theta - \theta_0)

    A module with the model's parameters that can be trained in its place: the gradient is that of the linear model,
    :math:`J(\theta_0)^\top v`. Without training,
    :class:`~lightning_goldy.analysis.taylor.taylor.TaylorApproximation` of order 1 gives the same logits. A float64
    model is float64 throughout, also where its code casts to float32
    (:func:`~lightning_goldy.analysis.precision.float64_throughout`).

    Args:
        model: Any model that returns a tensor or an output with ``logits``.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.

    Raises:
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.
        ValueError: The model is sharded.
        ForwardModeError: At a call, a layer has no forward mode.

    Source: Jacot et al. 2018 ("Neural Tangent Kernel").

    Example:
        >>> from lightning_goldy.core import ParameterVector
        >>> model = nn.Linear(2, 2)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.mul_(3)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(TangentModel(model, base)(x), model(x))  # linear in its parameters already
        True
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the tangent's logits; a tensor where the model gives one."""
        base = dict(self.base_values())
        present = self._space.resolve(self.model)
        outputs: list[Any] = []

        def logits(parameters: dict[str, Tensor]) -> Tensor:
            outputs.append(call_with(self.model, parameters, args, kwargs))
            return outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1].logits

        delta = {name: present[name] - base[name] for name in base}
        with float64_throughout(self.model), forward_mode(self.model), composed_functions() as composed:
            with nested_derivatives():
                value, change = jvp(logits, (base,), (delta,))[:2]
            require_seen(composed, logits, base, delta, change)
        linear = value + change
        return linear if isinstance(outputs[-1], Tensor) else type(outputs[-1])(logits=linear)


class Intervention(BaseRelative, ABC):
    """Changes parts of a model for the length of a ``with`` block, or of each of its own calls.

    Args:
        model: The model.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.
    """

    # Whether parts of the base's own pass over the batch are needed.
    needs_base_run = True

    def __init__(self, model: nn.Module, base: Base) -> None:
        super().__init__(model, base)
        self._entered: ExitStack | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the changed model."""
        if self._entered is not None:
            return self.model(*args, **kwargs)
        with self:
            return self.model(*args, **kwargs)

    def __enter__(self: Self) -> Self:
        if self._entered is not None:
            raise RuntimeError(f"this {type(self).__name__} is in a with block already")
        with ExitStack() as stack:
            # A checkpoint would recompute activations after the model is itself again.
            stack.enter_context(without_checkpoints())
            hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(self._changed())
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._entered = self._entered, None
        if stack is not None:
            stack.close()

    @abstractmethod
    def _changed(self) -> Any:
        """A context manager within which the model is changed."""

    @contextmanager
    def _alone(self, parts: Mapping[int, str], message: str) -> Iterator[None]:
        """Refuses a second intervention on the same modules, given by identity and name."""
        changed = _CHANGED.setdefault(message, set())
        for part, name in parts.items():
            if part in changed:
                raise RuntimeError(f"{message.format(name)}; one {type(self).__name__} at a time")
        changed.update(parts)
        try:
            yield
        finally:
            changed.difference_update(parts)

    @property
    def base_runs(self) -> bool:
        """Whether the model runs at the base for this intervention."""
        return _BASE_RUN.get() is self

    @property
    def stands_aside(self) -> bool:
        """Whether the model runs at the base for another intervention."""
        return _BASE_RUN.get() not in (None, self)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _BASE_RUN.get() is not None:
            return
        self._check_call(kwargs)
        if not self.needs_base_run:
            return
        uncached = {"use_cache": False} if accepts(self.model, "use_cache") else {}
        token = _BASE_RUN.set(self)
        try:
            # In evaluation mode: the base has no noise, and no random number is drawn for it.
            with _evaluation(self.model), torch.no_grad():
                call_with(self.model, self.base_values(), args, {**kwargs, **uncached})
        finally:
            _BASE_RUN.reset(token)

    def _check_call(self, kwargs: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if kwargs.get("past_key_values") is not None:
            raise ValueError(f"{name} needs whole sequences: call the model without past_key_values (use_cache=False)")


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class FrozenAttention(Intervention):
    r"""A model whose heads look where those of its base look, at the same batch.

    .. math:: \mathrm{head}_h(x) = A_h(x; \theta_0) \, V_h(x; \theta)

    Patterns A are what the base computes with its own activations throughout; values, output projections, MLPs and all
    else are the model's present ones. Use it as a context manager, inside which the model itself computes so, or call
    it: it is a module with the model's parameters, which trains without the gradient through the patterns (queries and
    keys get none). With DistributedDataParallel those are unused parameters.

    The patterns come from a pass of the base in evaluation mode without gradients, at every call. Attention is computed
    by the family's eager arithmetic, so that with base and present equal the model with eager attention is reproduced
    bit for bit; a model with another kernel (sdpa) to that kernel's rounding. In training, patterns are dropped as the
    model drops them, but no other dropout reaches them.

    Args:
        model: A transformers model, or anything that contains one, that takes its attention function from
            ``AttentionInterface``.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.

    Raises:
        UnsupportedArchitectureError: The family ignores ``AttentionInterface``, or its heads are not patterns times
            values.
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.
        ValueError: The model is sharded; at a call, past keys and values.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> model.set_attn_implementation("eager")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with torch.no_grad(), FrozenAttention(model, model):
        ...     frozen = model(input_ids=ids).logits
        >>> torch.equal(frozen, model(input_ids=ids).logits)
        True
    """

    def __init__(self, model: nn.Module, base: Base) -> None:
        super().__init__(model, base)
        # The modules and not their identities, so that a deep copy freezes its own. In a tuple: they are the model's.
        self._parts = tuple(
            (part, block.attention_name)
            for block in describe_architecture(model).attention_blocks
            for part in block.attention.modules()
        )
        self._blocks: dict[int, str] = {}
        self._patterns: dict[int, Tensor] = {}
        self._checked: set[int] = set()
        with self._eager():  # refuses a family that ignores it
            pass

    @contextmanager
    def _changed(self) -> Iterator[None]:
        self._blocks = {id(part): name for part, name in self._parts}
        with self._alone(self._blocks, "the attention of {!r} is frozen already"), self._eager():
            try:
                yield
            finally:
                self._patterns.clear()

    @contextmanager
    def _eager(self) -> Iterator[None]:
        try:
            with eager_attention(self.model, self._attend):
                yield
        except AttentionKernelError as error:
            raise UnsupportedArchitectureError(f"{error}, so its attention patterns cannot be kept") from error

    def _attend(self, call: AttentionCall, compute: Callable[[], Attended]) -> Attended:
        name = self._blocks.get(id(call.module))
        if name is None or self.stands_aside:
            return compute()
        if self.base_runs:
            heads, pattern = compute()
            if id(call.module) not in self._checked:
                if pattern is None or not _alike(heads, _weighted(pattern, call.value)):
                    raise UnsupportedArchitectureError(
                        f"the heads of {name!r} ({model_class(call.module)}) are not patterns times values, so "
                        "patterns cannot be kept"
                    )
                self._checked.add(id(call.module))
            if pattern is not None:
                self._patterns[id(call.module)] = pattern
            return heads, pattern
        pattern = self._patterns.get(id(call.module))
        if pattern is None:
            raise UnsupportedArchitectureError(f"{name!r} did not run in the base's pass, so it has no pattern to keep")
        dropped = F.dropout(pattern, p=call.dropout, training=call.module.training)
        return _weighted(dropped, call.value), dropped


def _weighted(pattern: Tensor, value: Tensor) -> Tensor:
    groups = pattern.shape[1] // value.shape[1]
    shared = value if groups == 1 else value.repeat_interleave(groups, dim=1)  # [B, G, T, D] -> [B, H, T, D]
    return torch.matmul(pattern, shared).transpose(1, 2).contiguous()  # [B, H, T, D] -> [B, T, H, D]


def _alike(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    # As far apart as two kernels may be in the lowest precision, not as two formulas are.
    apart = (first - second).abs().nan_to_num(0.0)
    return bool(apart.max() <= 1e-2 * first.abs().nan_to_num(0.0).max())


class LinearizedMLP(Intervention):
    r"""A model whose MLPs are replaced by their first-order expansion around the base's.

    With m an MLP, x its present input and x_0 the one that it has in the base, at the same batch:

    .. math::
        \text{at base:} \quad & m(\theta_0, x_0) + J_\theta(\theta_0, x_0) \Delta + J_x(\theta_0, x_0) (x - x_0) \\
        \text{at current:} \quad & m(\theta_0, x) + J_\theta(\theta_0, x) \Delta

    ``base`` is linear in everything that changed, what came before the MLP included; ``current`` is linear in the
    MLP's own parameters alone. Attention, norms and embeddings are the present ones. Use it as a context manager,
    inside which the model itself computes so, or call it: it is a module with the model's parameters, and gradients
    flow into Delta and x. With base and present equal the model is reproduced to rounding. Products of the Jacobian are
    exact (forward mode). ``base`` runs the base at every call, in evaluation mode without gradients.

    Args:
        model: A model of a known architecture, or one whose MLPs are single modules of one input.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        at: Which inputs the expansion is made at.

    Raises:
        UnsupportedArchitectureError: The MLPs cannot be told apart from the rest, or take more than one input.
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.
        ValueError: ``at`` is unknown, or the model sharded; at a call, past keys and values.
        ForwardModeError: At a call, an MLP has no forward mode.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> linear = LinearizedMLP(model, model)
        >>> torch.allclose(linear(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
        True
    """

    def __init__(self, model: nn.Module, base: Base, *, at: At = "base") -> None:
        super().__init__(model, base)
        if at not in get_args(At):
            raise ValueError(f"unknown at={at!r}; {suggestion(str(at), get_args(At))}")
        self.at = at
        self.needs_base_run = at == "base"
        names = {id(parameter): name for name, parameter in self._space.resolve(model).items()}
        architecture = describe_architecture(model)
        # In a tuple: the MLPs are parts of the model, not of this module.
        self._sites = tuple(_Site(self, architecture, block, names) for block in architecture.mlp_blocks)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        entries = {id(site.chain.entry): site.name for site in self._sites}
        forwards = _forwards([pair for site in self._sites for pair in site.forwards()])
        with self._alone(entries, "the MLP {!r} is linearised already"), forwards:
            try:
                yield
            finally:
                for site in self._sites:
                    site.clear()


class _Site:
    """One MLP, from its input to the output of its last projection."""

    def __init__(
        self, owner: LinearizedMLP, architecture: Architecture, block: Block, names: Mapping[int, str]
    ) -> None:
        self.owner = owner
        self.name = block.mlp_parts[0].name
        self.chain = _chain(architecture, block)
        self.names = {
            inside: names[id(parameter)]
            for inside, parameter in self.chain.named_parameters()
            if id(parameter) in names
        }
        self.base_input: Tensor | None = None
        self.input: Tensor | None = None
        self.evaluating = False

    def forwards(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """What replaces the forward of which module."""
        entry, exit_ = self.chain.entry, self.chain.exit
        if exit_ is None:
            own = entry.forward
            return [(entry, lambda x: self._enter(own, x) if self._is_itself else self._linear(x))]
        first, last = entry.forward, exit_.forward

        def enter(x: Tensor) -> Tensor:
            if self._is_itself:
                return self._enter(first, x)
            self.input = x
            return x  # what becomes of it on the way to the last projection does not matter

        def leave(hidden: Tensor) -> Tensor:
            if self._is_itself:
                return last(hidden)
            assert self.input is not None
            return self._linear(self.input)

        return [(entry, enter), (exit_, leave)]

    def clear(self) -> None:
        """Lets go of activations."""
        self.base_input = self.input = None

    @property
    def _is_itself(self) -> bool:
        return self.evaluating or self.owner.base_runs or self.owner.stands_aside

    def _enter(self, own: Callable[..., Any], x: Tensor) -> Any:
        if self.owner.base_runs:
            self.base_input = x.detach()
        return own(x)

    def _linear(self, x: Tensor) -> Tensor:
        base = self.owner.base_values()
        if self.owner.at == "base" and self.base_input is None:
            raise UnsupportedArchitectureError(f"{self.name!r} did not run in the base's pass, so it has no expansion")
        values = {inside: base[name] for inside, name in self.names.items()}
        present = dict(self.chain.named_parameters())
        delta = {inside: present[inside] - value for inside, value in values.items()}
        # Mixed precision may hand the two passes different types.
        start = x if self.base_input is None else self.base_input.to(x.dtype)
        self.evaluating = True
        try:
            with forward_mode(self.chain), nested_derivatives():
                if self.owner.at == "base":
                    value, change = jvp(self._value, (values, start), (delta, x - start))[:2]
                elif values:
                    value, change = jvp(lambda parameters: self._value(parameters, x), (values,), (delta,))[:2]
                else:
                    return self._value({}, x)
        finally:
            self.evaluating = False
        linear: Tensor = value + change
        return linear

    def _value(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        output = functional_call(self.chain, values, (x,))
        if not isinstance(output, Tensor):
            raise UnsupportedArchitectureError(f"{self.name!r} returns a {type(output).__name__}, not one tensor")
        return output


class _Chain(nn.Module):
    """The modules of an MLP in order, with what the block does between them."""

    def __init__(self, entry: nn.Module, exit_: nn.Module | None, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.entry, self.exit = entry, exit_
        self.between = (between,)

    def forward(self, x: Tensor) -> Any:
        hidden = self.entry(x)
        return hidden if self.exit is None else self.exit(self.between[0](hidden))


class _Between:
    """What a block does between two projections: its activation, if it has one, and the dropout after it."""

    def __init__(self, block: nn.Module, activation: str) -> None:
        self.block, self.activation = block, activation

    def __call__(self, x: Tensor) -> Tensor:
        activation = getattr(self.block, self.activation, None)
        hidden: Tensor = x if activation is None else activation(x)
        rate = getattr(self.block, "activation_dropout", 0.0)
        return F.dropout(hidden, rate, self.block.training) if activation is not None and rate else hidden


def _chain(architecture: Architecture, block: Block) -> _Chain:
    entry, exit_ = block.mlp_input, block.mlp_output
    if block.mlp is not None:
        needed = [
            taken
            for taken in inspect.signature(entry.forward).parameters.values()
            if taken.default is taken.empty and taken.kind not in (taken.VAR_POSITIONAL, taken.VAR_KEYWORD)
        ]
        if len(needed) != 1:
            raise UnsupportedArchitectureError(
                f"{block.mlp_parts[0].name!r} ({architecture.family}, {model_class(entry)}) takes "
                f"{', '.join(taken.name for taken in needed)}: an MLP of more than one input is not linearised"
            )
        return _Chain(entry, None, nn.Identity())
    if architecture.source != "registry" and block.mlp_between is None:
        names = ", ".join(repr(part.name) for part in block.mlp_parts)
        raise UnsupportedArchitectureError(
            f"the MLP of {block.name!r} ({architecture.family}) has the parts {names}, and what lies between them is "
            "unknown: describe the family with @register_architecture"
        )
    # BERT activates inside its first part, OPT and BART in the block.
    return _Chain(entry, exit_, _Between(block.module, block.mlp_between or "activation_fn"))


@contextmanager
def _forwards(replaced: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules other forwards for the length of a ``with`` block."""
    missing = object()
    before = [(module, module.__dict__.get("forward", missing)) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, forward in before:
            if forward is missing:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def build_variant(variant: Variant, model: nn.Module, base: Base) -> nn.Module:
    """The model in one of its variants, with the model's own parameters.

    Args:
        variant: ``full`` (the model itself), ``frozen_attention``, ``linear_mlp`` (at the base's inputs) or
            ``tangent``.
        model: The model.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.

    Raises:
        ValueError: The variant is unknown.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> build_variant("full", model, model) is model
        True
    """
    require_choice("variant", variant, get_args(Variant))
    return model if variant == "full" else variant_parts(variant, model, base)[0]


def variant_parts(name: str, model: nn.Module, base: Base) -> tuple[nn.Module, ...]:
    """What makes a variant: the tangent alone, or interventions that hold together."""
    if name == "tangent":
        return (TangentModel(model, base),)
    frozen = (FrozenAttention(model, base),) if name in ("frozen_attention", "both") else ()
    if name == "frozen_attention":
        return frozen
    return (*frozen, LinearizedMLP(model, base, at="current" if name == "linear_mlp_current" else "base"))
