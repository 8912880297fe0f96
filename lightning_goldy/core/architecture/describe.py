"""What a model is made of, read from the names of its family's modules or found with a forward pass."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lightning_goldy.core.architecture.blocks import Architecture, UnsupportedArchitectureError
from lightning_goldy.core.architecture.families import (
    available_architectures,
    canonical_modules,
    family_spec,
    read_registered,
)
from lightning_goldy.core.architecture.probe import has_two_stacks, probe_architecture
from lightning_goldy.core.naming import model_class, require_choice


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
        require_choice("stack", stack, ("encoder", "decoder"))
    modules = canonical_modules(model)
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
    config = getattr(module, "config", None)
    return config if isinstance(getattr(config, "model_type", None), str) else None
