"""The analyses of a checkpoint, each as its pure function, the row that a callback would write, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_goldy.analysis.attention import attention_maps, attention_statistics
from lightning_goldy.analysis.continuations import check_generation_arguments, continue_prompts
from lightning_goldy.analysis.distribution import parameter_distribution
from lightning_goldy.analysis.explain import explain_change
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.analysis.taylor import taylor_diff
from lightning_goldy.callbacks.attention_findings import Attention, Shown, attention_findings
from lightning_goldy.callbacks.attention_prompts import Prompt, token_namer
from lightning_goldy.callbacks.base import AnalysisContext
from lightning_goldy.callbacks.taylor_diff import TaylorDiff
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.vector import substituted

_ORDERS = (1, 2)
_SINGULAR_VALUES = 4


@dataclass(frozen=True)
class Writing:
    """Prompts to continue, and how.

    Args:
        prompts: Texts.
        max_new_tokens: Longest continuation, tokens.
        temperature: Of the drawing; None takes the most probable token.
        seed: Decides the draws.

    Raises:
        ValueError: A value is out of range, or a prompt is empty.

    Example:
        >>> Writing(("To be",), max_new_tokens=0)
        Traceback (most recent call last):
        ValueError: max_new_tokens must be at least 1; got 0
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 50
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_generation_arguments(self.max_new_tokens, 1.0 if self.temperature is None else self.temperature)
        if "" in self.prompts:
            raise ValueError(f"prompt {self.prompts.index('') + 1} of {len(self.prompts)} is empty")

    def options(self) -> dict[str, Any]:
        """Arguments of ``continue_prompts``."""
        drawn = {} if self.temperature is None else {"do_sample": True, "temperature": self.temperature}
        return {"max_new_tokens": self.max_new_tokens, "seed": self.seed, **drawn}


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is loaded.

    Args:
        context: Model, objective and probe; the probe holds the samples that are used.
        base: theta_0; None where nothing tells.
        shown: Prompts whose attention is shown.
        writing: Prompts to continue.
        tokenizer: Of the run; None where it has none.
        progress: Called with (done, total).
    """

    context: AnalysisContext
    base: BaseParameters | None
    shown: tuple[Prompt, ...]
    writing: Writing
    tokenizer: Any
    progress: Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """What one analysis found.

    Args:
        result: Of the pure function.
        row: What it says of itself, without its place.
        more: Further results, by the name of their file.
    """

    result: AnalysisResult
    row: Row
    more: Mapping[str, AnalysisResult] = field(default_factory=dict)


def _expanded(subject: Subject) -> Part:
    context, base = subject.context, subject.base
    assert base is not None
    found = taylor_diff(
        context.model, base, context.probe, context.objective, orders=_ORDERS, progress=subject.progress
    )
    return Part(found, TaylorDiff(_ORDERS).describe(found, context))


def _explained(subject: Subject) -> Part:
    context, base = subject.context, subject.base
    assert base is not None
    found = explain_change(context.model, base, context.probe, context.objective, progress=subject.progress)
    # Two plain runs, and each variant with its base and its tangents: about 13 in all.
    return Part(found, found.row().extended(cost=Cost(forwards=13 * len(context.probe))))


def _distributed(subject: Subject) -> Part:
    assert subject.base is not None
    found = parameter_distribution(subject.context.model, subject.base, progress=subject.progress)
    return Part(found, found.row())


def _attended(subject: Subject) -> Part:
    context, model = subject.context, subject.context.model
    base = None if subject.base is None else subject.base.vector(model)
    found = attention_statistics(model, context.probe, context.objective, base=base, progress=subject.progress)
    name_tokens = token_namer(subject.tokenizer)
    shown, maps = [], {}
    for prompt in subject.shown:
        before = None
        if base is not None:
            with substituted(model, base):
                before = attention_maps(model, prompt.batch, name_tokens=name_tokens)
            maps[f"base_maps-{prompt.name}"] = before
        present = attention_maps(model, prompt.batch, name_tokens=name_tokens)
        maps[f"maps-{prompt.name}"] = present
        shown.append(Shown(prompt, present, before))
    passes = found.passes + len(maps)
    row = attention_findings(Attention(found, tuple(shown), passes), heads=None, singular_values=_SINGULAR_VALUES)
    return Part(found, row, maps)


def _continued(subject: Subject) -> Part:
    writing = subject.writing
    found = continue_prompts(
        subject.context.model, subject.tokenizer, writing.prompts, base=subject.base, **writing.options()
    )
    # One pass per new token; with the base as many again, and two to compare.
    passes = len(writing.prompts) * (writing.max_new_tokens if subject.base is None else 2 * writing.max_new_tokens + 2)
    return Part(found, found.row().extended(result=writing.options(), cost=Cost(forwards=passes)))


PARTS: Mapping[str, Callable[[Subject], Part]] = {
    "taylor_diff": _expanded,
    "explain_change": _explained,
    "parameter_distribution": _distributed,
    "attention_tracker": _attended,
    "continuations": _continued,
}
"""The analyses by the name of the rows that they write, in the order in which they are made."""

NEEDS_BASE = frozenset({"taylor_diff", "explain_change", "parameter_distribution"})
"""Those that there are not without a base; the others compare with it where there is one."""


def left_out(subject: Subject, base_source: str) -> dict[str, str]:
    """Why an analysis cannot be made of this subject, by name; nothing for those that can.

    Args:
        subject: The checkpoint.
        base_source: Why there is no base.
    """
    reasons = {}
    if subject.base is None:
        reasons.update(dict.fromkeys(sorted(NEEDS_BASE), f"there is no base: {base_source}"))
    if not subject.writing.prompts:
        reasons["continuations"] = "no prompt was given (--prompt or --prompts)"
    elif not callable(getattr(subject.context.model, "generate", None)):
        reasons["continuations"] = f"{type(subject.context.model).__name__} cannot generate"
    return reasons
