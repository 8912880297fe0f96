"""What a model is made of: blocks, attention, MLPs, and which weights belong to which attention head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_goldy.core.architecture.blocks import (
    Architecture,
    UnsupportedArchitectureError,
)
from lightning_goldy.core.architecture.families import (
    available_architectures,
    canonical_modules,
    family_spec,
    read_registered,
)
from lightning_goldy.core.architecture.probe import probe_architecture
from lightning_goldy.core.naming import model_class


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
    return _describe(canonical_modules(model), sample_batch)


def _describe(modules: Mapping[str, nn.Module], sample_batch: Any) -> Architecture:
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
