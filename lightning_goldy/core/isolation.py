"""Leave no trace: whatever an analysis does inside, training goes on as if it had not run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from lightning_goldy.core.sharding import is_sharded, local, meet_within, unshard_guard


def random_states() -> dict[str, Any]:
    """The states of Python, NumPy, torch and all CUDA devices, in types that load under ``weights_only``."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    # Asking an uninitialised CUDA for its states would initialise it, which forked workers cannot survive.
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, words, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if ready else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undoes :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores the random states of Python, NumPy, torch and every CUDA device, also after an exception.

    Example:
        >>> state = torch.get_rng_state()
        >>> with isolated_rng():
        ...     noise = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def preserved(module: nn.Module, *, training: bool | None = False) -> Iterator[nn.Module]:
    """Gives a module to an analysis and takes it back as it was: gradients, modes, buffers, random states.

    Gradients are set aside, not copied; buffers are copied and written back; the parameters' values are the business of
    :func:`~lightning_goldy.core.vector.applied`. Inside, gradients are enabled (Lightning's validation hooks run
    without) and, by default, the module is in evaluation mode.

    Args:
        module: The model.
        training: Mode inside: False for evaluation, True for training, None to leave each submodule's mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> model[0].weight.grad = torch.ones(2, 2)
        >>> with preserved(model):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model[0].weight.grad.sum().item(), model.training
        (4.0, True)
    """
    unshard_guard(module)
    modes = [(child, child.training) for child in module.modules()]
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    requires = [parameter.requires_grad for parameter in parameters]
    # By owner, because a forward may put a new tensor in a buffer's place.
    buffers = [
        (child, name, buffer, None if buffer is None else local(buffer).clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
    ]
    # A sharded model's forward is a collective: a rank that failed before it tells the others there.
    guard = module.register_forward_pre_hook(_at_forward, prepend=True) if any(map(is_sharded, parameters)) else None
    with isolated_rng(), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.grad = None
            if training is not None:
                module.train(training)
            yield module
        finally:
            if guard is not None:
                guard.remove()
            unshard_guard(module)
            with torch.no_grad():
                for child, name, buffer, value in buffers:
                    if buffer is not None and value is not None:
                        # Detached, also a buffer made in inference mode can be written to.
                        local(buffer).copy_(value)
                    child._buffers[name] = buffer
            for parameter, gradient, needed in zip(parameters, gradients, requires, strict=True):
                if parameter.requires_grad is not needed:
                    parameter.requires_grad_(needed)
                parameter.grad = gradient
            for child, mode in modes:
                child.training = mode


def _at_forward(module: nn.Module, inputs: Any) -> None:
    meet_within("a forward pass of the sharded model")


class _UnseenByReducer(TorchFunctionMode):
    """Lets ``Tensor.backward`` reach the leaves without their hooks, which count for DistributedDataParallel.

    Its reducer hears of every gradient that a leaf accumulates, also outside of its own passes: with ``static_graph``
    it counts them, with ``find_unused_parameters`` it takes the parameter for used.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return _accumulate(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _accumulate(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """What ``loss.backward`` does, to the last bit, with the leaves' own hooks alone."""
    leaves = list(_leaves(loss) if inputs is None else [inputs] if isinstance(inputs, Tensor) else inputs)
    if not leaves:
        raise RuntimeError("the loss does not depend on a parameter, so it has no gradient")
    found = torch.autograd.grad(
        loss, leaves, gradient, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )
    taken: set[int] = set()
    for leaf, value in zip(leaves, found, strict=True):
        if value is not None:
            # Gradients of a sum are one tensor, and each leaf owns its own.
            value = value.clone() if value.data_ptr() in taken else value.contiguous()
            taken.add(value.data_ptr())
            leaf.grad = value if leaf.grad is None else leaf.grad + value
            for hook in list((getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values()):
                hook(leaf)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves that a loss depends on."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def _reducer_counts(trainer: Any) -> bool:
    wrapped = getattr(getattr(trainer, "strategy", None), "model", None)
    if not isinstance(wrapped, DistributedDataParallel):
        return False
    return bool(wrapped.static_graph or wrapped.find_unused_parameters)


@contextmanager
def undisturbed(trainer: Any, pl_module: nn.Module, *, training: bool | None = False) -> Iterator[nn.Module]:
    """The whole isolation of an analysis that runs inside a training loop.

    Everything of :func:`preserved`, for the unwrapped LightningModule (so DistributedDataParallel reduces nothing),
    under the trainer's own autocast, whose cache of low-precision weights is dropped on both sides. Where
    DistributedDataParallel takes account of gradients outside of its own passes, it does not see them.

    Args:
        trainer: The Lightning trainer.
        pl_module: Its LightningModule.
        training: Mode inside, as for :func:`preserved`.

    Yields:
        The LightningModule.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved(pl_module, training=training))
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(trainer.precision_plugin.forward_context())
        if _reducer_counts(trainer):
            stack.enter_context(_UnseenByReducer())
        yield pl_module
