"""Editors: ways to make a model give a new answer, to see what else that changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import describe_architecture
from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.registry import Registry
from lightning_goldy.core.space import ParameterSpace, SpaceError, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EditRequest:
    """What an editor is asked for: new answers to one or several prompts, all at once.

    Args:
        prompts: The prompts.
        subjects: Where what a prompt is about stands in it, first and last-plus-one character; None where unknown.
        samples: Prompt and new answer of each, unpadded, labels on the answer; on the CPU.
        batch: The same, padded on the right, on the model's device.
        space: The parameters that the editor may change, as its ``space`` gave them.
        context: The batches of all pieces of the run, with their own answers, on the model's device.
        tokenizer: Made the samples.
        kept: Empty at the first edit of a run; what an editor puts there it finds again at the next.
    """

    prompts: tuple[str, ...]
    subjects: tuple[tuple[int, int] | None, ...]
    samples: tuple[Sample, ...]
    batch: Mapping[str, Tensor]
    space: ParameterSpace
    context: tuple[Mapping[str, Tensor], ...]
    tokenizer: PreTrainedTokenizerBase
    kept: dict[str, Any] = field(default_factory=dict)

    def log_prob(self, model: nn.Module) -> Tensor:
        """Mean over the prompts of the new answer's mean log-probability, a scalar, nats."""
        return CausalLMObjective().log_probs(model, self.batch).mean()


@runtime_checkable
class Editor(Protocol):
    """Anything with these two methods edits; ``register_editor`` gives it a name."""

    def space(self, model: nn.Module) -> ParameterSpace:
        """The parameters that ``edit`` may change; no others are put back afterwards."""
        ...

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        """Changes the model in place.

        The model is in evaluation mode, gradients are enabled, and only the parameters of the request's space require
        them. Values, gradients, modes and random states are restored by the caller, also after an exception. An editor
        of several steps clears the autocast cache after each, for it may run inside autocast.
        """
        ...


EDITORS: Registry[Callable[..., Editor]] = Registry("editor")
register_editor = EDITORS.register


def make_editor(editor: str | Editor, settings: Mapping[str, Any]) -> Editor:
    """The editor of a name with settings, or the one given.

    Args:
        editor: A registered name or an editor.
        settings: What to make the named editor with; None stands for its own default.

    Raises:
        ValueError: An unknown name or setting, or settings for an editor that is made already.
        TypeError: The object is no editor.

    Example:
        >>> make_editor("gradient_step", {"learning_rate": 0.5, "steps": None}).learning_rate
        0.5
        >>> make_editor("gradient_step", {"steps": 3})
        Traceback (most recent call last):
        ValueError: editor 'gradient_step' has no setting 'steps'; Valid: learning_rate, select
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(editor, str):
        if not isinstance(editor, Editor):
            raise TypeError(f"an editor has the methods space and edit; {type(editor).__name__} has not")
        if given:
            raise ValueError(
                f"{sorted(given)[0]} belongs to the editor when it is named; here set it on the "
                f"{type(editor).__name__} itself"
            )
        return editor
    factory = EDITORS[editor]
    known = inspect.signature(factory).parameters
    for name in given:
        if name not in known:
            raise ValueError(f"editor {editor!r} has no setting {name!r}; {suggestion(name, known)}")
    return factory(**given)


def mlp_output_space(model: nn.Module, select: Sequence[str] | None = None) -> ParameterSpace:
    """The trainable matrices of every MLP output projection, or those that patterns select.

    Args:
        model: A transformer of a known or discoverable family (any module when there are patterns).
        select: Glob patterns of trainable parameters; with adapters, for example ``["*lora_*"]``.

    Raises:
        SpaceError: No trainable parameter is selected.
        UnsupportedArchitectureError: The MLP output projections cannot be told.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> mlp_output_space(GPT2LMHeadModel(config)).names
        ('transformer.h.0.mlp.c_proj.weight',)
    """
    if select is not None:
        return ParameterSpace.of(model, select)
    parts = tuple(f"{block.mlp_output_name}." for block in describe_architecture(model).blocks)
    trainable = dict(trainable_parameters(model))
    names = [name for name, value in trainable.items() if name.startswith(parts) and value.ndim > 1]
    if not names:
        raise SpaceError(
            "no MLP output projection is trainable; choose parameters by select=[...] patterns. "
            f"{suggestion('mlp', trainable)}"
        )
    return ParameterSpace.of(model).subspace(names)


def log_prob_gradient(parameters: Mapping[str, nn.Parameter], log_prob: Tensor) -> list[Tensor]:
    """The gradient of a scalar; zero for parameters that it does not depend on."""
    return list(torch.autograd.grad(log_prob, list(parameters.values()), allow_unused=True, materialize_grads=True))


@register_editor("gradient_step")
@dataclass(frozen=True)
class GradientStepEditor:
    r"""One step along the gradient of the new answer's log-probability.

    .. math:: \delta = \eta \, \nabla_\theta \log p_\theta(a' \mid q)

    Args:
        learning_rate: eta, squared parameter units per nat.
        select: Glob patterns of the parameters; every MLP output projection by default.

    Raises:
        ValueError: The learning rate is not a positive number.

    Example:
        >>> GradientStepEditor(learning_rate=0.0)
        Traceback (most recent call last):
        ValueError: learning_rate must be a positive number; got 0.0
    """

    learning_rate: float = 1e-2
    select: Sequence[str] | None = None

    def __post_init__(self) -> None:
        require_positive("learning_rate", self.learning_rate)

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return mlp_output_space(model, self.select)

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        """Makes the step, rounded once."""
        parameters = request.space.resolve(model)
        gradients = log_prob_gradient(parameters, request.log_prob(model))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.copy_(parameter.to(wide).add(gradient.to(wide), alpha=self.learning_rate))


@register_editor("finetune")
@dataclass(frozen=True)
class FinetuneEditor:
    """Steps of AdamW on minus the new answer's log-probability, in evaluation mode.

    Args:
        learning_rate: Of AdamW.
        steps: Their number.
        weight_decay: Of AdamW.
        select: Glob patterns of the parameters; every MLP output projection by default.

    Raises:
        ValueError: A number is out of range.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).

    Example:
        >>> FinetuneEditor(steps=0)
        Traceback (most recent call last):
        ValueError: steps must be a whole number of at least 1; got 0
    """

    learning_rate: float = 5e-4
    steps: int = 25
    weight_decay: float = 0.0
    select: Sequence[str] | None = None

    def __post_init__(self) -> None:
        require_positive("learning_rate", self.learning_rate)
        require_count("steps", self.steps)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return mlp_output_space(model, self.select)

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        """Trains."""
        parameters = request.space.resolve(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            gradients = log_prob_gradient(parameters, -request.log_prob(model))
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            # Inside autocast the next pass would see a low-precision copy of the weights before this step.
            torch.clear_autocast_cache()


def require_positive(name: str, value: float) -> None:
    """Checks a setting.

    Raises:
        ValueError: It is not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number; got {value!r}")


def require_count(name: str, value: int) -> None:
    """Checks a setting.

    Raises:
        ValueError: It is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
