"""Named things that users can add to: one decorator fills a registry, and a duplicate is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lightning_goldy.core.naming import suggestion

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
