"""What ``goldy coupling`` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_goldy.analysis.coupling import Layers, RunOptions, Select, check_selection
from lightning_goldy.analysis.ripple.editors import make_editor
from lightning_goldy.core.pieces import QUESTION_TEMPLATE


@dataclass(frozen=True)
class Pieces:
    """What is compared.

    Args:
        source: What ``load_pieces`` takes.
        format: Its format, or ``auto``.
        form: ``question`` or ``cloze``.
        count: Pieces to draw; None for all.
        template: The prompt; None for that of the source.
        seed: Of the draw.

    Raises:
        ValueError: The count is below 2.
    """

    source: str
    format: str = "auto"
    form: Any = "question"
    count: int | None = None
    template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 2:
            raise ValueError(f"--n-pieces must be at least 2, for a pair; got {self.count}")

    @property
    def prompt(self) -> str:
        """The template: questions of the atlas and clozes are their own prompts."""
        if self.template is not None:
            return self.template
        return "{question}" if self.source == "atlas" or self.form == "cloze" else QUESTION_TEMPLATE


@dataclass(frozen=True)
class Method:
    """How they are compared; see ``knowledge_coupling`` and ``coupling_statistics``.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    select: Select = "mlp_output"
    layers: Layers = None
    center: bool = False
    projection: int | None = None
    workspace: str | None = None
    activation: bool = False
    moderate: float = 0.1
    high: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_selection(self.select, self.layers)
        # It checks itself when it is made.
        RunOptions(projection=self.projection)
        if not -1 <= self.moderate <= self.high <= 1:
            raise ValueError(
                f"--high and --moderate must be in order within [-1, 1]; got {self.high} and {self.moderate}"
            )

    @property
    def options(self) -> RunOptions:
        """Those of the run."""
        return RunOptions(projection=self.projection, seed=self.seed, workspace=self.workspace, on_error="nan")


@dataclass(frozen=True)
class Editing:
    """What is edited and how.

    Args:
        edits: A number of edits to draw, or a file of them.
        editor: A registered name.
        learning_rate: Of the editor; None for its own default.
        steps: Likewise.

    Raises:
        ValueError: An unknown editor, or a setting that it has not.
    """

    edits: int | str
    editor: str = "gradient_step"
    learning_rate: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        make_editor(self.editor, {"learning_rate": self.learning_rate, "steps": self.steps})
        if isinstance(self.edits, int) and self.edits < 1:
            raise ValueError(f"--edits must be at least 1; got {self.edits}")
