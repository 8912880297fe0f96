"""Names and values: canonical parameter names, what part of a model one belongs to, checks, and registries."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from torch import nn

Options = TypeVar("Options")
Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]

# Wrappers rename parameters; a vector recorded with one must match a model without it.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_ADAPTED = re.compile(r"^base_model\.model\.|(?:^|(?<=\.))base_layer\.")
_BLOCK = re.compile(r"^(?P<block>.*?\.?(?:^|\.)\d+)\.(?P<rest>.*)$")

# Read from the innermost name outwards, so that the norm inside an attention module counts as a norm.
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(^|_)ln(_|\d|$)")),
    ("embedding", re.compile(r"embed(?!_out$)|^wte$|^wpe$|^shared$")),
    ("head", re.compile(r"^lm_head$|^classifier$|^score$|^embed_out$|^cls$")),
    ("attention", re.compile(r"attn|attention|^[qkvo]_proj$|query|key|value")),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|^fc\d?$|^c_fc$|intermediate|^output$|expert|moe|densereludense|densegateddense"
        ),
    ),
)


def canonical_name(name: str) -> str:
    """The name without the prefixes of ``torch.compile`` and activation checkpointing.

    Example:
        >>> canonical_name("_orig_mod.h.0._checkpoint_wrapped_module.weight")
        'h.0.weight'
    """
    return _WRAPPERS.sub("", name)


def bare_name(name: str) -> str:
    """A canonical name without what PEFT adds to it where it wraps the model or a layer.

    Example:
        >>> bare_name("base_model.model.h.0.c_fc.base_layer.weight"), bare_name("h.0.c_fc.lora_A.default.weight")
        ('h.0.c_fc.weight', 'h.0.c_fc.lora_A.default.weight')
    """
    return _ADAPTED.sub("", name)


def block_of(name: str) -> str:
    """The block that a parameter belongs to, or the part of the model outside all blocks.

    Example:
        >>> block_of("transformer.h.11.attn.c_attn.weight"), block_of("transformer.wte.weight")
        ('transformer.h.11', 'embeddings')
        >>> block_of("lm_head.weight"), block_of("transformer.ln_f.weight")
        ('head', 'final')
    """
    match = _BLOCK.match(name)
    if match:
        return match["block"]
    kind = kind_of(name)
    if kind == "norm" and "embed" in name:
        return "embeddings"  # BERT normalises there
    return {"embedding": "embeddings", "head": "head", "norm": "final"}.get(kind, "other")


def kind_of(name: str) -> Kind:
    """What a parameter does, read from its name.

    Example:
        >>> parts = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
        >>> [kind_of(f"model.layers.0.{part}.weight") for part in parts]
        ['attention', 'mlp', 'norm']
        >>> kind_of("model.layers.0.self_attn.q_norm.weight"), kind_of("bert.encoder.layer.1.output.dense.weight")
        ('norm', 'mlp')
        >>> kind_of("shared.weight"), kind_of("encoder.block.0.layer.1.DenseReluDense.wi.weight")
        ('embedding', 'mlp')
    """
    # A LoRA adapter is called after the module that it adapts.
    parts = [part for part in name.lower().split(".") if not part.startswith("lora_") and not part.isdigit()]
    for part in reversed(parts):
        for kind, pattern in _KINDS[:3]:
            if pattern.search(part):
                return kind
    joined = [part for part in parts if part != "output" or "attention" not in parts]
    for kind, pattern in _KINDS[3:]:
        if any(pattern.search(part) for part in joined):
            return kind
    return "other"


def model_class(module: nn.Module) -> str:
    """Class name of a module, seen through ``torch.compile`` and FSDP2, which wrap or rename it.

    Example:
        >>> model_class(nn.Linear(1, 1))
        'Linear'
    """
    module = getattr(module, "_orig_mod", module)
    # fully_shard swaps the class for a subclass called FSDP<name>.
    sharded = next((base for base in type(module).__mro__[1:] if base.__name__ == "FSDPModule"), None)
    return type(module).__name__.removeprefix("FSDP") if sharded else type(module).__name__


def suggestion(value: object, valid: Iterable[str], listed: int = 40) -> str:
    """A sentence that lists the valid choices, the closest first, whichever case it is written in.

    Args:
        value: What was given.
        valid: All that it may be.
        listed: At most this many valid choices are listed.

    Example:
        >>> suggestion("taylr", ["gradient", "taylor"])
        "did you mean 'taylor'? Valid: gradient, taylor"
    """
    choices = [str(choice) for choice in valid]
    by_case = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(value).casefold(), by_case, n=1)
    shown = ", ".join(choices[:listed]) + (f", ... ({len(choices)} in all)" if len(choices) > listed else "")
    return (f"did you mean {by_case[close[0]]!r}? " if close else "") + f"Valid: {shown}"


def unknown_name(kind: str, name: object, valid: Iterable[str], listed: int = 40) -> str:
    """The message for a name that is not among the valid ones.

    Args:
        kind: What the name stands for, e.g. ``"country"``.
        name: The name that was given.
        valid: The valid names.
        listed: At most this many valid names are listed.

    Returns:
        One line with the closest match first, then the valid names.

    Example:
        >>> unknown_name("relation", "captial", ["capital", "currency"])
        "unknown relation 'captial'; did you mean 'capital'? Valid: capital, currency"
    """
    return f"unknown {kind} {name!r}; {suggestion(name, valid, listed)}"


def require_choice(what: str, value: str, valid: Iterable[str]) -> None:
    """Checks that a word is one of the valid ones.

    Args:
        what: What it chooses, for the message.
        value: The word.
        valid: All that it may be.

    Raises:
        ValueError: It is none of them.

    Example:
        >>> require_choice("unit", "heads", ("head", "group"))
        Traceback (most recent call last):
        ValueError: unknown unit 'heads'; did you mean 'head'? Valid: head, group
    """
    choices = tuple(valid)
    if value not in choices:
        raise ValueError(unknown_name(what, value, choices))


def require_number(name: str, value: object, *, whole: bool = False) -> None:
    """Checks that a setting is a number that a float holds.

    Args:
        name: What it is called, for the message.
        value: As it was read.
        whole: Whether it must be an integer.

    Raises:
        ValueError: It is text, a truth value, not finite, or not whole.

    Example:
        >>> require_number("optimizer.learning_rate", "1e-4")
        Traceback (most recent call last):
        ValueError: optimizer.learning_rate must be a finite number; got '1e-4'
    """
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not _is_finite(value):
        raise ValueError(f"{name} must be a {'whole' if whole else 'finite'} number; got {value!r:.60}")


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def require_fractions(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """Checks a list of fractions.

    Args:
        name: What it is called, for the message.
        values: As they were read.

    Returns:
        The fractions, ascending.

    Raises:
        ValueError: It is no list, or one of them is no number in (0, 1], or there twice.

    Example:
        >>> require_fractions("shares", [0.1, 0.01])
        (0.01, 0.1)
        >>> require_fractions("shares", ["a"])
        Traceback (most recent call last):
        ValueError: shares lie in (0, 1]; got 'a'
    """
    return _listed(name, values, 1.0, "a list of fractions in (0, 1]", "lie in (0, 1]")


def _listed(name: str, values: Iterable[float], highest: float, kind: str, rule: str) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {kind}; got {values!r}")
    numbers: list[float] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= highest:
            raise ValueError(f"{name} {rule}; got {value!r}")
        if value in numbers:
            raise ValueError(f"{name} name {value!r} twice")
        numbers.append(float(value))
    return tuple(sorted(numbers))


def require_positive(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """Checks a list of positive numbers, or one number as a list of one.

    Args:
        name: What it is called, for the message.
        values: As they were read.

    Returns:
        The numbers, ascending.

    Raises:
        ValueError: It is no list or empty, or one of them is no positive finite number, or there twice.

    Example:
        >>> require_positive("strengths", [2, 1.0])
        (1.0, 2.0)
        >>> require_positive("tolerance", [float("nan")])
        Traceback (most recent call last):
        ValueError: tolerance must be positive and finite; got nan
    """
    numbers = _listed(name, values, sys.float_info.max, "a list of positive numbers", "must be positive and finite")
    if not numbers:
        raise ValueError(f"{name} is empty: name at least one positive number")
    return numbers


def require_at_least(name: str, value: float, lowest: float) -> None:
    """Checks that a setting is a number and not below the lowest that it may be.

    Args:
        name: What it is called, for the message.
        value: The number.
        lowest: The lowest valid one; where it is an int, only whole numbers are valid.

    Raises:
        ValueError: It is lower, or no such number.

    Example:
        >>> require_at_least("n_samples", 0, 1)
        Traceback (most recent call last):
        ValueError: n_samples must be at least 1; got 0
    """
    require_number(name, value, whole=isinstance(lowest, int))
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}; got {value}")


def require_kinds(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Checks that settings are of the kinds that their annotations state, before anything is done with them.

    Numbers are finite and no truth values, and whole where an int is stated; a sequence is no text, and its items are
    of their kind. A text passes for any choice of texts, which its own check names; so do groups of settings and what
    is annotated otherwise.

    Args:
        owner: A function, or a dataclass.
        values: By name, such as ``locals()`` or ``vars(settings)``; those without an annotation are passed over.

    Raises:
        ValueError: One is of another kind; the message has its name, its value, and what it may be.

    Example:
        >>> require_kinds(require_choice, {"what": None})
        Traceback (most recent call last):
        ValueError: what must be text; got None
    """
    for name, kind in _kinds(owner).items():
        if name in values and not _is_kind(values[name], kind):
            words = _kind_in_words(kind)
            if words.endswith("number or None"):
                words = words.removesuffix(" or None")  # a number was meant
            raise ValueError(f"{name} must be {words}; got {values[name]!r:.60}")


