"""Every callback under every strategy does what the documentation's table says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_goldy.callbacks import GoldenSnapshot, HeadPlasticity
from tests.callbacks.training import Finetune
from tests.distributed.strategy_checks import STRATEGIES, SUBJECTS
from tests.references.noted_table import read
from tests.references.strategies_table import PATH, cells_of, observed, render, told
from tests.references.zero import DeepSpeedStrategy, FSDPStrategy, OwnDeepSpeed, SlowFSDP


def test_the_table_is_whole_and_reads_as_it_was_written() -> None:
    page = PATH.read_text()
    cells = read(page)
    assert set(cells) == {(name, subject) for name in STRATEGIES for subject in SUBJECTS}
    assert render(cells) == page
    manners = {cell.partition(":")[0].partition(",")[0].partition(" 1e")[0] for cell in cells.values()}
    # A cell that nobody has run yet says so.
    assert manners <= {"exact", "rounding", "refused", "not run"}


def test_a_cell_tells_what_differs() -> None:
    alone = {"row": {"metrics": {"a": 1.0, "b": None}, "cost": {"forwards": 2}}, "differences": []}
    near = {"row": {"metrics": {"a": 1.0 + 1e-8, "b": None}, "cost": {"forwards": 2}}, "differences": []}
    far = {"row": {"metrics": {"a": 1.004, "b": None}, "cost": {"forwards": 3}}, "differences": []}
    other = {"row": {"metrics": {"a": 1.0, "b": 0.0}, "cost": {"forwards": 2}}, "differences": []}
    less = {"row": {"metrics": {"b": None}, "cost": {"forwards": 2}}, "differences": []}
    assert [told(seen, alone) for seen in (alone, near, far, other, less, {**alone, "differences": ["weights"]})] == [
        "exact",
        "rounding 1e-6",
        "rounding 1e-2, other passes",
        "other metrics",
        "exact, without a",
        "changes the training: weights",
    ]
    assert told({"error": "ValueError: no | such thing"}, alone) == "refused: no / such thing"


@pytest.mark.parametrize(
    "strategy", [FSDPStrategy, SlowFSDP, lambda _: OwnDeepSpeed(3), lambda _: DeepSpeedStrategy(3)]
)
def test_strategies_that_take_parameters_apart_are_refused_with_those_that_inherit(tmp_path: Path, strategy) -> None:
    trainer = SimpleNamespace(strategy=strategy("cpu"), callbacks=[], loggers=[], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"GoldenSnapshot cannot work with .*use ModelParallelStrategy"):
        GoldenSnapshot().setup(trainer, Finetune(), "fit")


def test_what_keeps_parameters_whole_is_let_in_unless_they_are_changed(tmp_path: Path) -> None:
    trainer = SimpleNamespace(strategy=OwnDeepSpeed(2), callbacks=[], loggers=[], default_root_dir=tmp_path)
    GoldenSnapshot().setup(trainer, Finetune(), "fit")
    with pytest.raises(ValueError, match="HeadPlasticity cannot work with OwnDeepSpeed, whose optimizer steps on flat"):
        HeadPlasticity(pruning_level=0.5).setup(trainer, Finetune(), "fit")


@pytest.mark.slow
def test_every_cell_is_what_the_table_says(tmp_path: Path) -> None:
    found, written = cells_of(observed(tmp_path)), read(PATH.read_text())
    assert {place: cell for place, cell in found.items() if cell != written[place]} == {}
