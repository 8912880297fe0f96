"""Recipes and callback overlays: in the wheel, or in the repository of an editable install."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning_goldy

Kind = Literal["recipes", "callbacks"]


@dataclass(frozen=True)
class Recipe:
    """A YAML file for ``goldy fit --config``.

    Args:
        name: The file's stem.
        kind: ``recipes`` for whole runs, ``callbacks`` for overlays that add one callback.
        path: Where it lies.
    """

    name: str
    kind: Kind
    path: Path

    @property
    def text(self) -> str:
        """The file's text.

        Raises:
            ValueError: It is not UTF-8.
        """
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            fault = f"byte {error.start} is {error.object[error.start]:#04x}"
            raise ValueError(f"the recipe {self.path} is not UTF-8 text: {fault}") from error

    @property
    def first_line(self) -> str:
        """The first line without its comment mark: the command that launches it."""
        return self.text.split("\n", 1)[0].lstrip("# ").strip()


def all_recipes() -> list[Recipe]:
    """Every recipe, then every overlay, by name.

    Raises:
        FileNotFoundError: The installation carries none.

    Example:
        >>> "atlas_edit" in [recipe.name for recipe in all_recipes()]
        True
    """
    package = Path(lightning_goldy.__file__).parent
    kinds: tuple[Kind, ...] = ("recipes", "callbacks")
    for root in (package / "_bundled", package.parent):
        found = [Recipe(path.stem, kind, path) for kind in kinds for path in sorted((root / kind).glob("*.yaml"))]
        if found:
            return found
    raise FileNotFoundError(
        f"this installation carries no recipes: neither {package / '_bundled'} nor {package.parent}"
    )


def find_recipe(name: str) -> Recipe:
    """The recipe or overlay of a name; ``atlas_edit``, ``atlas_edit.yaml`` and ``recipes/atlas_edit.yaml`` are one.

    Raises:
        ValueError: There is none; the message lists those there are.

    Example:
        >>> find_recipe("recipes/atlas_edit.yaml").kind
        'recipes'
    """
    recipes = all_recipes()
    stem = Path(name).name.removesuffix(".yaml")
    matches = [recipe for recipe in recipes if recipe.name == stem]
    folder = Path(name).parent.name
    # An overlay may have the name of a recipe; the folder then tells them apart.
    named = [recipe for recipe in matches if recipe.kind == folder] or matches
    if not named:
        from lightning_goldy.core.naming import suggestion  # brings torch, which a mere list need not wait for

        raise ValueError(f"unknown recipe {name!r}; {suggestion(stem, [recipe.name for recipe in recipes])}")
    return named[0]


def copy_recipe(recipe: Recipe, folder: str | Path | None = None, *, force: bool = False) -> Path:
    """Copies a recipe.

    Args:
        recipe: What to copy.
        folder: Where to; by default ``recipes`` or ``callbacks`` here, where its launch command looks for it.
        force: Whether an existing file is replaced.

    Returns:
        The copy.

    Raises:
        FileExistsError: The file exists and ``force`` was not given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     copy_recipe(find_recipe("atlas_edit"), folder).name
        'atlas_edit.yaml'
    """
    target = Path(recipe.kind if folder is None else folder).expanduser() / recipe.path.name
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force replaces it")
    from lightning_goldy.core.files import atomic_write  # brings torch

    return atomic_write(target, recipe.text)
