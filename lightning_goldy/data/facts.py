"""The embedded table of facts: countries with their capital, continent, currency and main language."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources


@dataclass(frozen=True)
class Country:
    """One row of the table.

    Continents follow the United Nations' regions, with the Americas split at the border of Panama and Colombia. The
    language is the one that most people share, or an official one where none is shared by most.

    Args:
        name: The common English name, without an article.
        article: ``"the"`` or the empty string.
        capital: The capital (the constitutional one where several cities share the role).
        continent: One of six.
        currency: The currency's name.
        language: The main language.
    """

    name: str
    article: str
    capital: str
    continent: str
    currency: str
    language: str

    @property
    def phrase(self) -> str:
        """The name as it stands in a sentence.

        Example:
            >>> Country("Gambia", "the", "Banjul", "Africa", "Gambian dalasi", "English").phrase
            'the Gambia'
        """
        return f"{self.article} {self.name}".strip()


@lru_cache(maxsize=1)
def load_countries() -> tuple[Country, ...]:
    """Read the embedded table.

    Returns:
        The countries in alphabetical order.

    Example:
        >>> {country.name: country.capital for country in load_countries()}["France"]
        'Paris'
    """
    text = resources.files("lightning_goldy.data").joinpath("facts.csv").read_text(encoding="utf-8")
    return tuple(Country(**row) for row in csv.DictReader(text.splitlines()))
