"""Editors: how a model is made to give another answer, by gradient steps, a finetune, or a rank-one update."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.ripple.measure import log_prob_gradient, require_count
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.blocks import NamedModule, is_experts, output_weight
from lightning_goldy.core.architecture.families import is_projection
from lightning_goldy.core.naming import (
    Registry,
    model_class,
    require_at_least,
    require_kinds,
    require_number,
    suggestion,
)
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.pieces import Sample
from lightning_goldy.core.space import ParameterSpace, SpaceError, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
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
        passes: Gives the passes of the model so far.
        repeated: Takes those that :meth:`once` made.
    """

    prompts: tuple[str, ...]
    subjects: tuple[tuple[int, int] | None, ...]
    samples: tuple[Sample, ...]
    batch: Mapping[str, Tensor]
    space: ParameterSpace
    context: tuple[Mapping[str, Tensor], ...]
    tokenizer: PreTrainedTokenizerBase
    kept: dict[str, Any] = field(default_factory=dict)
    passes: Callable[[], Cost] = Cost
    repeated: list[Cost] = field(default_factory=list)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What is kept under a name, made at this rank's first edit; over all ranks its passes count once.

        Args:
            name: Of the editor's choice.
            make: Gives it, from what all ranks have alike.
        """
        if name not in self.kept:
            before = self.passes()
            self.kept[name] = make()
            self.repeated.append(self.passes() - before)
        return self.kept[name]

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


# Below this smallest eigenvalue of the keys' correlations, two edits ask different outputs of one key.
_DEPENDENT = 1e-10

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
        ValueError: editor 'gradient_step' has no setting 'steps'; Valid: learning_rate, select, halvings
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
    writers = [part for block in describe_architecture(model).mlp_blocks for part in block.mlp_writers]
    parts = tuple(f"{part.name}." for part in writers if not is_experts(part.module))
    # Stacks of experts hold the weights of their first layer too.
    stacks = {id(output_weight(part.module)) for part in writers if is_experts(part.module)}
    trainable = dict(trainable_parameters(model))
    names = [
        name for name, value in trainable.items() if id(value) in stacks or (name.startswith(parts) and value.ndim > 1)
    ]
    if not names:
        raise SpaceError(
            "no MLP output projection is trainable; choose parameters by select=[...] patterns. "
            f"{suggestion('mlp', trainable)}"
        )
    return ParameterSpace.of(model).subspace(names)


def attempts(editor: Editor) -> tuple[Editor, ...]:
    """The editors to try in turn, the largest step first, until what an edit does is linear in it.

    Args:
        editor: One with a method ``attempts`` names them; of any other there is the editor alone.

    Example:
        >>> [attempt.learning_rate for attempt in attempts(GradientStepEditor(halvings=2))]
        [0.01, 0.005, 0.0025]
        >>> len(attempts(GradientStepEditor(learning_rate=0.1)))
        1
    """
    named = getattr(editor, "attempts", None)
    return (editor,) if named is None else tuple(named())


LARGEST_STEP = 1e-2
"""The first learning rate that ``gradient_step`` tries, squared parameter units per nat."""


@register_editor("gradient_step")
@dataclass(frozen=True)
class GradientStepEditor:
    r"""One step along the gradient of the new answer's log-probability.

    .. math:: \delta = \eta \, \nabla_\theta \log p_\theta(a' \mid q)

    Args:
        learning_rate: eta, squared parameter units per nat; None for the largest of 0.01, 0.005, 0.0025 and so on with
            which the measured changes are linear in the step (see ``ripple_effects``), edit by edit.
        select: Glob patterns of the parameters; every MLP output projection by default.
        halvings: How often the rate may be halved at most where none is given.

    Raises:
        ValueError: The learning rate is not a positive number, or ``halvings`` not a whole one.

    Example:
        >>> GradientStepEditor(learning_rate=0.0)
        Traceback (most recent call last):
        ValueError: learning_rate must be a positive number; got 0.0
    """

    learning_rate: float | None = None
    select: Sequence[str] | None = None
    halvings: int = 14

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            _check_positive("learning_rate", self.learning_rate)
        require_number("halvings", self.halvings, whole=True)
        require_at_least("halvings", self.halvings, 0)
        require_kinds(type(self), vars(self))

    def attempts(self) -> tuple[GradientStepEditor, ...]:
        """With the rates to try; the editor itself where it has one."""
        if self.learning_rate is not None:
            return (self,)
        return tuple(replace(self, learning_rate=LARGEST_STEP / 2**halved) for halved in range(self.halvings + 1))

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
                rate = self.learning_rate or LARGEST_STEP
                parameter.copy_(parameter.to(wide).add(gradient.to(wide), alpha=rate))


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
        _check_positive("learning_rate", self.learning_rate)
        require_count("steps", self.steps)
        _check_weight_decay(self.weight_decay)
        require_kinds(type(self), vars(self))

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


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number; got {value!r}")


def _check_weight_decay(value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"weight_decay must be at least 0; got {value}")


def key_covariance(
    model: nn.Module, module: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, damping: float
) -> Tensor:
    r"""Second moment of a projection's inputs over all tokens but padding, damped.

    .. math:: C = \tfrac1N \sum_t k_t k_t^\top + \epsilon \, \tfrac1d \mathrm{tr}(\cdot) \, I

    Args:
        model: Contains the projection.
        module: The projection.
        batches: As a causal language model takes them.
        damping: epsilon.

    Returns:
        Shape ``[d_in, d_in]``, float64.

    Raises:
        ValueError: There is no batch, or every input is zero.
    """
    total: Tensor | None = None
    count = 0
    device = next(model.parameters()).device
    for given in batches:
        batch = {name: value.to(device) for name, value in given.items()}
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0  # [B, T]
        keys = by_token(seen[0], batch)[mask].double()  # [N, d_in]
        total = keys.T @ keys if total is None else total.addmm_(keys.T, keys)
        count += len(keys)
    mean = 0.0 if total is None else float(total.diagonal().mean()) / count
    if total is None or not (math.isfinite(mean) and mean > 0):
        raise ValueError(
            f"the keys' covariance needs batches with inputs that are finite and not all zero; mean {mean}"
        )
    total /= count
    total.diagonal().add_(damping * mean)
    return total


def key_position(request: EditRequest, index: int) -> int:
    """The token whose input to the projection is the key: the subject's last, or the prompt's last.

    Args:
        request: The edits.
        index: Which of them.

    Returns:
        A position in its sample.

    Raises:
        ValueError: The prompt is empty, or its tokens cannot be matched with its text.
    """
    sample, prompt, subject = request.samples[index], request.prompts[index], request.subjects[index]
    answer = int((sample["labels"] != IGNORE_INDEX).nonzero()[0])
    if not answer:
        raise ValueError(f"the answer to the prompt {prompt!r} has no token before it to edit at")
    if subject is None:
        return answer - 1
    start, end = subject
    if request.tokenizer.is_fast:
        found = request.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        last = max(place for place, (first, stop) in enumerate(found["offset_mapping"]) if first < end and stop > start)
        ids = found["input_ids"][: last + 1]
    else:
        ids = request.tokenizer(prompt[:end], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = sample["input_ids"].tolist()
    for skipped in (0, 1):  # a bos token
        if tokens[skipped : skipped + len(ids)] == list(ids):
            return skipped + len(ids) - 1
    raise ValueError(
        f"the tokens of {prompt[:end]!r}, which ends with the subject, do not begin its sample, so the subject's last "
        "token cannot be told: use a fast tokenizer, or end the subject where a token ends"
    )


@contextmanager
def seen_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """Input and output of the module in the next forward pass."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[:] = args[0].detach(), output.detach()

    with module.register_forward_hook(record):
        yield seen


@contextmanager
def added_to(
    module: nn.Module, batch: Mapping[str, Tensor], places: tuple[Tensor, Tensor], changes: Tensor
) -> Iterator[None]:
    """Adds to the module's output at one token of each row."""

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = by_token(output, batch).clone()
        moved[places] = moved[places] + changes.to(output.dtype)
        return moved.view(output.shape)

    with module.register_forward_hook(add):
        yield


def by_token(part: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, T, d]``, also where a family flattens batch and time."""
    return part.reshape(*batch["input_ids"].shape, part.shape[-1])


def rank_one_update(keys: Tensor, changes: Tensor, covariance: Tensor) -> Tensor:
    r"""The smallest change of a matrix that changes its products with keys as asked.

    .. math:: \Delta W = \frac{z \, (C^{-1} k)^\top}{k^\top C^{-1} k}, \qquad \text{in general} \quad
        \Delta W = Z^\top (K C^{-1} K^\top)^{-1} K C^{-1}

    Of all :math:`\Delta W` with :math:`\Delta W k_i = z_i` it has the least
    :math:`\mathrm{tr}(\Delta W C \Delta W^\top)`, which is the mean squared change of the products with keys of second
    moment C. Its rank is the number of keys.

    Args:
        keys: K, shape ``[n, d_in]``.
        changes: Z, shape ``[n, d_out]``.
        covariance: C, shape ``[d_in, d_in]``, positive definite.

    Returns:
        Shape ``[d_out, d_in]``, float64.

    Raises:
        ValueError: The covariance is not positive definite, or the keys are not linearly independent.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), equation 2; several keys as in
        Bau et al., "Rewriting a Deep Generative Model" (2020).

    Example:
        >>> rank_one_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]), torch.eye(2)).tolist()
        [[3.0, 0.0]]
    """
    return _update(keys.double(), changes.double(), _cholesky(covariance.double()))


@register_editor("rank_one")
@dataclass(frozen=True, eq=False)
class RankOneEditor:
    r"""Writes the new answer into one MLP output projection, as ROME does.

    The key k is the projection's input at the subject's last token (the prompt's last token where the subject is not
    known). Adam finds the change z of its output there that makes the new answer likely,

    .. math:: \min_z \; -\log p(a' \mid q; z) + \lambda \, \lVert z \rVert^2 / \lVert W k \rVert^2, \qquad
        \lVert z \rVert \le c \, \lVert W k \rVert

    and :func:`rank_one_update` changes W so that the output at k is Wk + z. Several edits at once make a change whose
    rank is their number. Unlike the published method this takes the key from one prompt, without random prefixes, and
    restrains z by its norm alone, without a divergence on other prompts.

    Args:
        learning_rate: Of Adam on z, in units of the output's root mean square.
        steps: Of Adam.
        layer: Index of the block; a third of the way up by default.
        weight_decay: lambda, nats.
        largest: c, at most so many times the output's norm.
        damping: Added to C's diagonal, as a multiple of its mean.
        batches: Where C is taken from, the mean of k k' over all tokens; the pieces of the run by default.

    Raises:
        ValueError: A number is out of range.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022).

    Example:
        >>> RankOneEditor(damping=0)
        Traceback (most recent call last):
        ValueError: damping must be a positive number; got 0
    """

    learning_rate: float = 0.5
    steps: int = 20
    layer: int | None = None
    weight_decay: float = 0.1
    largest: float = 4.0
    damping: float = 0.01
    batches: Sequence[Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "largest", "damping"):
            _check_positive(name, getattr(self, name))
        require_count("steps", self.steps)
        _check_weight_decay(self.weight_decay)

    def projection(self, model: nn.Module) -> NamedModule:
        """The MLP output projection of the layer, as its block calls it.

        Raises:
            ValueError: There is no such layer.
            UnsupportedArchitectureError: The projection cannot be told.
        """
        blocks = describe_architecture(model).blocks
        index = len(blocks) // 3 if self.layer is None else self.layer
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(blocks):
            raise ValueError(f"layer must be a block from 0 to {len(blocks) - 1}; got {index!r}")
        return blocks[index].mlp_output_part

    def space(self, model: nn.Module) -> ParameterSpace:
        """The projection's weight, also where it is frozen under adapters."""
        part = self.projection(model)
        base = getattr(part.module, "base_layer", part.module)
        weight = base._parameters.get("weight")
        if not is_projection(part.module) or weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise UnsupportedArchitectureError(
                f"rank_one changes the weight of a Linear or Conv1D; {part.name!r} is a {model_class(base)} whose "
                "weight is packed, parametrized or missing"
            )
        name = f"{part.name}.weight" if base is part.module else f"{part.name}.base_layer.weight"
        return ParameterSpace((name,), (weight.shape,), (weight.dtype,))

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        """Finds keys and values and changes the weight, rounded once."""
        module = self.projection(model).module
        batches = request.context if self.batches is None else self.batches
        factor = request.once("factor", lambda: _cholesky(key_covariance(model, module, batches, damping=self.damping)))
        rows = torch.arange(len(request.samples))
        places = rows, torch.tensor([key_position(request, index) for index in range(len(request.samples))])
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, request.batch)
        given, made = (by_token(part, request.batch)[places].double() for part in seen)  # [n, d_in], [n, d_out]
        changes = self._changes(model, module, request, places, made)
        update = _update(given, changes, factor)
        (weight,) = request.space.resolve(model).values()
        if not isinstance(getattr(module, "base_layer", module), nn.Linear):
            update = update.T  # Conv1D keeps its weight as in x out
        with torch.no_grad():
            weight.copy_(weight.double() + update)

    def _changes(
        self, model: nn.Module, module: nn.Module, request: EditRequest, places: tuple[Tensor, Tensor], made: Tensor
    ) -> Tensor:
        """z, shape ``[n, d_out]``, float64: the best on the way, so never worse than no change."""
        width = made.shape[1]
        # In units of the output's root mean square, so that a learning rate fits models of any scale.
        unit = made.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / math.sqrt(width)  # [n, 1]
        scaled = torch.zeros_like(made, requires_grad=True)
        optimizer = torch.optim.Adam([scaled], lr=self.learning_rate)
        best, least = torch.zeros_like(made), math.inf
        for step in range(self.steps + 1):
            with added_to(module, request.batch, places, scaled * unit):
                log_prob = request.log_prob(model)
            loss = self.weight_decay * scaled.square().mean() - log_prob
            (scaled.grad,) = torch.autograd.grad(loss, [scaled])
            if step == 0 and not bool(scaled.grad.any()):
                raise ValueError(
                    "the output of the edited projection has no effect on the answer: in the last block only the "
                    "prompt's last token has one; choose a lower layer"
                )
            if (value := float(loss.detach())) < least:
                best, least = (scaled * unit).detach().clone(), value
            optimizer.step()
            with torch.no_grad():
                norm = scaled.norm(dim=1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)
                scaled.mul_((self.largest * math.sqrt(width) / norm).clamp_max(1.0))
        return best


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError("the covariance of the keys is not positive definite: raise the damping")
    return factor


def _update(keys: Tensor, changes: Tensor, factor: Tensor) -> Tensor:
    solved = torch.cholesky_solve(keys.T, factor)  # C^-1 K', [d_in, n]
    products = keys @ solved  # [n, n]
    size = products.diagonal().sqrt()
    if not bool((size > 0).all()) or float(torch.linalg.eigvalsh(products / (size * size[:, None]))[0]) < _DEPENDENT:
        raise ValueError(
            "the keys of the edits are not linearly independent, so no matrix gives each its own output: a key is "
            "zero, or two edits share their prompt up to the subject's last token"
        )
    return changes.T @ torch.linalg.solve(products, solved.T)  # [d_out, n] @ [n, d_in]
