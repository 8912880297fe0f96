"""What ``goldy coupling`` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lightning_goldy.analysis.coupling import Layers, RunOptions, Select, check_selection
from lightning_goldy.analysis.ripple.editors import make_editor
from lightning_goldy.commands.output import Launch
from lightning_goldy.core.naming import require_choice, require_kinds
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, AnswerTokens
from lightning_goldy.data.tokenization import load_tokenizer
from lightning_goldy.training.models import WeightDtype, check_vocabulary, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Model:
    """Which model.

    Args:
        name: A folder or a name on the hub.
        tokenizer: Likewise, or ``bytes``; None for the model's.
        dtype: Of the weights.
        device: None for a GPU where there is one, each process its own.
    """

    name: str
    tokenizer: str | None = None
    dtype: WeightDtype = "float32"
    device: str | None = None

    @property
    def placed(self) -> torch.device:
        """Where it goes.

        Raises:
            ValueError: A GPU is asked for and there is none.
        """
        launch = Launch.of()
        own = "cuda" if launch is None else f"cuda:{launch.local_rank}"
        device = torch.device(self.device or (own if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: PyTorch finds no GPU; leave it out, or give cpu")
        return device

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model on its device, and its tokenizer.

        Raises:
            ValueError: One of them cannot be loaded, or they do not fit.
        """
        # The tokenizer first: a mistake there is found before the weights are read.
        tokenizer = load_tokenizer(self.tokenizer or self.name)
        model = load_model(self.name, dtype=self.dtype)
        check_vocabulary(model, tokenizer)
        return model.to(self.placed), tokenizer


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
    tokens: AnswerTokens = "answer"

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        check_selection(self.select, self.layers)
        require_choice("--tokens", self.tokens, get_args(AnswerTokens))
        # It checks itself when it is made.
        RunOptions(projection=self.projection)
        if not -1 <= self.moderate <= self.high <= 1:
            raise ValueError(
                f"--high and --moderate must be in order within [-1, 1]; got {self.high} and {self.moderate}"
            )


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


@dataclass(frozen=True)
class Options:
    """All that the command is told.

    Args:
        model: Which model.
        pieces: What to compare.
        method: How.
        editing: What to edit for the ripple effects; None for nothing.
        out: An empty folder, but for a workspace in it; by default the next free ``runs/coupling/version_N``.
    """

    model: Model
    pieces: Pieces
    method: Method
    editing: Editing | None = None
    out: str | Path | None = None


def parsed_layers(text: str | None) -> tuple[int, int] | str | None:
    """The blocks that ``--layers`` names.

    Raises:
        ValueError: It is neither a range nor ``last:N``.

    Example:
        >>> parsed_layers("2:6"), parsed_layers("last:4"), parsed_layers(None)
        ((2, 6), 'last:4', None)
    """
    if text is None or text.startswith("last:"):
        return text
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(start), int(stop)
    except ValueError:
        raise ValueError(
            f"--layers is a:b for the layers from a up to but not including b, or last:4; got {text!r}"
        ) from None
