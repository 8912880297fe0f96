"""Models that compute relative to a base: the tangent, and what the ways of freezing and linearising have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import jvp

from lightning_goldy.core.autodiff import Substituted, call_with, nested_derivatives
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import accepts
from lightning_goldy.core.sharding import is_sharded
from lightning_goldy.core.vector import ParameterVector

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
        base: theta_0, of the model's trainable parameters or of some of them; the others count as unchanged.

    Raises:
        SpaceError: The base is of another model.
        ValueError: The model is sharded.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, base: BaseParameters | ParameterVector) -> None:
        super().__init__()
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"{type(self).__name__} needs whole parameters, those of this {model_class(model)} are sharded; "
                "use it on a plain model or under DistributedDataParallel"
            )
        start = base if isinstance(base, ParameterVector) else base.vector(model)
        start.space.resolve(model)
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
    :class:`~lightning_goldy.analysis.taylor.taylor.TaylorApproximation` of order 1 gives the same logits.

    Args:
        model: Any model that returns a tensor or an output with ``logits``.
        base: theta_0.

    Raises:
        SpaceError: The base is of another model.
        ValueError: The model is sharded.

    Source: Jacot et al. 2018 ("Neural Tangent Kernel").

    Example:
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

        with nested_derivatives():
            value, change = jvp(logits, (base,), ({name: present[name] - base[name] for name in base},))[:2]
        linear = value + change
        return linear if isinstance(outputs[-1], Tensor) else type(outputs[-1])(logits=linear)


class Intervention(BaseRelative, ABC):
    """Changes parts of a model for the length of a ``with`` block, or of each of its own calls.

    Args:
        model: The model.
        base: theta_0.
    """

    # Whether parts of the base's own pass over the batch are needed.
    needs_base_run = True

    def __init__(self, model: nn.Module, base: BaseParameters | ParameterVector) -> None:
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
        if self.needs_base_run:
            self._run_base(args, kwargs)

    def _check_call(self, kwargs: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if kwargs.get("past_key_values") is not None:
            raise ValueError(f"{name} needs whole sequences: call the model without past_key_values (use_cache=False)")
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        if checkpointed and self.model.training and torch.is_grad_enabled():
            raise ValueError(
                f"{name} cannot be trained with gradient checkpointing, which recomputes activations after the model "
                "is itself again; call gradient_checkpointing_disable()"
            )

    def _run_base(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        uncached = {"use_cache": False} if accepts(self.model, "use_cache") else {}
        token = _BASE_RUN.set(self)
        try:
            # In evaluation mode: the base has no noise, and no random number is drawn for it.
            with _evaluation(self.model), torch.no_grad():
                call_with(self.model, self.base_values(), args, {**kwargs, **uncached})
        finally:
            _BASE_RUN.reset(token)


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
