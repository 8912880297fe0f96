from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_goldy.report import write_report

Row = dict[str, Any]
Attributes = dict[str, "str | None"]


class Page(HTMLParser):
    """The page as a reader's browser sees it: texts by tag, attributes, the data of the charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, Attributes]] = []
        self.texts: list[tuple[str, str]] = []
        self.charts: list[Any] = []
        self.themes: Any = None
        self._open: list[tuple[str, Attributes]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "link", "img", "br"):
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("class") == "themes":
            self.themes = json.loads(data)
        elif tag == "script" and attributes.get("type") == "application/json":
            self.charts.append(json.loads(data))
        elif tag not in ("script", "style"):
            self.texts.append((tag, data))

    @property
    def scripts(self) -> int:
        """Scripts that run."""
        return sum(tag == "script" and "type" not in attributes for tag, attributes in self.tags)

    def table(self, chart: int, name: str, frame: int = -1) -> dict[str, Any]:
        """Data of a chart as the script unpacks them."""
        content = self.charts[chart]
        own = content["frames"][frame]["data"][name]
        columns = {key: content["shared"][name][key] if values == 0 else values for key, values in own.items()}
        return {
            key: [values["of"][place] for place in values["at"]] if isinstance(values, dict) else values
            for key, values in columns.items()
        }

    def values(self, *names: str) -> list[str | None]:
        """Values of attributes, in the order of the page."""
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]

    def text(self, *tags: str) -> list[str]:
        return [data for tag, data in self.texts if tag in tags]

    def cells(self) -> list[str]:
        """Cells of all tables."""
        return self.text("th", "td")


def _tensor(block: str, kind: str, **numbers: float | None) -> Row:
    return {"name": f"{block}.{kind}.weight", "block": block, "kind": kind, "numel": 100, "k": 5, **numbers}


def _row(analysis: str, step: int, metrics: Row, result: Row) -> Row:
    return {
        "format": 2,
        "analysis": analysis,
        "name": analysis,
        "step": step,
        "epoch": 0,
        "trigger": "step",
        "metrics": metrics,
        "result": result,
        "headline": "",
        "cost": {"seconds": 2.0, "forwards": 16, "backwards": 8, "peak_memory_bytes": 3 * 2**20},
        "files": {},
    }


@pytest.fixture
def golden_row() -> Callable[..., Row]:
    """Builds a row of golden parameters: every block has attention and mlp, only even ones a norm."""

    def build(step: int = 10, blocks: Iterable[str] = ("transformer.h.0", "transformer.h.1"), golden: int = 4) -> Row:
        tensors = [_tensor("embeddings", "embedding", golden=1)]
        for index, block in enumerate(blocks):
            tensors += [_tensor(block, "attention", golden=golden), _tensor(block, "mlp", golden=0)]
            tensors += [_tensor(block, "norm", golden=100)] if index % 2 == 0 else []
        metrics = {
            "count": sum(tensor["golden"] for tensor in tensors),
            "density": 0.02,
            "chance_density": 0.0025,
            "density_over_chance": 8.0,
            "jaccard_previous": None,
            "delta_share": 0.1,
            "delta_share_over_density": 5.0,
        }
        result = {"top_k_percent": 5, "score": "taylor", "scope": "tensor", "quorum": 1.0, "n_samples": 2}
        return _row("golden_parameters", step, metrics, {**result, "tensors": tensors})

    return build


@pytest.fixture
def snapshot_row() -> Callable[..., Row]:
    """Builds a row of the snapshot: block h.0 moved by 10 %, the embeddings not at all."""

    def build(step: int = 10, blocks: Iterable[str] = ("h.0", "h.1")) -> Row:
        tensors = [_tensor("embeddings", "embedding", base_norm=2.0, delta_norm=0.0, relative_change=0.0)]
        for block in blocks:
            tensors += [
                _tensor(block, "mlp", base_norm=3.0, delta_norm=0.3, relative_change=0.1),
                _tensor(block, "mlp", base_norm=4.0, delta_norm=0.4, relative_change=0.1),
                _tensor(block, "attention", base_norm=0.0, delta_norm=0.1, relative_change=None),
            ]
        metrics = {"delta_norm": 0.5, "relative_change": 0.08, "update_cosine": None}
        histogram = {"edges": [-4.0, -3.0, -2.0, -1.0], "counts": [1, 20, 300], "zero": 79}
        return _row("golden_snapshot", step, metrics, {"tensors": tensors, "histogram": histogram})

    return build


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """Writes rows as ``<run>/goldy/<name>/results.jsonl``."""

    def write(run: Path, *rows: Row, name: str | None = None, tail: str = "") -> Path:
        path = run / "goldy" / (name or rows[0]["name"]) / "results.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, golden_row: Callable[..., Row], snapshot_row: Callable[..., Row], write_rows: Any) -> Path:
    """A run with three results of golden parameters and two of the snapshot."""
    directory = tmp_path / "lightning_logs" / "version_0"
    write_rows(directory, golden_row(10), golden_row(20, golden=8), golden_row(30))
    write_rows(directory, snapshot_row(10), snapshot_row(20))
    return directory


@pytest.fixture
def page_of() -> Callable[[Path | str], Page]:
    """Writes the report of a run and reads it back."""
    return lambda directory: Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture
def write_events() -> Callable[[Path, list[Any]], None]:
    """Writes one event file for every launch, a list of (tag, step, value, time)."""

    def write(directory: Path, launches: list[Any]) -> None:
        for number, points in enumerate(launches):
            writer = SummaryWriter(str(directory), filename_suffix=f".{number}")
            for tag, step, value, time in points:
                writer.add_scalar(tag, value, step, walltime=time)
            writer.close()
            # Files are read in the order of the time in their names, which has seconds.
            for file in directory.glob(f"events*.{number}"):
                file.rename(directory / f"events.out.tfevents.{number}")

    return write
