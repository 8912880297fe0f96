"""Which prompts a callback continues with and without its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_goldy.analysis.generations import check_generation_arguments


@dataclass(frozen=True)
class Generations:
    """Prompts that are continued with and without the mask.

    Args:
        prompts: Texts; none by default.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing.
        seed: Decides the draws.

    Raises:
        ValueError: A value is out of range, or the prompts are one string.

    Example:
        >>> Generations(prompts="hello")
        Traceback (most recent call last):
        ValueError: prompts is a list of texts; got the string 'hello', write ['hello']
    """

    prompts: Sequence[str] = ()
    max_new_tokens: int = 40
    do_sample: bool = False
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(f"prompts is a list of texts; got the string {self.prompts!r}, write [{self.prompts!r}]")
        check_generation_arguments(self.max_new_tokens, self.temperature)


def find_tokenizer(trainer: Any, pl_module: Any) -> Any:
    """The ``tokenizer`` of the LightningModule or of the data module.

    Raises:
        ValueError: Neither has one.
    """
    for owner in (pl_module, trainer.datamodule):
        tokenizer = getattr(owner, "tokenizer", None)
        if callable(tokenizer):
            return tokenizer
    raise ValueError(
        "prompts need a tokenizer: give the LightningModule or the data module an attribute `tokenizer`, or leave "
        "generations=Generations(prompts=...) out"
    )