def options_of(kind: type[Options], argument: str, value: Options | Mapping[str, Any]) -> Options:
    """The options that an argument gives.

    Args:
        kind: Their class.
        argument: The argument's name, for messages.
        value: An object of the class, or a dictionary of its fields.

    Raises:
        TypeError: It is neither.
        ValueError: There is no such field, or a value is out of its range.

    Example:
        >>> Rates = dataclasses.make_dataclass("Rates", ["inside"])
        >>> options_of(Rates, "rates", {"inside": 2}).inside
        2
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument} must be {kind.__name__} or a dict of its fields; got {type(value).__name__}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise ValueError(f"unknown option {argument}.{key}; choose from {', '.join(known)}")
    return kind(**value)


@functools.cache
def _kinds(owner: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's arguments or a dataclass's fields; those that name nothing are left out."""
    holders = reversed(owner.__mro__) if isinstance(owner, type) else (owner,)
    kinds = {}
    for holder in holders:
        known = vars(sys.modules[holder.__module__])
        for name, told in getattr(holder, "__annotations__", {}).items():
            try:
                kinds[name] = eval(told, known) if isinstance(told, str) else told
            except NameError:
                continue
    return {name: kind for name, kind in kinds.items() if name != "return"}


def _is_kind(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_kind(value, one) for one in inner)
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(choice) and (isinstance(value, str) or value == choice) for choice in inner)
    if kind in (int, float):
        try:
            require_number("", value, whole=kind is int)
        except ValueError:
            return False
        return True
    if origin in (Sequence, list):
        listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        # Only what can be read again: looking at its items would empty a generator.
        return listed and (not isinstance(value, Sequence) or all(_is_kind(item, inner[0]) for item in value))
    if origin is tuple:
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if origin is Iterable:
        return not isinstance(value, (str, bytes)) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    return kind not in (bool, str, Path) or isinstance(value, kind)


def _kind_in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind_in_words(one) for one in inner))
    if origin is Literal:
        return ", ".join(map(repr, inner))
    if origin in (Sequence, list):
        return f"a list (items: {_kind_in_words(inner[0])})"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "None"}
    if origin in (Mapping, dict, Iterable, tuple):
        return {Iterable: "batches", tuple: "a list"}.get(origin, "a mapping")
    return str(words.get(kind) or getattr(kind, "__name__", kind))


T = TypeVar("T")


class Registry(Generic[T]):
    """Name to object.

    Args:
        what: What one entry is called in messages, such as ``score``.

    Example:
        >>> colours = Registry[int]("colour")
        >>> _ = colours.register("red")(0xFF0000)
        >>> colours["red"], list(colours)
        (16711680, ['red'])
        >>> colours["rde"]
        Traceback (most recent call last):
        ValueError: unknown colour 'rde'; did you mean 'red'? Valid: red
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that adds an object under one or more names.

        Raises:
            ValueError: A name is taken, or none is given.
        """
        if not names:
            raise ValueError(f"a {self._what} needs a name")

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self._what} {name!r} is registered already")
            self._entries.update(dict.fromkeys(names, entry))
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(f"unknown {self._what} {name!r}; {suggestion(str(name), self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
