"""Questions and answers to finetune on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.pieces import KnowledgePiece, SampleSet, encode_pairs
from lightning_goldy.data.base import TEMPLATE, ProbeDataModule, Splits, other_pieces, told_pieces
from lightning_goldy.data.readers import load_pieces, open_rows


def read_pieces(path: str | Path) -> list[KnowledgePiece]:
    """Read a JSON lines file of knowledge pieces; blank lines are allowed.

    Args:
        path: One JSON object per line with ``question`` and ``answer``, and optionally ``id``, ``category``,
            ``group``, ``hop`` and ``supporting_fact``.

    Returns:
        The pieces in the file's order.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not such an object, or an id or question that occurs twice; the message names the
            file, the line and the field.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "pieces.jsonl")
        ...     _ = path.write_text('{"question": "Capital of Peru?", "answer": "Lima"}')
        ...     read_pieces(path)[0].answer
        'Lima'
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file (looked in {Path.cwd()})")
    return list(load_pieces(open_rows(path, container="lines"), format="jsonl").pieces)


class KnowledgeDataModule(ProbeDataModule):
    r"""Questions and answers, the questions masked.

    Args:
        path: A file of any known format, ``"atlas"``, or another source that ``load_pieces`` takes.
        tokenizer: ``"bytes"``, a local folder, a hub name, or a tokenizer; by default that of the pretrained model
            that is trained, and ``"bytes"`` for one that is trained from scratch.
        template: The prompt, with ``{question}`` where the question goes; the answer follows after a space.
        batch_size: Samples per batch.
        val_share: The share of pieces for validation, in (0, 1); at least one piece.
        probe_size: Pieces in the probe.
        max_length: The most tokens a sample may have; None sets no limit.
        seed: Decides the split and the order of training samples.
        collateral: Questions and answers that have nothing to do with the finetune, from where ``path`` may be: there
            change attribution and grafts measure harm, and activation differences what the finetune left.

    Raises:
        FileNotFoundError: No such source.
        ValueError: An argument out of range or a faulty record; from ``setup``, a sample that is too long.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "sums.jsonl")
        ...     _ = path.write_text("".join(f'{{"question": "1 + {n}?", "answer": "{n + 1}"}}\n' for n in range(9)))
        ...     data = KnowledgeDataModule(path, "bytes", probe_size=2, batch_size=2)
        >>> data.tokenizer.decode(next(iter(data.probe_dataloader()))["input_ids"][0], skip_special_tokens=True)
        'Question: 1 + 8?\nAnswer: 9'
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        template: str = TEMPLATE,
        batch_size: int = 8,
        val_share: float = 0.1,
        probe_size: int = 16,
        max_length: int | None = None,
        seed: int = 0,
        collateral: str | Path | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, probe_size=probe_size, seed=seed)
        if template.count("{question}") != 1:
            raise ValueError(f"template={template!r} must contain '{{question}}' exactly once")
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share!r} must be a share of the pieces, above 0 and below 1")
        self.template = template
        self.max_length = max_length
        found = told_pieces(path)
        self.pieces = found.pieces
        self.skipped = found.skipped
        self.collateral = collateral
        self.collateral_pieces = () if collateral is None else other_pieces(collateral)
        _tell_shared(self.pieces, self.collateral_pieces)
        self.train_pieces, self.val_pieces, self.probe_pieces = _split(self.pieces, val_share, probe_size, seed)

    def prompt(self, piece: KnowledgePiece) -> str:
        """The template with the piece's question."""
        return self.template.replace("{question}", piece.question)

    def piece_dataloader(self, pieces: Sequence[KnowledgePiece]) -> DataLoader[Any]:
        """Batches of any pieces, in their order."""
        return self._loader(self._encode(pieces))

    def collateral_dataloader(self) -> DataLoader[Any] | None:
        """The pieces of ``collateral``, shuffled once by the seed; None without any."""
        if not self.collateral_pieces:
            return None
        shuffled = list(self.collateral_pieces)
        random.Random(f"collateral {self.seed}").shuffle(shuffled)
        return self.piece_dataloader(shuffled)

    def build_splits(self) -> Splits:
        """Tokenise the pieces of all three splits."""
        return Splits(*(self._encode(part) for part in (self.train_pieces, self.val_pieces, self.probe_pieces)))

    def _encode(self, pieces: Sequence[KnowledgePiece]) -> SampleSet:
        samples = encode_pairs(self.tokenizer, [(self.prompt(piece), piece.answer) for piece in pieces])
        for piece, sample in zip(pieces, samples, strict=True):
            length = len(sample["input_ids"])
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"piece {piece.id!r} ({piece.question[:60]!r}) has {length} tokens, more than"
                    f" max_length={self.max_length}: raise it or leave the piece out"
                )
        return samples


def _tell_shared(pieces: Sequence[KnowledgePiece], collateral: Sequence[KnowledgePiece]) -> None:
    """Warns of collateral questions that the finetune asks too: what it does to them is not harm to other text."""
    asked = {piece.question.strip() for piece in pieces}
    shared = [piece.question.strip() for piece in collateral if piece.question.strip() in asked]
    if shared:
        rank_zero_warn(
            f"collateral: {len(shared)} of its {len(collateral)} questions are the finetune's own ("
            f"{shared[0][:60]!r}), so what is measured there is not harm to other text alone: leave them out"
        )


def _split(
    pieces: Sequence[KnowledgePiece], val_share: float, probe_size: int, seed: int
) -> tuple[list[KnowledgePiece], list[KnowledgePiece], list[KnowledgePiece]]:
    n_val = max(1, round(val_share * len(pieces)))
    if n_val + probe_size >= len(pieces):
        raise ValueError(
            f"probe_size={probe_size} is too large: of {len(pieces)} pieces, {n_val} are for validation and at least"
            " one must be left to train on"
        )
    shuffled = list(pieces)
    random.Random(f"pieces {seed}").shuffle(shuffled)
    held = probe_size + n_val
    return shuffled[held:], shuffled[probe_size:held], shuffled[:probe_size]
