"""A model whose MLPs are linear in what changed since the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.func import functional_call, jvp

from lightning_goldy.analysis.linearized.base_relative import Intervention
from lightning_goldy.core.architecture import Architecture, Block, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.autodiff import nested_derivatives
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import model_class, suggestion
from lightning_goldy.core.vector import ParameterVector

At = Literal["base", "current"]


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
        base: theta_0.
        at: Which inputs the expansion is made at.

    Raises:
        UnsupportedArchitectureError: The MLPs cannot be told apart from the rest, or take more than one input.
        SpaceError: The base is of another model.
        ValueError: ``at`` is unknown, or the model sharded; at a call, past keys and values or gradient checkpointing.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> linear = LinearizedMLP(model, ParameterVector.of(model))
        >>> torch.allclose(linear(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
        True
    """

    def __init__(self, model: nn.Module, base: BaseParameters | ParameterVector, *, at: At = "base") -> None:
        super().__init__(model, base)
        if at not in get_args(At):
            raise ValueError(f"unknown at={at!r}; {suggestion(str(at), get_args(At))}")
        self.at = at
        self.needs_base_run = at == "base"
        names = {id(parameter): name for name, parameter in self._space.resolve(model).items()}
        architecture = describe_architecture(model)
        # In a tuple: the MLPs are parts of the model, not of this module.
        self._sites = tuple(_Site(self, architecture, block, names) for block in architecture.blocks)

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
        values = {inside: base[name] for inside, name in self.names.items()}
        present = dict(self.chain.named_parameters())
        delta = {inside: present[inside] - value for inside, value in values.items()}
        # Mixed precision may hand the two passes different types.
        start = x if self.owner.at == "current" else self._start().to(x.dtype)
        self.evaluating = True
        try:
            with nested_derivatives():
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

    def _start(self) -> Tensor:
        if self.base_input is None:
            raise UnsupportedArchitectureError(f"{self.name!r} did not run in the base's pass, so it has no expansion")
        return self.base_input

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
        return _Chain(entry, None, _same)
    if architecture.source != "registry":
        names = ", ".join(repr(part.name) for part in block.mlp_parts)
        raise UnsupportedArchitectureError(
            f"the MLP of {block.name!r} ({architecture.family}) has the parts {names}, and what lies between them is "
            "unknown: describe the family with @register_architecture"
        )
    # BERT activates inside its first part, OPT in the block.
    return _Chain(entry, exit_, getattr(block.module, "activation_fn", _same))


def _same(x: Tensor) -> Tensor:
    return x


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
